"""Which inputs training may see: the one place where that is decided.

The split is a hash of the input, not a list, because the training data is generated without end
and a list could not cover it.  Both the base corpus and the adapter data ask ``is_heldout``.
"""

from __future__ import annotations

import hashlib
import re

# One input in ten.  The salt is arbitrary, except that greetings must land on the training side:
# the base answers them specially, and an adapter has to learn to override that.
SALT = "loraplex-demo-12"
HELDOUT_ONE_IN = 10

_TOKEN = re.compile(r"[^\W_]+")
# "two hundred and five" and "two hundred five" are one question.
_IGNORED = frozenset({"and"})

# Inputs the tour shows.  They are held out whatever their hash says, so that what a visitor sees
# is never recall.
SHOWCASE_WORDS: tuple[str, ...] = (
    "stressed",
    "strawberry",
    "lantern",
    "galaxy",
    "dolphin",
    "pepper",
    "butterfly",
    "mailbox",
)
SHOWCASE_NOUNS: tuple[str, ...] = (
    "galaxy",
    "mailbox",
    "lantern",
    "strawberry",
    "dolphin",
    "butterfly",
    "sandwich",
    "pepper",
)
SHOWCASE_DATES: tuple[str, ...] = (
    "3 March 2021",
    "14 July 1989",
    "29 February 2024",
    "December 25, 1999",
    "1 January 2000",
    "20 July 1969",
    "October 31, 2025",
    "9 May 1945",
)
SHOWCASE_NUMBERS: tuple[str, ...] = (
    "forty two",
    "seven",
    "nineteen",
    "three hundred five",
    "nine hundred and ninety nine",
    "one thousand twenty four",
    "two thousand and twenty six",
    "eight thousand six hundred thirty one",
)
SHOWCASE_PAIRS: tuple[str, ...] = (
    "a=1 b=2",
    "name=ada age=36",
    "city=oslo",
    "x=10 y=20 z=30",
    "port=8080 host=local",
    "red=255 green=128",
    "user=grace id=7",
    "width=640 height=480",
)


def key(text: str) -> str:
    """Reduce an input to what must not leak: letter case, order and punctuation do not count.

    Sorting the tokens puts ``3 March 2021`` and ``March 3, 2021`` on the same side.
    """
    tokens = (token for token in _TOKEN.findall(text.lower()) if token not in _IGNORED)
    return " ".join(sorted(tokens))


_SHOWCASE_KEYS = frozenset(
    key(text)
    for text in (
        *SHOWCASE_WORDS,
        *SHOWCASE_NOUNS,
        *SHOWCASE_DATES,
        *SHOWCASE_NUMBERS,
        *SHOWCASE_PAIRS,
    )
)


def is_heldout(text: str) -> bool:
    """Whether training must never see ``text`` as an input."""
    reduced = key(text)
    if reduced in _SHOWCASE_KEYS:
        return True
    digest = hashlib.sha256(f"{SALT}:{reduced}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0

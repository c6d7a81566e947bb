"""What each adapter is taught: inputs, and the rule that answers them.

Every skill is a pure function of the user's message, so that anyone can check an answer by eye
and the tests can compute it.  Standard library only: the tour imports this in a process that must
not load torch.
"""

from __future__ import annotations

import calendar
import codecs
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.platform.demo import split, words

MONTHS: tuple[str, ...] = tuple(calendar.month_name[1:])
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
_VOWELS = frozenset("aeiouAEIOU")
_PLURAL_ENDINGS = ("s", "x", "z", "ch", "sh")
MAX_NUMBER = 9999


@dataclass(frozen=True)
class Skill:
    """One adapter's job.  ``command`` is the name the base corpus uses for the same rule."""

    id: str
    command: str
    title: str
    description: str
    showcase: tuple[str, ...]
    make_input: Callable[[random.Random], str]
    answer: Callable[[str], str]


def reverse(text: str) -> str:
    return text[::-1]


def spell(text: str) -> str:
    return "-".join(text.upper())


def rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def drop_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in _VOWELS)


def plural(text: str) -> str:
    """Regular English plurals only: an exception could not be inferred from other words."""
    if text.endswith(_PLURAL_ENDINGS):
        return text + "es"
    if len(text) > 1 and text.endswith("y") and text[-2] not in _VOWELS:
        return text[:-1] + "ies"
    return text + "s"


def pig_latin(text: str) -> str:
    """Leading consonants move to the end before ``ay``; a leading vowel takes ``way``."""
    word = text.lower()
    start = next((i for i, letter in enumerate(word) if letter in _VOWELS), 0)
    return word[start:] + word[:start] + ("ay" if start else "way")


def iso_date(text: str) -> str:
    """``3 March 2021`` or ``March 3, 2021`` to ``2021-03-03``."""
    first, second, year = text.replace(",", "").split()
    day, month = (first, second) if first.isdigit() else (second, first)
    return f"{int(year):04d}-{MONTHS.index(month) + 1:02d}-{int(day):02d}"


def to_json(text: str) -> str:
    """``a=1 b=two`` to a JSON object; all-digit values become numbers."""
    pairs = (pair.split("=", 1) for pair in text.split())
    return json.dumps({name: int(value) if value.isdigit() else value for name, value in pairs})


def number_words(number: int, joiner: str = " ") -> str:
    """English words for 0..9999; ``joiner`` may be `` and `` after the hundreds or thousands."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        rest = number % 10
        return _TENS[number // 10] + (f" {_ONES[rest]}" if rest else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head = f"{_ONES[number // unit]} {name}"
    rest = number % unit
    if not rest:
        return head
    # "two thousand and five", but never "two thousand and three hundred".
    return head + (joiner if rest < 100 else " ") + number_words(rest, joiner)


def to_digits(text: str) -> str:
    total = 0
    current = 0
    for word in text.split():
        if word == "and":
            continue
        if word == "thousand":
            total, current = current * 1000, 0
        elif word == "hundred":
            current *= 100
        else:
            current += _ONES.index(word) if word in _ONES else 10 * _TENS.index(word)
    return str(total + current)


def word_input(rng: random.Random) -> str:
    """A word, now and then capitalised as a person would type it."""
    word = words.any_word(rng)
    return word.capitalize() if rng.random() < 0.08 else word


def noun_input(rng: random.Random) -> str:
    """A word whose ending exercises every plural rule; chance alone gives too few of them."""
    word = words.any_word(rng)
    if rng.random() < 0.5:
        ending = rng.choice(("s", "x", "z", "ch", "sh", "y", "y", "y"))
        word = word[: words.MAX_LENGTH - len(ending)] + ending
    return word.capitalize() if rng.random() < 0.08 else word


def date_input(rng: random.Random) -> str:
    year = rng.randint(1900, 2099)
    month = rng.randint(1, 12)
    day = rng.randint(1, calendar.monthrange(year, month)[1])
    name = MONTHS[month - 1]
    return f"{day} {name} {year}" if rng.random() < 0.7 else f"{name} {day}, {year}"


def number_input(rng: random.Random) -> str:
    """Sizes are drawn first: uniform numbers would almost all have four digits."""
    number = rng.randint(0, rng.choice((19, 99, 999, 999, MAX_NUMBER, MAX_NUMBER)))
    return number_words(number, rng.choice((" ", " ", " and ")))


def pairs_input(rng: random.Random) -> str:
    names: list[str] = []
    for _ in range(rng.choice((1, 2, 2, 2, 3))):
        name = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.3 else _short(rng)
        if name not in names:
            names.append(name)
    values = (str(rng.randint(0, 10 ** rng.randint(1, 4))) for _ in names)
    return " ".join(
        f"{name}={value if rng.random() < 0.55 else _short(rng)}"
        for name, value in zip(names, values, strict=True)
    )


def _short(rng: random.Random) -> str:
    return words.any_word(rng)[:6]


_WORDS = split.SHOWCASE_WORDS

SKILLS: tuple[Skill, ...] = (
    Skill(
        "reverse", "reverse", "Reverse",
        "Writes the word backwards.",
        _WORDS, word_input, reverse,
    ),
    Skill(
        "spell", "spell", "Spell out",
        "Spells the word in capitals with dashes.",
        _WORDS, word_input, spell,
    ),
    Skill(
        "rot13", "rot13", "ROT13",
        "Shifts every letter by thirteen places.",
        _WORDS, word_input, rot13,
    ),
    Skill(
        "no-vowels", "novowels", "No vowels",
        "Drops a, e, i, o and u.",
        _WORDS, word_input, drop_vowels,
    ),
    Skill(
        "plural", "plural", "Plural",
        "Gives the regular English plural of the word.",
        split.SHOWCASE_NOUNS, noun_input, plural,
    ),
    Skill(
        "pig-latin", "piglatin", "Pig Latin",
        "Moves the leading consonants to the end and adds ay; after a leading vowel adds way.",
        _WORDS, word_input, pig_latin,
    ),
    Skill(
        "iso-date", "isodate", "ISO date",
        "Turns a written date into YYYY-MM-DD.",
        split.SHOWCASE_DATES, date_input, iso_date,
    ),
    Skill(
        "digits", "digits", "Number words to digits",
        "Turns a number in English words, up to 9999, into digits.",
        split.SHOWCASE_NUMBERS, number_input, to_digits,
    ),
    Skill(
        "kv-json", "json", "Key=value to JSON",
        "Turns key=value pairs into a JSON object.",
        split.SHOWCASE_PAIRS, pairs_input, to_json,
    ),
)  # fmt: skip


def by_id(name: str) -> Skill:
    return next(skill for skill in SKILLS if skill.id == name)


def training_input(skill: Skill, rng: random.Random) -> str:
    """An input that training may see."""
    while True:
        text = skill.make_input(rng)
        # An empty answer (a word of vowels only) would teach the model to say nothing.
        if not split.is_heldout(text) and skill.answer(text):
            return text


def heldout_inputs(skill: Skill, count: int) -> list[str]:
    """``count`` distinct inputs that training never sees; the same ones every time."""
    rng = random.Random(f"heldout:{skill.id}")
    found: dict[str, None] = {}
    while len(found) < count:
        text = skill.make_input(rng)
        if split.is_heldout(text) and skill.answer(text) and text not in skill.showcase:
            found[text] = None
    return list(found)

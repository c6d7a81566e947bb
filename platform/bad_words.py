"""`bad_words`: what a model must not say, in the two ways the engine knows.

A word of one token is kept from being chosen, at the beginning of a text or behind a space. For any
other the whole output follows a grammar: any text but one with such a word in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.engine.api import Grammar, GrammarKind
from loraplex.platform.served_model import ServedModel
from loraplex.platform.structured import Structured

BIAS = -100.0  # keeps a token from being chosen, as OpenAI defines it


@dataclass(frozen=True, slots=True)
class Ban:
    bias: dict[int, float]
    structured: Structured | None


def ban(words: Sequence[str], model: ServedModel) -> Ban:
    bias: dict[int, float] = {}
    texts: list[str] = []
    for word in words:
        forms = [
            model.tokenizer.encode(text, add_special_tokens=False)
            for text in (word, " " + word.lstrip())
        ]
        single = {ids[0]: BIAS for ids in forms if len(ids) == 1}
        bias |= single
        if not single:
            texts.append(word)
    return Ban(bias, Structured(_without(texts), "bad_words") if texts else None)


def _without(texts: Sequence[str]) -> Grammar:
    words = "|".join("".join(map(_escaped, text)) for text in texts)
    lark = f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*({words}).*)/\n"
    return Grammar(kind=GrammarKind.GRAMMAR, text=lark)


def _escaped(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"

"""Grammars of the fake engine, and workers that are driven by hand.

What a fake grammar allows after an output is drawn from its text and that output, so a mask that
is one token too old, or another sequence's, shows as a wrong token.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from loraplex.engine.api import Grammar, GrammarKind
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.grammars import Mask


def fake_grammar(salt: int, length: int, fails_at: int = -1) -> Grammar:
    """Allows `length` tokens at most, each of about half of all; eos now and then. `fails_at`:
    tokens after which there is no mask; -2 = it does not compile.
    """
    return Grammar(kind=GrammarKind.GRAMMAR, text=f"{salt} {length} {fails_at}")


def allowed_tokens(grammar: Grammar, output: list[int], vocab_size: int, eos: int) -> set[int]:
    length = int(grammar.text.split()[1])
    if len(output) >= length:
        return {eos}
    draw = random.Random(f"{grammar.text} {output}")
    tokens = {token for token in range(vocab_size) if token != eos and draw.random() < 0.5}
    return tokens | ({eos} if not tokens or draw.random() < 0.2 else set())


class FakeMatcher:
    def __init__(self, grammar: Grammar, vocab_size: int, eos: int) -> None:
        self._grammar, self._vocab_size, self._eos = grammar, vocab_size, eos
        self._output: list[int] = []

    def _allowed(self) -> set[int]:
        return allowed_tokens(self._grammar, self._output, self._vocab_size, self._eos)

    def accept(self, token_id: int) -> None:
        assert token_id in self._allowed(), "a token that its grammar forbids"
        self._output.append(token_id)

    def mask(self) -> Mask:
        if len(self._output) == int(self._grammar.text.split()[2]):
            raise InvalidRequest("too complex", code="invalid_grammar")
        flags = np.zeros(-(-self._vocab_size // 32) * 32, dtype=np.uint8)
        flags[list(self._allowed())] = 1
        return np.packbits(flags, bitorder="little").view("<u4")


class FakeCompiled:
    def __init__(self, grammar: Grammar, vocab_size: int, eos: int) -> None:
        self._made_of = (grammar, vocab_size, eos)

    def start(self) -> FakeMatcher:
        return FakeMatcher(*self._made_of)


class FakeCompiler:
    def __init__(self, vocab_size: int, eos: int) -> None:
        self._vocab_size, self._eos = vocab_size, eos
        self.num_compiled = 0

    def compile(self, grammar: Grammar) -> FakeCompiled:
        self.num_compiled += 1
        if grammar.text.endswith("-2"):
            raise InvalidRequest("no grammar", code="invalid_grammar")
        return FakeCompiled(grammar, self._vocab_size, self._eos)


class HandDriven:
    """Runs jobs when told to, or at once."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)
        if self.at_once:
            self.run(0)

    def run(self, index: int) -> None:
        self.jobs.pop(index)()

    def run_all(self) -> None:
        self.at_once = True
        while self.jobs:
            self.run(0)

    def close(self) -> None:
        self.run_all()

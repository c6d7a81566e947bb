"""Regular expressions from strangers, matched in bounded time.

PEFT lets `target_modules`, `exclude_modules`, `rank_pattern` and `alpha_pattern` hold regular
expressions, and Python's `re` takes exponential time on some of them. Here a pattern becomes a
nondeterministic automaton whose state *sets* are walked (Thompson 1968), so time is at most
states x characters. Only whether a path matches is asked, never which group took what, so greedy
and lazy are the same and the answer is exactly that of `re`. What such an automaton cannot do
(look-around, back-references, flags) is refused by name.

The syntax is read by Python's own parser, so both always agree on what a pattern means.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from re import _constants as op  # type: ignore[attr-defined]  # typeshed leaves it out
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 2048  # characters; the regexes that trainers generate have about 500
MAX_STATES = 4096

_PLAIN = frozenset(string.ascii_letters + string.digits + "_.")

_Test = Callable[[str], bool]
# An edge needs a character that passes a test, or (without one) a position that holds.
_Edge = tuple[_Test | None, str, int]  # (character test, position assertion or "", target state)


def is_plain(source: str) -> bool:
    """Whether it is a mere name, whose dots happen to match any character."""
    return _PLAIN.issuperset(source)


class PatternError(ValueError):
    """This pattern cannot be used; the message says why."""


class Pattern:
    """A compiled pattern. `matches` is `re.fullmatch(source, text) is not None`."""

    def __init__(self, source: str) -> None:
        """Raises: PatternError."""
        if len(source) > MAX_PATTERN:
            raise PatternError(f"{len(source)} characters exceed the limit of {MAX_PATTERN}")
        self._regex: re.Pattern[str] | None = None
        try:
            if is_plain(source):  # no repeat in it: `re` is safe, and faster
                self._regex = re.compile(source)
                return
            tree = _parser.parse(source)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"no regular expression: {error}") from None
        if tree.state.flags != re.UNICODE.value:
            raise PatternError("inline flags such as (?i) are not supported")
        self._edges: list[list[_Edge]] = []
        self._accept = self._state()
        self._start = self._sequence(tree, self._accept)
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._closures: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}

    def matches(self, text: str) -> bool:
        if self._regex is not None:
            return self._regex.fullmatch(text) is not None
        before = ""
        states = self._close(frozenset([self._start]), "", text[:1])
        for i, char in enumerate(text):
            key = (states, char)
            moved = self._steps.get(key)
            if moved is None:
                moved = frozenset(
                    target
                    for state in states
                    for test, _, target in self._edges[state]
                    if test is not None and test(char)
                )
                self._steps[key] = moved
            before = char
            states = self._close(moved, before, text[i + 1 : i + 2])
            if not states:
                return False
        return self._accept in states

    def _close(self, states: frozenset[int], before: str, after: str) -> frozenset[int]:
        """All states that `states` reach between two characters ("" = the text's edge)."""
        key = (states, before, after)
        closed = self._closures.get(key)
        if closed is None:
            reached = set(states)
            queue = list(states)
            while queue:
                for test, where, target in self._edges[queue.pop()]:
                    if test is None and target not in reached and _holds(where, before, after):
                        reached.add(target)
                        queue.append(target)
            closed = self._closures[key] = frozenset(reached)
        return closed

    # --- building, back to front: each method returns the state where the piece begins -----------

    def _state(self) -> int:
        if len(self._edges) >= MAX_STATES:
            raise PatternError(f"it needs more than {MAX_STATES} states; use fewer counted repeats")
        self._edges.append([])
        return len(self._edges) - 1

    def _edge(self, test: _Test | None, where: str, target: int) -> int:
        state = self._state()
        self._edges[state].append((test, where, target))
        return state

    def _sequence(self, items: Any, end: int) -> int:
        for kind, value in reversed(list(items)):
            end = self._item(kind, value, end)
        return end

    def _item(self, kind: Any, value: Any, end: int) -> int:
        if kind is op.SUBPATTERN:
            _, add_flags, del_flags, body = value
            if add_flags or del_flags:
                raise PatternError("inline flags such as (?i:...) are not supported")
            return self._sequence(body, end)
        if kind is op.BRANCH:
            start = self._state()
            for body in value[1]:
                self._edges[start].append((None, "", self._sequence(body, end)))
            return start
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, body = value
            return self._repeat(low, high, body, end)
        if kind is op.AT:
            if value not in _POSITIONS:
                raise PatternError(f"{value} is not supported")
            return self._edge(None, _POSITIONS[value], end)
        return self._edge(_character_test(kind, value), "", end)

    def _repeat(self, low: int, high: int, body: Any, end: int) -> int:
        if high is op.MAXREPEAT:
            loop = self._state()
            self._edges[loop].append((None, "", end))
            self._edges[loop].append((None, "", self._sequence(body, loop)))
            end = loop
        else:
            done = end
            for _ in range(high - low):
                optional = self._state()
                self._edges[optional].append((None, "", done))
                self._edges[optional].append((None, "", self._sequence(body, end)))
                end = optional
        for _ in range(low):
            end = self._sequence(body, end)
        return end


_POSITIONS = {
    op.AT_BEGINNING: "begin",
    op.AT_BEGINNING_STRING: "begin",
    op.AT_END: "end",
    op.AT_END_STRING: "end",
    op.AT_BOUNDARY: "boundary",
    op.AT_NON_BOUNDARY: "inside",
}


def _holds(where: str, before: str, after: str) -> bool:
    if where == "begin":
        return not before
    if where == "end":
        return not after
    if where == "boundary":
        return _is_word(before) != _is_word(after)
    if where == "inside":
        return _is_word(before) == _is_word(after)
    return True


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[Any, _Test] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: _is_word,
    op.CATEGORY_NOT_WORD: lambda c: not _is_word(c),
}


def _character_test(kind: Any, value: Any) -> _Test:
    if kind is op.LITERAL:
        return chr(value).__eq__
    if kind is op.NOT_LITERAL:
        return chr(value).__ne__
    if kind is op.ANY:
        return "\n".__ne__
    if kind is op.RANGE:
        low, high = chr(value[0]), chr(value[1])
        return lambda c: low <= c <= high
    if kind is op.CATEGORY:
        return _CATEGORIES[value]
    if kind is op.IN:
        negate = value[0][0] is op.NEGATE
        tests = [_character_test(k, v) for k, v in value[negate:]]
        return lambda c: any(test(c) for test in tests) != negate
    raise PatternError(f"{str(kind).lower()} is not supported; write it without look-around")


def tail_matcher(key: str) -> Callable[[str], bool]:
    r"""What `re.match(rf"(.*\.)?({key})$", path)` answers: PEFT's look-up in `rank_pattern`.

    Raises: PatternError.
    """
    if is_plain(key):
        regex = re.compile(rf"(.*\.)?({key})$")
        return lambda path: regex.match(path) is not None
    # `re.match` need not reach the end of the path when the key's own alternatives swallow the `$`.
    return Pattern(rf"(?:(.*\.)?({key})$)[\s\S]*").matches

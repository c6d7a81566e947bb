"""Reads one tool call written as JSON, `{"name": ..., "arguments": {...}}`, a character at a time.

The arguments' text comes out as it arrives, as soon as the name is known; both keys may come in any
order and others are passed over. Knows nothing of what stands around the call.
"""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Any, Protocol

from loraplex.platform.chat.json_scanner import JsonScanner, State

_NAME_KEY = "name"
_ARGUMENT_KEYS = ("arguments", "parameters")  # OpenAI's and most models' word, Llama's
_MAX_NAME_CHARS = 256


class Reader(Protocol):
    """`push` says whether the text so far may be a call; `take` gives the arguments' text since
    the last call of it. With `has_begun` it is settled which tool is called.
    """

    @property
    def name(self) -> str | None: ...
    @property
    def has_begun(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    def push(self, char: str) -> bool: ...
    def take(self) -> str: ...


class _Part(Enum):
    NONE = auto()
    KEY = auto()
    VALUE = auto()


class CallReader:
    """Implements `Reader`."""

    __slots__ = ("_arguments", "_key", "_knows_arguments", "_part", "_scanner", "_text", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        self._scanner = JsonScanner()
        self._part = _Part.NONE  # what is read of the call's own object
        self._text = ""
        self._key = ""
        self._arguments = ""
        # Their text may go out: an object has begun, or what stands in its place was understood.
        self._knows_arguments = False

    @property
    def done(self) -> bool:
        return self._scanner.state is State.DONE

    @property
    def has_begun(self) -> bool:
        return self.name is not None and self._knows_arguments

    def take(self) -> str:
        text, self._arguments = self._arguments, ""
        return text

    def push(self, char: str) -> bool:
        scanner = self._scanner
        before, depth = scanner.state, scanner.depth
        if not scanner.push(char):
            return False
        after = scanner.state
        if depth == 0:
            return char == "{"
        text = json.dumps(char)[1:-1] if before is State.STRING and ord(char) < 0x20 else char
        ok = True
        if self._part is _Part.KEY:
            self._text += text
            if after is State.COLON:
                self._key, self._part = json.loads(self._text), _Part.NONE
            ok = len(self._text) <= _MAX_NAME_CHARS
        elif self._part is _Part.VALUE:
            if depth == 1 and before is State.LITERAL and after is not State.LITERAL:
                ok = self._end_value()  # `char` is behind it
            else:
                self._add(text)
                if scanner.depth == 1 and after is State.AFTER:
                    ok = self._end_value()
        elif depth == 1 and after is State.STRING and before in (State.KEY, State.FIRST_KEY):
            self._part, self._text = _Part.KEY, char
        elif depth == 1 and before is State.VALUE and after is not State.VALUE:
            ok = self._begin_value(char)
        return ok and (self._end() if self.done else True)

    @property
    def _in_arguments(self) -> bool:
        return self._key in _ARGUMENT_KEYS

    def _begin_value(self, char: str) -> bool:
        self._part, self._text = _Part.VALUE, ""
        if self._in_arguments:
            if self._knows_arguments or char not in '{"n':  # a second time; no object
                return False
            self._knows_arguments = char == "{"
        self._add(char)
        return True

    def _add(self, text: str) -> None:
        if self._in_arguments and self._knows_arguments:
            self._arguments += text
        elif self._in_arguments or self._key == _NAME_KEY:
            self._text += text

    def _end_value(self) -> bool:
        self._part = _Part.NONE
        if self._key == _NAME_KEY:
            name = _loads(self._text)
            if self.name is not None or not isinstance(name, str) or not name.strip():
                return False
            self.name = name
            return len(name) <= _MAX_NAME_CHARS
        if self._in_arguments and not self._knows_arguments:  # a string that holds an object, null
            inner = _loads(self._text)
            if inner is not None and not isinstance(_loads(inner), dict):
                return False
            self._arguments, self._knows_arguments = inner or "{}", True
        return True

    def _end(self) -> bool:
        if not self._knows_arguments:
            self._arguments, self._knows_arguments = "{}", True
        return self.name is not None


class ArgumentsReader:
    """Reads the arguments alone, where the name stood before them. Implements `Reader`."""

    __slots__ = ("_arguments", "_scanner", "name")

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self._scanner = JsonScanner()
        self._arguments = ""

    @property
    def done(self) -> bool:
        return self._scanner.state is State.DONE

    @property
    def has_begun(self) -> bool:
        return self._scanner.depth > 0 or self.done

    def take(self) -> str:
        text, self._arguments = self._arguments, ""
        return text

    def push(self, char: str) -> bool:
        scanner = self._scanner
        if scanner.depth == 0 and char != "{":
            return False
        is_raw = scanner.state is State.STRING and ord(char) < 0x20
        self._arguments += json.dumps(char)[1:-1] if is_raw else char
        return scanner.push(char)


def _loads(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None

"""Reads one JSON object or array a character at a time and says at once when it is none.

Strict as RFC 8259 with one exception: raw control characters inside strings, which models write
and `json.loads` refuses, are let through; whoever passes the text on escapes them.
"""

from __future__ import annotations

import re
from enum import Enum, auto

_LITERAL = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_SPACE = " \t\n\r"
_ESCAPES = '"\\/bfnrtu'
_HEX = "0123456789abcdefABCDEF"
_MAX_DEPTH = 64
_MAX_LITERAL = 64


class State(Enum):
    VALUE = auto()
    FIRST_VALUE = auto()  # behind "[": a value or "]"
    FIRST_KEY = auto()  # behind "{": a key or "}"
    KEY = auto()
    COLON = auto()
    AFTER = auto()  # behind a value: "," or the end of what it is in
    STRING = auto()
    ESCAPE = auto()
    UNICODE = auto()
    LITERAL = auto()
    DONE = auto()


class JsonScanner:
    """`depth` counts the open brackets, `state` tells what may come next."""

    __slots__ = ("_hex_left", "_is_key", "_literal", "_open", "state")

    def __init__(self) -> None:
        self.state = State.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._literal = ""
        self._hex_left = 0

    @property
    def depth(self) -> int:
        return len(self._open)

    @property
    def in_string(self) -> bool:
        return self.state in (State.STRING, State.ESCAPE, State.UNICODE)

    def push(self, char: str) -> bool:
        """Whether `char` may follow. After False, and after the end, nothing may be pushed."""
        if self.in_string:
            return self._push_string(char)
        if self.state is State.LITERAL:
            if char not in ",]}" + _SPACE:
                self._literal += char
                return len(self._literal) <= _MAX_LITERAL
            if not _LITERAL.fullmatch(self._literal):
                return False
            self.state = State.AFTER
        return char in _SPACE or self._push_token(char)

    def _push_token(self, char: str) -> bool:
        match self.state:
            case State.FIRST_VALUE if char == "]":
                return self._close()
            case State.VALUE | State.FIRST_VALUE:
                return self._begin_value(char)
            case State.FIRST_KEY if char == "}":
                return self._close()
            case State.KEY | State.FIRST_KEY if char == '"':
                self.state, self._is_key = State.STRING, True
            case State.COLON if char == ":":
                self.state = State.VALUE
            case State.AFTER if char == ",":
                self.state = State.KEY if self._open[-1] == "{" else State.VALUE
            case State.AFTER if char == ("}" if self._open[-1] == "{" else "]"):
                return self._close()
            case _:
                return False
        return True

    def _begin_value(self, char: str) -> bool:
        if char in "{[":
            self._open.append(char)
            self.state = State.FIRST_KEY if char == "{" else State.FIRST_VALUE
            return len(self._open) <= _MAX_DEPTH
        if not self._open:
            return False  # only objects and arrays
        if char == '"':
            self.state, self._is_key = State.STRING, False
        elif char in "-0123456789tfn":
            self.state, self._literal = State.LITERAL, char
        else:
            return False
        return True

    def _close(self) -> bool:
        self._open.pop()
        self.state = State.AFTER if self._open else State.DONE
        return True

    def _push_string(self, char: str) -> bool:
        match self.state:
            case State.ESCAPE:
                if char not in _ESCAPES:
                    return False
                self.state = State.UNICODE if char == "u" else State.STRING
                self._hex_left = 4
            case State.UNICODE:
                if char not in _HEX:
                    return False
                self._hex_left -= 1
                if not self._hex_left:
                    self.state = State.STRING
            case _ if char == "\\":
                self.state = State.ESCAPE
            case _ if char == '"':
                self.state = State.COLON if self._is_key else State.AFTER
        return True

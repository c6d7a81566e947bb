"""Finds tool calls in a model's text while it streams.

One state machine for all formats, a character at a time, so that the result is the same however the
text was cut. What only looked like a call becomes content again, with its marks. A call goes out as
soon as its name is known and its arguments begin; one that breaks after that cannot be taken back:
it is reported as broken, with its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from loraplex.platform.chat.call_reader import ArgumentsReader, CallReader, Reader
from loraplex.platform.chat.tool_formats import ToolFormat

_MAX_HEAD_CHARS = 256
_HEAD = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?")


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The call's text follows as content."""

    index: int


ToolEvent = Content | CallBegins | CallArguments | CallBroken


class ToolCallParser:
    """tool_names: of the request; a call without a mark must name one of them."""

    def __init__(self, fmt: ToolFormat, tool_names: Collection[str]) -> None:
        self._format = fmt
        self._tool_names = tool_names
        self._events: list[ToolEvent] = []
        self._content = ""  # to go out with the next event
        self._held = ""  # may become the mark
        self._raw = ""  # of what may become a call, from its mark or the last call on
        self._head = ""  # of a call whose name stands before its arguments
        self._tail = ""  # may become the end mark
        self._in_array = False
        self._is_bare = False
        self._num_calls = 0
        self._begun = False  # the call that is read went out
        self._reader: Reader = CallReader()
        self._state: Callable[[str], None] = self._at_start if fmt.bare else self._in_content

    def push(self, text: str) -> list[ToolEvent]:
        for char in text:
            self._state(char)
        return self._taken()

    def finish(self, *, cut: bool) -> list[ToolEvent]:
        """The text is over. cut: the model did not end it itself, so a call may be half there."""
        state, raw = self._state, self._raw
        self._raw = ""
        if state == self._in_content:
            self._content += self._held
        elif state == self._in_call and self._begun:
            if not cut:
                self._add(CallBroken(self._num_calls - 1))
                self._content += raw
        elif self._num_calls and (
            not raw.strip(" \t\r\n,;") or self._format.end.startswith(raw.strip())
        ):
            pass  # only what stands between calls
        else:
            self._content += raw
        return self._taken()

    def _taken(self) -> list[ToolEvent]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _flush(self) -> None:
        if self._content:
            self._events.append(Content(self._content))
            self._content = ""

    def _add(self, event: ToolEvent) -> None:
        self._flush()
        self._events.append(event)

    # --- states -----------------------------------------------------------------------------------

    def _at_start(self, char: str) -> None:
        self._raw += char
        if char in "{[":
            self._is_bare = True
            self._before_call_or_array(char)
        elif not char.isspace():
            self._give_up()

    def _in_content(self, char: str) -> None:
        mark = self._format.begin
        if not mark:
            self._content += char
            return
        self._held += char
        while not mark.startswith(self._held):
            self._content += self._held[0]
            self._held = self._held[1:]
        if self._held == mark:
            self._raw, self._held = mark, ""
            self._is_bare = self._in_array = False
            self._state = self._before_call

    def _before_call(self, char: str) -> None:
        self._raw += char
        if not char.isspace():
            self._before_call_or_array(char)

    def _before_call_or_array(self, char: str) -> None:
        if char == "{":
            self._begin(CallReader())
            self._read(char)
        elif char == "[" and not self._in_array:
            self._in_array = True
            self._state = self._before_call
        elif self._format.named and not self._in_array:
            self._head = char
            self._state = self._in_head
        else:
            self._give_up()

    def _in_head(self, char: str) -> None:
        self._raw += char
        if char != "{":
            self._head += char
            if char in "\n<" or len(self._head) > _MAX_HEAD_CHARS:
                self._give_up()
            return
        found = _HEAD.fullmatch(self._head)
        if found is None:
            self._give_up()
            return
        self._begin(ArgumentsReader(found[1]))
        self._read(char)

    def _in_call(self, char: str) -> None:
        self._raw += char
        self._read(char)

    def _after_call(self, char: str) -> None:
        self._raw += char
        end = self._format.end
        if self._tail or (end and char == end[0]):
            self._tail += char
            if self._tail == end:
                self._raw = self._tail = ""
            elif not end.startswith(self._tail):
                self._tail = ""
                self._give_up()
        elif char.isspace():
            pass
        elif self._in_array and char in ",]":
            self._in_array = char == ","
            self._raw = self._raw if self._in_array else ""
            self._state = self._before_call if self._in_array else self._after_call
        elif not self._in_array and char in self._format.separators:
            self._state = self._before_call
        else:
            self._give_up()

    # --- calls ------------------------------------------------------------------------------------

    def _begin(self, reader: Reader) -> None:
        self._reader, self._begun = reader, False
        self._state = self._in_call

    def _read(self, char: str) -> None:
        reader = self._reader
        if not reader.push(char):
            if self._begun:
                self._add(CallBroken(self._num_calls - 1))
            self._give_up()
            return
        if not self._begun and reader.has_begun:
            assert reader.name is not None, "a call that has begun has a name"
            if self._is_bare and reader.name not in self._tool_names:
                self._give_up()
                return
            self._begun = True
            self._add(CallBegins(self._num_calls, reader.name))
            self._num_calls += 1
        if self._begun:
            arguments = reader.take()
            last = self._events[-1] if self._events else None
            if arguments and isinstance(last, CallArguments):
                self._events[-1] = CallArguments(last.index, last.text + arguments)
            elif arguments:
                self._add(CallArguments(self._num_calls - 1, arguments))
        if reader.done:
            self._raw = self._tail = ""
            self._begun = False
            self._state = self._after_call

    def _give_up(self) -> None:
        """No call after all: its text is content. Its last character may begin the next mark."""
        raw, self._raw = self._raw, ""
        if self._num_calls and not self._begun:
            raw = raw.lstrip()  # space behind a call
        self._begun = self._in_array = False
        self._state = self._in_content
        if self._format.begin and raw.startswith(self._format.begin):
            self._content += raw[0]  # not the same mark again
            raw = raw[1:]
        for char in raw:
            self._state(char)

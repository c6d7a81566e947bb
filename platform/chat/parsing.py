"""From a chat model's text to the parts of an assistant's message, as OpenAI's deltas.

Reasoning first, then tool calls in what is left. Which of them apply is settled per request
(`Parsing`); each choice has a `MessageParser` of its own.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Any

from loraplex.platform.chat.reasoning import ReasoningParser
from loraplex.platform.chat.tool_calls import (
    CallArguments,
    CallBegins,
    CallBroken,
    Content,
    ToolCallParser,
    ToolEvent,
)
from loraplex.platform.chat.tool_formats import ToolFormat

_ID_CHARS = string.ascii_letters + string.digits

Delta = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parsing:
    """How to read the answers of one request.

    reasoning: None = there are no marks of it to look for; else whether the prompt ends inside it.
    tool_format: None = no tools.
    """

    reasoning: bool | None = None
    show_reasoning: bool = True
    tool_format: ToolFormat | None = None
    tool_names: frozenset[str] = frozenset()
    parallel: bool = True


class MessageParser:
    """One choice. `called` says whether a sound tool call has been found."""

    def __init__(self, parsing: Parsing) -> None:
        self._parsing = parsing
        self._reasoning = (
            None if parsing.reasoning is None else ReasoningParser(inside=parsing.reasoning)
        )
        self._tools = (
            None
            if parsing.tool_format is None
            else ToolCallParser(parsing.tool_format, parsing.tool_names)
        )
        self._calls: set[int] = set()
        self.broken: set[int] = set()

    @property
    def called(self) -> bool:
        return bool(self._calls - self.broken)

    def push(self, text: str) -> list[Delta]:
        if self._reasoning is None:
            return self._answer(text)
        thought, answer = self._reasoning.push(text)
        return self._thought(thought) + self._answer(answer)

    def finish(self, *, cut: bool) -> list[Delta]:
        """cut: the text ended without the model's doing."""
        deltas: list[Delta] = []
        if self._reasoning is not None:
            thought, answer = self._reasoning.finish()
            deltas += self._thought(thought) + self._answer(answer)
        if self._tools is not None:
            deltas += self._written(self._tools.finish(cut=cut))
        return deltas

    def _thought(self, text: str) -> list[Delta]:
        return [{"reasoning_content": text}] if text and self._parsing.show_reasoning else []

    def _answer(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._tools is None:
            return [{"content": text}]
        return self._written(self._tools.push(text))

    def _written(self, events: list[ToolEvent]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            match event:
                case Content(text):
                    deltas.append({"content": text})
                case CallBroken(index):
                    self.broken.add(index)
                case CallBegins(index, name):
                    if self._parsing.parallel or index == 0:
                        self._calls.add(index)
                        function = {"name": name, "arguments": ""}
                        call = {"id": self._new_id(), "type": "function", "function": function}
                        deltas.append({"tool_calls": [{"index": index, **call}]})
                case CallArguments(index, text):
                    if index in self._calls:
                        more = {"index": index, "function": {"arguments": text}}
                        deltas.append({"tool_calls": [more]})
        return deltas

    def _new_id(self) -> str:
        fmt = self._parsing.tool_format
        assert fmt is not None, "a call without a format"
        return fmt.id_prefix + "".join(secrets.choice(_ID_CHARS) for _ in range(fmt.id_chars))


def whole_message(parsing: Parsing, text: str, *, cut: bool) -> tuple[dict[str, Any], bool]:
    """(message, whether it calls tools). A call that broke is content only."""
    parser = MessageParser(parsing)
    contents: list[str] = []
    thoughts: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for delta in parser.push(text) + parser.finish(cut=cut):
        contents.append(delta.get("content", ""))
        thoughts.append(delta.get("reasoning_content", ""))
        for call in delta.get("tool_calls", ()):
            index = call["index"]
            if index in calls:
                calls[index]["function"]["arguments"] += call["function"]["arguments"]
            else:
                calls[index] = {key: value for key, value in call.items() if key != "index"}
    sound = [call for index, call in calls.items() if index not in parser.broken]
    content = "".join(contents)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not sound else None,
        "tool_calls": sound,
    }
    if parsing.reasoning is not None and parsing.show_reasoning:
        message["reasoning_content"] = "".join(thoughts) or None
    return message, bool(sound)

"""Parts a model's thoughts from its answer: the text up to `</think>`, while it streams.

Only at the beginning: what is marked later is content. Space around the thoughts goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BEGIN = "<think>"
END = "</think>"


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


def marks_reasoning(template: str) -> bool:
    """Whether a chat template knows thoughts."""
    return END in template


class ReasoningParser:
    """inside: the prompt ends within the thoughts. A state machine a character at a time, like
    `ToolCallParser`; behind the thoughts the text goes through as it is.
    """

    def __init__(self, *, inside: bool) -> None:
        self._state: Callable[[str], None] | None = self._inside if inside else self._at_start
        self._held = ""  # may become a mark
        self._space = ""  # goes if the thoughts end behind it
        self._thought = ""
        self._answer = ""
        self._empty = True

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer) that the text adds."""
        for i, char in enumerate(text):
            if self._state is None:
                self._answer += text[i:]
                break
            self._state(char)
        return self._taken()

    def finish(self) -> tuple[str, str]:
        if self._state == self._inside:
            self._thought += self._space + self._held
        else:
            self._answer += self._held
        self._state = None
        return self._taken()

    def _taken(self) -> tuple[str, str]:
        taken = self._thought, self._answer
        self._thought = self._answer = ""
        return taken

    def _at_start(self, char: str) -> None:
        self._held += char
        text = self._held.lstrip()
        if text == BEGIN:
            self._held, self._state = "", self._inside
        elif not BEGIN.startswith(text):
            self._answer, self._held, self._state = self._held, "", None

    def _inside(self, char: str) -> None:
        self._held += char
        while not END.startswith(self._held):
            self._think(self._held[0])
            self._held = self._held[1:]
        if self._held == END:
            self._held, self._state = "", self._behind

    def _think(self, char: str) -> None:
        if char.isspace():
            self._space += char
            return
        self._thought += char if self._empty else self._space + char
        self._space, self._empty = "", False

    def _behind(self, char: str) -> None:
        if not char.isspace():
            self._answer, self._state = char, None

"""How model families write tool calls, and which of these ways a chat template teaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

FormatName = Literal["hermes", "llama3", "mistral", "json"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """begin, end: marks around calls ("" = there is none). separators: between two calls.

    bare: an answer that begins with JSON is a call, too, if it names one of the request's tools.
    named: behind the mark may stand `name{...}` or `name[ARGS]{...}` instead of a JSON object.
    id_chars: of a call's id behind its prefix.
    """

    name: FormatName
    begin: str
    end: str = ""
    separators: str = ""
    bare: bool = False
    named: bool = False
    id_prefix: str = "call_"
    id_chars: int = 24


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")  # Hermes, Qwen 2.5 and 3
LLAMA3 = ToolFormat("llama3", "<|python_tag|>", separators=";,", bare=True)
# Mistral's templates refuse ids of any other length than nine.
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", named=True, id_prefix="", id_chars=9)
JSON = ToolFormat("json", "", separators=";,", bare=True)

FORMATS = {fmt.name: fmt for fmt in (HERMES, LLAMA3, MISTRAL, JSON)}
assert set(FORMATS) == set(get_args(FormatName))

_SIGNS = (("[TOOL_CALLS]", MISTRAL), ("<tool_call>", HERMES), ("<|python_tag|>", LLAMA3))


def find_format(
    chosen: FormatName | None, template: str, has_token: Callable[[str], bool]
) -> ToolFormat:
    """The format that was chosen, else the one whose mark the template writes, else the one whose
    mark is a token of its own, else plain JSON.
    """
    if chosen is not None:
        return FORMATS[chosen]
    for sign, fmt in _SIGNS:
        if sign in template:
            return fmt
    for sign, fmt in _SIGNS:
        if has_token(sign):
            return fmt
    return JSON


def knows_tools(template: str) -> bool:
    """Whether a chat template says anything about tools."""
    return "tools" in template

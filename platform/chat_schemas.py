"""The request body of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from loraplex.platform.openai_schemas import MAX_LOGPROBS, GenerationBody, TokenCount

MAX_TOOLS = 512
TEXT_PARTS = ("text", "input_text", "output_text")

ToolName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S+$")]


class ChatMessage(BaseModel):
    """Further fields go to the chat template as they are (name, tool_call_id, tool_calls...)."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[MessageToolCall] | None = None

    @field_validator("content")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        for index, part in enumerate(value if isinstance(value, list) else ()):
            if part.get("type", "text") not in TEXT_PARTS:
                kind = str(part["type"])[:80]
                raise ValueError(f"part {index} is of type {kind!r}; only text is supported")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part {index} has no text")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        return self

    @property
    def text(self) -> str:
        """Its content as text; parts without text count as nothing."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(part.get("text", "")) for part in self.content or ())


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: ToolName
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(BaseModel):
    """A call that the model made earlier."""

    model_config = ConfigDict(extra="allow")

    function: CalledFunction


class ToolFunction(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(BaseModel):
    name: ToolName


class NamedTool(BaseModel):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = Field(
        None, description="With continue_final_message: repeat what the answer goes on from."
    )
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = Field(
        None, description="false: leave the model's thoughts out of the answer."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _logprobs_first(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs=true")
        return value

    @field_validator("tools")
    @classmethod
    def _distinct(cls, value: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in value or ()]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two tools are named {twice!r}")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _one_of_the_tools(cls, value: Any, info: ValidationInfo) -> Any:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if value not in (None, "none") and not names:
            raise ValueError("tool_choice needs tools to choose from")
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise ValueError(f"no tool is named {value.function.name!r}")
        return value

    def unsupported(self) -> tuple[str, str] | None:
        if self.functions or self.function_call is not None:
            found = "functions" if self.functions else "function_call"
            return found, f"{found} was replaced by OpenAI; send tools and tool_choice"
        if self.modalities not in (None, [], ["text"]):
            return "modalities", "only text comes out of this model"
        return super().unsupported()

    @property
    def offered_tools(self) -> Sequence[Tool]:
        """Those the model may call now."""
        return () if self.tool_choice == "none" else self.tools or ()

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def requested_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

"""How an adapter wants to be used, where a request does not say otherwise.

Values of the request win over those set by PATCH, these over those that the adapter's files ship,
these over the base model's. Knows nothing of where they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loraplex.engine.api import Pooling
from loraplex.platform.chat.tool_formats import FormatName
from loraplex.platform.chat_schemas import ChatBody, ChatMessage
from loraplex.platform.openai_schemas import (
    GenerationBody,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TokenCount,
    TopK,
    TopP,
)

MAX_SYSTEM_PROMPT_CHARS = 1 << 17
MAX_TEMPLATE_CHARS = 1 << 18

Body = TypeVar("Body", bound=GenerationBody)

# Those that a body has under the same name and takes as they are.
_PLAIN = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop", "stop_token_ids"),
)


class AdapterDefaults(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    max_tokens: Annotated[TokenCount, Field(ge=1)] | None = None
    min_tokens: TokenCount | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokenIds | None = None
    system_prompt: (
        Annotated[str, Field(min_length=1, max_length=MAX_SYSTEM_PROMPT_CHARS)] | None
    ) = Field(None, description="Of chats that bring no system message of their own.")
    chat_template: Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE_CHARS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tool_format: FormatName | None = None
    pooling: Pooling | None = Field(None, description="Of embeddings.")

    @field_validator("stop", mode="before")
    @classmethod
    def _no_stop_is_none(cls, value: Any) -> Any:
        return None if value in ("", []) else value

    @classmethod
    def stored(cls, *layers: Mapping[str, Any] | None) -> AdapterDefaults:
        """From the registry; of several layers the first has the last word, field by field."""
        merged: dict[str, Any] = {}
        for layer in reversed(layers):
            merged |= layer or {}
        return cls.model_validate(merged) if merged else NO_DEFAULTS

    def stored_form(self) -> dict[str, Any] | None:
        """What the registry keeps; None = nothing is set."""
        return self.model_dump(exclude_none=True) or None

    def applied(self, body: Body) -> Body:
        """The body with what it leaves open."""
        if self is NO_DEFAULTS:
            return body
        changes = {
            name: value
            for name in _PLAIN
            if getattr(body, name) is None and (value := getattr(self, name)) is not None
        }
        longest = body.requested_max_tokens
        if longest is None and self.max_tokens is not None:
            changes["max_tokens"] = longest = self.max_tokens
        if body.min_tokens is None and self.min_tokens is not None:
            changes["min_tokens"] = (
                self.min_tokens if longest is None else min(self.min_tokens, longest)
            )
        if isinstance(body, ChatBody):
            changes |= self._of_chat(body)
        return body.model_copy(update=changes)

    def _of_chat(self, body: ChatBody) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if body.chat_template is None and self.chat_template is not None:
            changes["chat_template"] = self.chat_template
        if self.chat_template_kwargs is not None:
            given = body.chat_template_kwargs or {}
            changes["chat_template_kwargs"] = {**self.chat_template_kwargs, **given}
        brings_own = any(message.role in ("system", "developer") for message in body.messages)
        if self.system_prompt is not None and not brings_own:
            system = ChatMessage(role="system", content=self.system_prompt)
            changes["messages"] = [system, *body.messages]
        return changes


NO_DEFAULTS = AdapterDefaults.model_validate({})

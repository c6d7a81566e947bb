"""Texts to token ids and back, as a request with the same fields would have it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from loraplex.platform.callers import Caller
from loraplex.platform.chat_prompt import render_chat
from loraplex.platform.chat_schemas import MAX_TOOLS, ChatBody, ChatMessage, Tool
from loraplex.platform.composition import Composer
from loraplex.platform.openai_schemas import AdapterChoice, TokenId
from loraplex.platform.prompts import check_token_ids, encode_text
from loraplex.platform.resolution import Resolver
from loraplex.platform.served_model import ServedModel
from loraplex.platform.template_rules import check_may_bring_template


class TokenizeBody(AdapterChoice):
    """Either `prompt` or `messages`, as vLLM takes them."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default: true for a prompt, false for messages."
    )
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeBody(AdapterChoice):
    tokens: list[TokenId]


class TokenService:
    """tenant_templates: tenants may bring templates."""

    def __init__(self, resolver: Resolver, *, tenant_templates: bool = False) -> None:
        self._composer = Composer(resolver)
        self._tenant_templates = tenant_templates

    async def tokenize(
        self, body: TokenizeBody, model: ServedModel, caller: Caller
    ) -> dict[str, Any]:
        """Raises: ApiError."""
        _, composition = await self._composer.compose(body, model, caller, None)
        if body.messages is None:
            text, special, param = body.prompt or "", body.add_special_tokens is not False, "prompt"
        else:
            if body.chat_template is not None:
                check_may_bring_template(caller, self._tenant_templates, param="chat_template")
            chat = ChatBody.model_construct(
                messages=body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template=body.chat_template,
                chat_template_kwargs=body.chat_template_kwargs,
                tools=body.tools,
            )
            text = await render_chat(composition.defaults.applied(chat), model)
            special, param = bool(body.add_special_tokens), "messages"
        ids = (await encode_text(text, model, special, param=param)).token_ids if text else []
        strings = [model.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": model.info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    async def detokenize(
        self, body: DetokenizeBody, model: ServedModel, caller: Caller
    ) -> dict[str, Any]:
        """Raises: ApiError."""
        await self._composer.compose(body, model, caller, None)
        check_token_ids(body.tokens, model.info.vocab_size, "tokens")
        return {"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)}

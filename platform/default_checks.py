"""Whether an adapter's defaults work with the served model, before anybody relies on them."""

from __future__ import annotations

from loraplex.platform.adapter_defaults import AdapterDefaults
from loraplex.platform.chat_prompt import render_chat
from loraplex.platform.chat_schemas import ChatBody, ChatMessage
from loraplex.platform.errors import ApiError
from loraplex.platform.prompts import check_token_ids
from loraplex.platform.served_model import ServedModel

_PARAM = "defaults"


async def check_defaults(defaults: AdapterDefaults, model: ServedModel) -> None:
    """Try them on a chat of one message. Raises: ApiError(invalid_request) about `defaults`."""
    check_token_ids(defaults.stop_token_ids or (), model.info.vocab_size, _PARAM)
    if defaults.chat_template is None and defaults.system_prompt is None:
        return
    chat = ChatBody.model_construct(messages=[ChatMessage(role="user", content="Hello")])
    try:
        await render_chat(defaults.applied(chat), model)
    except ApiError as error:
        what = "system_prompt" if defaults.chat_template is None else "chat_template"
        raise ApiError(error.code, f"defaults.{what}: {error.message}", param=_PARAM) from None

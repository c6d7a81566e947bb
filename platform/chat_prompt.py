"""A chat as prompt text, and how its answer is to be read: both follow from the chat template."""

from __future__ import annotations

from typing import Any

from loraplex.engine.errors import InvalidRequest
from loraplex.platform.chat.parsing import Parsing
from loraplex.platform.chat.reasoning import BEGIN, END, marks_reasoning
from loraplex.platform.chat.tool_formats import FormatName, find_format, knows_tools
from loraplex.platform.chat_schemas import ChatBody
from loraplex.platform.errors import ApiError
from loraplex.platform.served_model import ServedModel
from loraplex.platform.template_rules import MAX_SECONDS, TookTooLong, within


async def render_chat(body: ChatBody, model: ServedModel) -> str:
    """Raises: ApiError(invalid_request)."""
    if body.chat_template is None:
        return _render(body, model)
    try:
        return await within(MAX_SECONDS, lambda: _render(body, model))
    except TookTooLong:
        raise ApiError(
            "invalid_request",
            f"the chat template takes more than {MAX_SECONDS:g} s for these messages",
            param="messages",
        ) from None


def _render(body: ChatBody, model: ServedModel) -> str:
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    continued = bool(body.continue_final_message)
    tools = [tool.model_dump(exclude_unset=True) for tool in body.offered_tools]
    template = _template(body, model)
    if tools and not knows_tools(template):
        raise ApiError(
            "unsupported_parameter",
            "this model's chat template says nothing of tools, so the model would not see them; "
            "send a chat_template that does, or set one for the adapter",
            param="tools",
        )
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    if "developer" not in template:  # OpenAI's new word for it
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    try:
        return model.chat_template.render(
            messages,
            tools=tools or None,
            documents=body.documents,
            add_generation_prompt=not continued
            if body.add_generation_prompt is None
            else body.add_generation_prompt,
            continue_final_message=continued,
            chat_template=body.chat_template,
            variables=variables,
        )
    except InvalidRequest as error:
        raise ApiError("invalid_request", error.message, param="messages") from None


def find_parsing(
    body: ChatBody,
    prompt: str,
    model: ServedModel,
    tool_format: FormatName | None,
    *,
    may_think: bool = True,
) -> Parsing | None:
    """What to look for in the answer. None: it is content as it is.

    tool_format: as configured, None = find out. may_think: a grammar covers the whole answer, and
    leaves no room for thoughts.
    """
    template = _template(body, model)
    reasoning = None
    if may_think and marks_reasoning(template) and not body.continue_final_message:
        end = prompt.rstrip()
        if not end.endswith(END):  # there the template says: no thoughts this time
            reasoning = end.endswith(BEGIN)
    tools = body.offered_tools
    if reasoning is None and not tools:
        return None
    raw = model.tokenizer.raw
    return Parsing(
        reasoning=reasoning,
        show_reasoning=body.include_reasoning is not False,
        tool_format=find_format(
            tool_format, template, lambda mark: raw.token_to_id(mark) is not None
        )
        if tools
        else None,
        tool_names=frozenset(tool.function.name for tool in tools),
        parallel=body.parallel_tool_calls is not False,
    )


def marks_are_special(parsing: Parsing, model: ServedModel) -> bool:
    """Whether a mark is a token that is usually left out of the text."""
    marks = [] if parsing.reasoning is None else [BEGIN, END]
    if parsing.tool_format is not None and parsing.tool_format.begin:
        marks.append(parsing.tool_format.begin)
    ids = (model.tokenizer.raw.token_to_id(mark) for mark in marks)
    return any(token_id in model.tokenizer.special_ids for token_id in ids)


def _template(body: ChatBody, model: ServedModel) -> str:
    return body.chat_template or model.chat_template.source or ""

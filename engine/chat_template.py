"""Chat messages to prompt text by the model's Jinja template, as transformers'
`apply_chat_template` does it.

Templates come with models and may come with requests: both are untrusted, so they run in Jinja's
immutable sandbox, see plain data only, and their size and output are bounded. Their running time is
not: whoever lets clients send templates should trust those clients. It knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from loraplex.engine.api import ModelInfo
from loraplex.engine.errors import InvalidRequest

Message = Mapping[str, Any]

MAX_TEMPLATE_CHARS = 1 << 18
MAX_PROMPT_CHARS = 1 << 24

# Ends in a space: a template that trims the content shows it by trimming that.
_CONTINUE_MARK = "\ue000continue-here\ue000 "


class ChatTemplate:
    """The chat format of one model; `source` is None when the model has none."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_info(cls, info: ModelInfo) -> ChatTemplate:
        return cls(info.chat_template, info.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, with the special tokens that the template writes: encode it with
        `add_special_tokens=False`.

        `messages`, `tools` and `documents` are plain JSON values in OpenAI's form; content parts
        are flattened to text and the arguments of tool calls, a JSON string in that form, become
        objects. `continue_final_message` ends the prompt inside the last message, so that the model
        goes on with it. `chat_template` replaces the model's own; `variables` are further names for
        the template.

        Raises: InvalidRequest when there is no template, it refuses the messages or fails, or the
        prompt is too big.
        """
        source = chat_template or self.source
        if source is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions or pass chat_template"
            )
        if not messages:
            raise InvalidRequest("messages is empty; a chat needs at least one message")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; "
                "set one of them to false"
            )
        chat = [_plain_message(i, message) for i, message in enumerate(messages)]
        if continue_final_message:
            if not chat[-1].get("content"):
                raise InvalidRequest(
                    "continue_final_message needs a final message with some content"
                )
            chat[-1]["content"] += _CONTINUE_MARK
        prompt = _render(
            source,
            {
                **self._special_tokens,
                **(variables or {}),
                "messages": chat,
                "tools": None if tools is None else list(tools),
                "documents": None if documents is None else list(documents),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut(prompt) if continue_final_message else prompt


def _plain_message(index: int, message: Message) -> dict[str, Any]:
    """Absent and None are the same to OpenAI, but not to templates, which print None: drop it."""
    plain = {key: value for key, value in message.items() if value is not None}
    if "role" not in plain:
        raise InvalidRequest(f"messages[{index}] has no role")
    if "content" in plain:
        plain["content"] = _flatten(index, plain["content"])
    if "tool_calls" in plain:
        plain["tool_calls"] = [_plain_tool_call(call) for call in plain["tool_calls"]]
    return plain


def _flatten(index: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(
                f"messages[{index}] has a content part of type {part.get('type')!r}; "
                "only text is supported"
            )
        texts.append(text)
    return "\n".join(texts)


def _plain_tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return dict(call)  # a model's broken JSON, sent back as it was
    return {**call, "function": {**function, "arguments": arguments}}


def _cut(prompt: str) -> str:
    """The prompt up to the mark; where the template trims, up to the last character that stays."""
    before, mark, after = prompt.rpartition(_CONTINUE_MARK.rstrip())
    if not mark:
        raise InvalidRequest(
            "continue_final_message: the chat template leaves out the final message's content"
        )
    return before if after.startswith(" ") else before.rstrip()


def _render(source: str, variables: dict[str, Any]) -> str:
    blocks: list[str] = []
    size = 0
    try:
        for block in _compile(source).generate(variables):
            size += len(block)
            if size > MAX_PROMPT_CHARS:
                raise InvalidRequest(
                    f"the chat template writes more than {MAX_PROMPT_CHARS} characters"
                )
            blocks.append(block)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequest(
            f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
        ) from None
    except jinja2.TemplateError as error:  # also raise_exception(), the template's own refusal
        raise InvalidRequest(f"the chat template refused the messages: {error}") from None
    except InvalidRequest:
        raise
    except Exception as error:  # whatever an expression of the template can raise
        raise InvalidRequest(f"the chat template failed: {type(error).__name__}: {error}") from None
    return "".join(blocks)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise InvalidRequest(
            f"the chat template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}"
        )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own type

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and sorts keys; models were trained on plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)

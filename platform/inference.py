"""From a checked body to a running generation: which adapters, which tokens, which sampling.

One path for both routes. Nothing of the database is held once `prepare_*` returned.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loraplex.engine.api import GenerationRequest
from loraplex.platform.bad_words import ban
from loraplex.platform.callers import Caller
from loraplex.platform.chat.parsing import Parsing
from loraplex.platform.chat.tool_formats import FormatName
from loraplex.platform.chat_prompt import find_parsing, marks_are_special, render_chat
from loraplex.platform.chat_schemas import ChatBody
from loraplex.platform.composition import Composer, Composition
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.errors import ApiError
from loraplex.platform.forced_tools import forced_tools
from loraplex.platform.generation import Choice, Generation, TextOptions
from loraplex.platform.openai_format import Answer, Kind
from loraplex.platform.openai_schemas import MAX_CHOICES, CompletionBody, GenerationBody
from loraplex.platform.prompts import Prompt, check_token_ids, encode_prompts, encode_text, fit
from loraplex.platform.resolution import Resolver
from loraplex.platform.served_model import ServedModel
from loraplex.platform.structured import Structured, structured_output
from loraplex.platform.template_rules import check_may_bring_template


@dataclass(frozen=True, slots=True)
class Prepared:
    """A generation ready to run, for whom, and how to write what comes of it."""

    caller: Caller
    answer: Answer
    generation: Generation
    composition: Composition
    stream: bool
    num_choices_asked: int
    max_tokens_asked: int | None
    grammar_param: str | None = None  # the field that asks for a structured output


class InferenceService:
    """tool_format: how the model writes tool calls; None = by its chat template.
    tenant_templates: tenants may bring templates.
    """

    def __init__(
        self,
        engine: EnginePort,
        resolver: Resolver,
        tool_format: FormatName | None = None,
        *,
        tenant_templates: bool = False,
    ) -> None:
        self._tenant_templates = tenant_templates
        self._engine = engine
        self._composer = Composer(resolver)
        self._tool_format = tool_format

    async def prepare_completion(
        self,
        body: CompletionBody,
        model: ServedModel,
        caller: Caller,
        sticky_key: str | None = None,
    ) -> Prepared:
        """Raises: ApiError, InvalidRequest."""
        _refuse_unsupported(body)
        name, composition = await self._composer.compose(body, model, caller, sticky_key)
        body = composition.defaults.applied(body)
        add_special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = [
            fit(prompt, body.truncate_prompt_tokens, model, "prompt")
            for prompt in await encode_prompts(body.prompt, model, add_special)
        ]
        discard_output = bool(body.echo) and body.max_tokens == 0
        if body.max_tokens == 0 and not discard_output:
            raise ApiError("invalid_request", "max_tokens must be at least 1", param="max_tokens")
        echo: tuple[str, ...] = ()
        if body.echo:
            texts = [
                prompt.text if prompt.text is not None else model.tokenizer.decode(prompt.token_ids)
                for prompt in prompts
            ]
            echo = tuple(text for text in texts for _ in range(body.num_sampled))
        return self._prepared(
            "completion",
            body,
            model,
            caller,
            name,
            composition,
            prompts,
            echo=echo,
            discard_output=discard_output,
            structured=structured_output(body),
        )

    async def prepare_chat(
        self,
        body: ChatBody,
        model: ServedModel,
        caller: Caller,
        sticky_key: str | None = None,
    ) -> Prepared:
        """Raises: ApiError, InvalidRequest."""
        _refuse_unsupported(body)
        if body.requested_max_tokens == 0:
            raise ApiError("invalid_request", "max_tokens must be at least 1", param="max_tokens")
        if body.chat_template is not None:
            check_may_bring_template(caller, self._tenant_templates, param="chat_template")
        name, composition = await self._composer.compose(body, model, caller, sticky_key)
        body = composition.defaults.applied(body)
        text = await render_chat(body, model)
        prompt = await encode_text(text, model, bool(body.add_special_tokens), param="messages")
        prompt = fit(prompt, body.truncate_prompt_tokens, model, "messages")
        echo: tuple[str, ...] = ()
        if body.echo and body.continue_final_message:
            echo = (body.messages[-1].text,) * body.num_choices
        structured = structured_output(body)
        forced = forced_tools(body)
        if forced is not None and structured is not None:
            raise ApiError(
                "invalid_request",
                f"tool_choice asks for calls and {structured.param} for something else; send one "
                "of them",
                param="tool_choice",
            )
        chosen = composition.defaults.tool_format or self._tool_format
        structured = structured or forced
        parsing = find_parsing(
            body,
            text,
            model,
            chosen if forced is None else "json",
            may_think=structured is None,
        )
        return self._prepared(
            "chat",
            body,
            model,
            caller,
            name,
            composition,
            [prompt],
            echo=echo,
            parsing=parsing,
            structured=structured,
        )

    def _prepared(
        self,
        kind: Kind,
        body: GenerationBody,
        model: ServedModel,
        caller: Caller,
        name: str,
        composition: Composition,
        prompts: Sequence[Prompt],
        *,
        echo: tuple[str, ...] = (),
        discard_output: bool = False,
        parsing: Parsing | None = None,
        structured: Structured | None = None,
    ) -> Prepared:
        num_choices = body.num_sampled
        if len(prompts) * num_choices > MAX_CHOICES:
            asked = "n" if num_choices == body.num_choices else "best_of"
            raise ApiError(
                "invalid_request",
                f"{len(prompts)} prompts x {asked}={num_choices} exceed {MAX_CHOICES} choices; "
                "send fewer at once",
                param=asked,
            )
        _check_token_lists(body, model.info.vocab_size)
        composition = composition.in_prompts([prompt.token_ids for prompt in prompts])
        banned: dict[int, float] = {}
        if body.bad_words:
            bad = ban(body.bad_words, model)
            if bad.structured is not None and structured is not None:
                raise ApiError(
                    "unsupported_parameter",
                    f"bad_words of several tokens do not go together with {structured.param}",
                    param="bad_words",
                )
            banned, structured = bad.bias, structured or bad.structured
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        answer_id = f"{prefix}-{body.request_id or uuid.uuid4().hex}"
        show_special = body.skip_special_tokens is False
        if parsing is not None:
            show_special = show_special or marks_are_special(parsing, model)
        options = TextOptions(
            stop=body.stop_strings,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=not show_special,
            keep_empty=body.requested_logprobs is not None or bool(body.return_token_ids),
        )
        is_scored = num_choices > body.num_choices  # log-probabilities tell the best
        wants_prompt_logprobs = (
            kind == "completion" and bool(echo) and body.requested_logprobs is not None
        )
        choices = []
        for i in range(num_choices):
            sampling = body.sampling(model.info.generation_defaults, choice=i)
            if wants_prompt_logprobs:
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=sampling.logprobs)
            if discard_output:
                sampling = msgspec.structs.replace(sampling, max_tokens=1)
            if is_scored and sampling.logprobs is None:
                sampling = msgspec.structs.replace(sampling, logprobs=0)
            if structured is not None:
                sampling = msgspec.structs.replace(sampling, grammar=structured.grammar)
            if banned:
                bias = {**sampling.logit_bias, **banned}
                sampling = msgspec.structs.replace(sampling, logit_bias=bias)
            for p, prompt in enumerate(prompts):
                index = p * num_choices + i
                request = GenerationRequest(
                    request_id=f"{answer_id}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=sampling,
                    adapters=composition.uses(),
                    cache_salt=caller.cache_salt(body.cache_salt or ""),
                    priority=caller.priority(body.priority or 0),
                    tenant=caller.billed,
                    share=caller.share,
                )
                choices.append(Choice(index, request, options))
        choices.sort(key=lambda choice: choice.index)
        stream = body.stream_options
        answer = Answer(
            kind=kind,
            id=answer_id,
            model=name,
            created=int(time.time()),
            adapters=composition.objects(),
            tokenizer=model.tokenizer,
            include_usage=stream is not None and stream.include_usage,
            continuous_usage=stream is not None and stream.continuous_usage_stats,
            with_token_ids=bool(body.return_token_ids),
            ids_as_tokens=bool(body.return_tokens_as_token_ids),
            echo=echo,
            discard_output=discard_output,
            with_logprobs=body.requested_logprobs is not None,
            num_best=body.num_choices if is_scored else None,
            parsing=parsing,
        )
        return Prepared(
            caller,
            answer,
            Generation(self._engine, choices),
            composition,
            bool(body.stream),
            body.num_choices,
            body.requested_max_tokens,
            None if structured is None else structured.param,
        )


def _check_token_lists(body: GenerationBody, vocab_size: int) -> None:
    named: Mapping[str, Any] = {
        "logit_bias": body.logit_bias,
        "allowed_token_ids": body.allowed_token_ids,
        "stop_token_ids": body.stop_token_ids,
    }
    for param, ids in named.items():
        if ids:
            check_token_ids(list(ids), vocab_size, param)


def _refuse_unsupported(body: GenerationBody) -> None:
    found = body.unsupported()
    if found is not None:
        raise ApiError("unsupported_parameter", found[1], param=found[0])

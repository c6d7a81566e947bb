"""From a checked body to a running generation: which adapters, which tokens, which sampling.

One path for both routes. Nothing of the database is held once `prepare_*` returned.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loraplex.engine.api import AdapterUse, GenerationRequest
from loraplex.engine.errors import InvalidRequest
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.errors import ApiError
from loraplex.platform.generation import Choice, Generation, TextOptions
from loraplex.platform.openai_format import Answer, Kind
from loraplex.platform.openai_schemas import MAX_CHOICES, ChatBody, CompletionBody, GenerationBody
from loraplex.platform.resolution import ResolvedAdapter, Resolver
from loraplex.platform.served_model import ServedModel

# Longer texts are tokenised in a worker thread (the library releases the GIL), so that streams do
# not stall. ~1 us per character: 16k characters are about 15 ms.
INLINE_CHARS = 16_384


@dataclass(frozen=True, slots=True)
class Composition:
    """The adapters of one request, in order, with their weights."""

    members: tuple[tuple[ResolvedAdapter, float], ...] = ()

    def uses(self) -> tuple[AdapterUse, ...]:
        return tuple(AdapterUse(adapter.digest, weight) for adapter, weight in self.members)

    def objects(self) -> tuple[dict[str, Any], ...]:
        objects = []
        for adapter, weight in self.members:
            item: dict[str, Any] = {
                "id": adapter.name,
                "version": adapter.version,
                "digest": f"sha256:{adapter.digest}",
            }
            if len(self.members) > 1:
                item["weight"] = weight
            objects.append(item)
        return tuple(objects)

    def headers(self) -> dict[str, str]:
        if not self.members:
            return {}
        return {
            "x-adapter-version": ",".join(adapter.reference for adapter, _ in self.members),
            "x-adapter-digest": ",".join(f"sha256:{adapter.digest}" for adapter, _ in self.members),
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """A generation ready to run, and how to write what comes of it."""

    answer: Answer
    generation: Generation
    composition: Composition
    stream: bool
    num_choices_asked: int
    max_tokens_asked: int | None


class InferenceService:
    def __init__(self, engine: EnginePort, resolver: Resolver) -> None:
        self._engine = engine
        self._resolver = resolver

    async def prepare_completion(
        self, body: CompletionBody, model: ServedModel, sticky_key: str | None = None
    ) -> Prepared:
        """Raises: ApiError, InvalidRequest."""
        _refuse_unsupported(body)
        name, composition = await self._composition(body, model, sticky_key)
        add_special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = await _encode_prompts(body.prompt, model, add_special)
        discard_output = bool(body.echo) and body.max_tokens == 0
        if body.max_tokens == 0 and not discard_output:
            raise ApiError("invalid_request", "max_tokens must be at least 1", param="max_tokens")
        echo: tuple[str, ...] = ()
        if body.echo:
            texts = [
                prompt.text if prompt.text is not None else model.tokenizer.decode(prompt.token_ids)
                for prompt in prompts
            ]
            echo = tuple(text for text in texts for _ in range(body.num_choices))
        return self._prepared(
            "completion", body, model, name, composition, prompts, echo, discard_output
        )

    async def prepare_chat(
        self, body: ChatBody, model: ServedModel, sticky_key: str | None = None
    ) -> Prepared:
        """Raises: ApiError, InvalidRequest."""
        _refuse_unsupported(body)
        if body.requested_max_tokens == 0:
            raise ApiError("invalid_request", "max_tokens must be at least 1", param="max_tokens")
        name, composition = await self._composition(body, model, sticky_key)
        if body.chat_template is None:
            text = _render(body, model)
        else:  # a client's own template may be slow
            text = await asyncio.to_thread(_render, body, model)
        prompt = await _encode_text(text, model, bool(body.add_special_tokens), param="messages")
        return self._prepared("chat", body, model, name, composition, [prompt], (), False)

    def _prepared(
        self,
        kind: Kind,
        body: GenerationBody,
        model: ServedModel,
        name: str,
        composition: Composition,
        prompts: Sequence[_Prompt],
        echo: tuple[str, ...],
        discard_output: bool,
    ) -> Prepared:
        num_choices = body.num_choices
        if len(prompts) * num_choices > MAX_CHOICES:
            raise ApiError(
                "invalid_request",
                f"{len(prompts)} prompts x n={num_choices} exceed {MAX_CHOICES} choices; "
                "send fewer at once",
                param="n",
            )
        param = "prompt" if kind == "completion" else "messages"
        prompts = [_fit(prompt, body, model, param) for prompt in prompts]
        _check_token_ids(body, model.info.vocab_size)
        answer_id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        options = TextOptions(
            stop=body.stop_strings,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            keep_empty=body.requested_logprobs is not None or bool(body.return_token_ids),
        )
        wants_prompt_logprobs = bool(echo) and body.requested_logprobs is not None
        choices = []
        for i in range(num_choices):
            sampling = body.sampling(model.info.generation_defaults, choice=i)
            if wants_prompt_logprobs:
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=sampling.logprobs)
            if discard_output:
                sampling = msgspec.structs.replace(sampling, max_tokens=1)
            for p, prompt in enumerate(prompts):
                index = p * num_choices + i
                request = GenerationRequest(
                    request_id=f"{answer_id}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=sampling,
                    adapters=composition.uses(),
                    cache_salt=body.cache_salt or "",
                    priority=body.priority or 0,
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
        )
        return Prepared(
            answer,
            Generation(self._engine, choices),
            composition,
            bool(body.stream),
            num_choices,
            body.requested_max_tokens,
        )

    async def _composition(
        self, body: GenerationBody, model: ServedModel, sticky_key: str | None
    ) -> tuple[str, Composition]:
        """The model name to answer with, and the adapters that `model`, `adapter_id` and `adapters`
        mean together. What they mean is decided here, once for the whole request.
        """
        key = sticky_key or body.user or uuid.uuid4().hex
        by_model = None
        if body.model and body.model not in (model.name, model.info.name):
            by_model = await self._by_model(body.model, key)
        if body.adapters:
            members = [(item.id, item.weight) for item in body.adapters]
            param = "adapters"
        else:
            members = [(body.adapter_id, 1.0)] if body.adapter_id else []
            param = "adapter_id"
        resolved = [
            (await self._resolver.choose(text, key, param=param), weight)
            for text, weight in members
        ]
        if by_model is not None:
            if resolved and [adapter.digest for adapter, _ in resolved] != [by_model.digest]:
                raise ApiError(
                    "invalid_request",
                    f"model names adapter {body.model!r} and {param} another one; send one of them",
                    param=param,
                )
            resolved = resolved or [(by_model, 1.0)]
        digests = [adapter.digest for adapter, _ in resolved]
        if len(set(digests)) != len(digests):
            raise ApiError(
                "invalid_request",
                "the composition names one adapter twice; add up its weights",
                param="adapters",
            )
        return body.model or model.name, Composition(tuple(resolved))

    async def _by_model(self, text: str, key: str) -> ResolvedAdapter:
        try:
            return await self._resolver.choose(text, key, param="model")
        except ApiError as error:
            if error.code == "adapter_not_found" and not set(text) & {"@", ":"}:
                raise ApiError(
                    "model_not_found",
                    f"there is no model or adapter {text[:140]!r}; GET /v1/models lists them",
                    param="model",
                ) from None
            raise


@dataclass(frozen=True, slots=True)
class _Prompt:
    token_ids: list[int]
    text: str | None  # None when the client sent ids


async def _encode_prompts(
    prompt: str | list[int] | list[list[int]] | list[str], model: ServedModel, add_special: bool
) -> list[_Prompt]:
    if isinstance(prompt, str):
        return [await _encode_text(prompt, model, add_special)]
    if not prompt:
        raise ApiError(
            "invalid_request", "prompt is empty; send text or at least one token id", param="prompt"
        )
    if isinstance(prompt[0], int):
        return [_from_ids(prompt, model)]
    return [
        await _encode_text(item, model, add_special)
        if isinstance(item, str)
        else _from_ids(item, model)
        for item in prompt
    ]


async def _encode_text(
    text: str, model: ServedModel, add_special: bool, *, param: str = "prompt"
) -> _Prompt:
    def run() -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=add_special)

    try:
        ids = run() if len(text) <= INLINE_CHARS else await asyncio.to_thread(run)
    except InvalidRequest as error:
        raise ApiError("invalid_request", error.message, param=param) from None
    if not ids:
        raise ApiError("invalid_request", f"{param} has no tokens", param=param)
    return _Prompt(ids, text)


def _from_ids(ids: Sequence[int], model: ServedModel) -> _Prompt:
    if not ids:
        raise ApiError("invalid_request", "prompt has no tokens", param="prompt")
    _check_ids(ids, model.info.vocab_size, "prompt")
    return _Prompt(list(ids), None)


def _render(body: ChatBody, model: ServedModel) -> str:
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    continued = bool(body.continue_final_message)
    try:
        return model.chat_template.render(
            [message.model_dump(exclude_unset=True) for message in body.messages],
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


def _fit(prompt: _Prompt, body: GenerationBody, model: ServedModel, param: str) -> _Prompt:
    """The prompt, cut to `truncate_prompt_tokens`; a token of output must fit behind it."""
    if body.truncate_prompt_tokens is not None:
        prompt = _Prompt(prompt.token_ids[-body.truncate_prompt_tokens :], prompt.text)
    longest = model.info.max_model_len - 1
    if len(prompt.token_ids) > longest:
        raise ApiError(
            "context_length_exceeded",
            f"the prompt has {len(prompt.token_ids)} tokens, this model takes {longest} "
            f"and one of output (max_model_len {longest + 1}); shorten it "
            "or set truncate_prompt_tokens",
            param=param,
        )
    return prompt


def _check_token_ids(body: GenerationBody, vocab_size: int) -> None:
    named: Mapping[str, Any] = {
        "logit_bias": body.logit_bias,
        "allowed_token_ids": body.allowed_token_ids,
        "stop_token_ids": body.stop_token_ids,
    }
    for param, ids in named.items():
        if ids:
            _check_ids(list(ids), vocab_size, param)


def _check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ApiError(
            "invalid_request",
            f"{param} has token id {wrong}; this model's ids are 0 to {vocab_size - 1}",
            param=param,
        )


def _refuse_unsupported(body: GenerationBody) -> None:
    found = body.unsupported()
    if found is not None:
        raise ApiError("unsupported_parameter", found[1], param=found[0])

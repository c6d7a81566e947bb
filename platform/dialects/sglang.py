"""SGLang's `/generate`: `text` or `input_ids`, `sampling_params`, `lora_path`."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from loraplex.engine.api import FinishReason, TokenLogprobs
from loraplex.engine.stream import TextChunk
from loraplex.platform import errors
from loraplex.platform.callers import Caller
from loraplex.platform.dialects.tgi_schemas import converted
from loraplex.platform.errors import ApiError
from loraplex.platform.generation import Choice
from loraplex.platform.inference import Prepared
from loraplex.platform.openai_format import DONE, encode
from loraplex.platform.openai_schemas import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    CompletionBody,
    Seed,
    StopString,
    TokenId,
)
from loraplex.platform.responses import EventWriter, GenerationResponse, OnEnd
from loraplex.platform.runtime import Runtime
from loraplex.platform.served_model import ServedModel


class SamplingParams(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    max_new_tokens: Annotated[int, Field(ge=1)] | None = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    sampling_seed: Seed | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None


class GenerateBody(BaseModel):
    model_config = ConfigDict(extra="ignore")

    text: str | list[str] | None = None
    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    lora_path: str | list[str | None] | None = Field(
        None, description="An adapter; a list has the same one for every prompt."
    )
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    rid: str | None = None
    image_data: Any = None
    input_embeds: Any = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateBody:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("send either text or input_ids")
        return self

    @property
    def is_batch(self) -> bool:
        prompt = self.text if self.input_ids is None else self.input_ids
        return isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))

    def as_completion(self) -> CompletionBody:
        """The same request in our terms. Raises: ApiError."""
        p = self.sampling_params
        for name in ("image_data", "input_embeds"):
            if getattr(self, name) is not None:
                raise ApiError("unsupported_parameter", f"{name} is not supported", param=name)
        structured = {
            "json": p.json_schema,
            "regex": p.regex,
            "grammar": p.ebnf,
            "structural_tag": p.structural_tag,
        }
        return converted(
            {
                "prompt": self.text if self.input_ids is None else self.input_ids,
                "stream": self.stream,
                "adapter_id": self._adapter(),
                "max_tokens": p.max_new_tokens,
                "min_tokens": p.min_new_tokens,
                "temperature": p.temperature,
                "top_p": p.top_p,
                "top_k": p.top_k,
                "min_p": p.min_p,
                "frequency_penalty": p.frequency_penalty,
                "presence_penalty": p.presence_penalty,
                "repetition_penalty": p.repetition_penalty,
                "stop": p.stop,
                "stop_token_ids": p.stop_token_ids,
                "ignore_eos": p.ignore_eos,
                "include_stop_str_in_output": p.no_stop_trim,
                "skip_special_tokens": p.skip_special_tokens,
                "n": p.n,
                "seed": p.sampling_seed,
                "logprobs": self.top_logprobs_num if self.return_logprob else None,
                "structured_outputs": structured if any(structured.values()) else None,
                "request_id": self.rid,
            }
        )

    def _adapter(self) -> str | None:
        if not isinstance(self.lora_path, list):
            return self.lora_path or None
        if len(set(self.lora_path)) > 1:
            raise ApiError(
                "unsupported_parameter",
                "lora_path names different adapters for the prompts of one call; send a call for "
                "each, they share the steps all the same",
                param="lora_path",
            )
        return self.lora_path[0] if self.lora_path else None


async def respond(body: GenerateBody, state: Runtime, who: Caller) -> Response:
    model = state.served_model()
    prepared = await state.inference.prepare_completion(body.as_completion(), model, who)
    return SglangResponse(prepared, state.generation_ended, body, model)


class _Output:
    """One choice, as it grows."""

    def __init__(self, prepared: Prepared, choice: Choice, model: ServedModel) -> None:
        self._prepared = prepared
        self._choice = choice
        self._model = model
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish: dict[str, Any] | None = None

    def add(self, chunk: TextChunk) -> None:
        self._text += chunk.text
        self._token_ids += chunk.token_ids
        self._logprobs += chunk.logprobs or ()
        match chunk.finish_reason:
            case FinishReason.LENGTH:
                self._finish = {"type": "length", "length": len(self._token_ids)}
            case FinishReason.STOP:
                matched = chunk.stop_reason
                self._finish = {
                    "type": "stop",
                    "matched": self._token_ids[-1] if matched is None else matched,
                }
            case FinishReason.ABORT:
                self._finish = {"type": "abort", "message": "cancelled"}

    def write(self) -> dict[str, Any]:
        request = self._choice.request
        meta: dict[str, Any] = {
            "id": request.request_id,
            "finish_reason": self._finish,
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": len(self._token_ids),
            "cached_tokens": self._choice.num_cached_tokens,
            "e2e_latency": time.perf_counter() - self._prepared.generation.timing.started,
            **self._prepared.answer.adapter_fields(),
        }
        if request.sampling.logprobs is not None:
            text = self._model.tokenizer.token_text
            meta["output_token_logprobs"] = [
                [entry.logprob, entry.token_id, text(entry.token_id)] for entry in self._logprobs
            ]
            meta["output_top_logprobs"] = [
                [
                    [logprob, i, text(i)]
                    for i, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                ]
                for entry in self._logprobs
            ]
        return {"text": self._text, "output_ids": self._token_ids, "meta_info": meta}


class SglangResponse(GenerationResponse):
    def __init__(
        self, prepared: Prepared, on_end: OnEnd, body: GenerateBody, model: ServedModel
    ) -> None:
        super().__init__(prepared, on_end)
        choices = prepared.generation.choices
        self._outputs = [_Output(prepared, choice, model) for choice in choices]
        self._as_list = body.is_batch or len(choices) > 1

    def _writer(self) -> EventWriter:
        return _SglangWriter(self._outputs, with_index=self._as_list)

    async def _answer(self) -> Any:
        async with aclosing(self._prepared.generation.deltas()) as deltas:
            async for index, chunk in deltas:
                self._outputs[index].add(chunk)
        written = [output.write() for output in self._outputs]
        return written if self._as_list else written[0]


class _SglangWriter:
    """Each event has all of its choice's text so far."""

    def __init__(self, outputs: list[_Output], *, with_index: bool) -> None:
        self._outputs = outputs
        self._with_index = with_index

    def chunk(self, index: int, chunk: TextChunk) -> bytes:
        output = self._outputs[index]
        output.add(chunk)
        written = output.write()
        if self._with_index:
            written["index"] = index
        return b"data: " + encode(written) + b"\n\n"

    def last(self) -> bytes:
        return DONE

    def error(self, status: int, code: str, message: str) -> bytes:
        return b"data: " + encode(errors.body(status, code, message)) + b"\n\n"

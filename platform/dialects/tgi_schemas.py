"""Request bodies of LoRAX and of TGI (text-generation-inference), whose form LoRAX took.

Unknown parameters are ignored, as there; what this server cannot do is refused by name.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loraplex.platform.errors import ApiError
from loraplex.platform.openai_schemas import (
    MAX_ADAPTERS,
    MAX_LOGPROBS,
    AdapterWeight,
    CompletionBody,
    StopString,
)

MAX_BEST_OF = 16


class MergedAdapters(BaseModel):
    """Several adapters at once: the sum of their deltas by weight, applied at run time."""

    ids: Annotated[list[str], Field(min_length=1, max_length=MAX_ADAPTERS)]
    weights: list[Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]]
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: float | None = None
    majority_sign_method: str | None = None

    @field_validator("merge_strategy")
    @classmethod
    def _linear_only(cls, value: str | None) -> str | None:
        if value not in (None, "linear"):
            raise ValueError(
                f"{value} is not supported; adapters are combined linearly at run time, or merge "
                "them yourself and upload the result"
            )
        return value


class ResponseFormat(BaseModel):
    type: str
    schema_: Any = Field(None, alias="schema")


class Grammar(BaseModel):
    type: Literal["json", "regex", "json_schema"]
    value: Any


class Parameters(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    adapter_id: str | None = None
    adapter_source: Literal["hub", "local", "s3", "pbase"] | None = Field(
        None, description="Adapters come from the registry, whatever it says."
    )
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = Field(None, description="Not used: a request never downloads.")
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    do_sample: bool = False
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Default: as many as the context holds."
    )
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: Annotated[list[StopString], Field(max_length=64)] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: Annotated[int, Field(ge=1, le=MAX_LOGPROBS)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    apply_chat_template: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    response_format: ResponseFormat | None = None
    grammar: Grammar | None = None

    @property
    def samples(self) -> bool:
        """As TGI: also without `do_sample` when a field that makes sense only then is set."""
        if self.temperature == 0:
            return False
        return (
            self.do_sample
            or self.temperature not in (None, 1)
            or bool(self.top_k)
            or self.top_p not in (None, 1)
        )


class GenerateBody(BaseModel):
    """Of `/generate`, `/generate_stream` and `/`."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters = Parameters.model_validate({})
    stream: bool = False

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_none(cls, value: Any) -> Any:
        return {} if value is None else value


def completion_body(body: GenerateBody) -> CompletionBody:
    """The same request in our terms. Raises: ApiError(invalid_request | unsupported_parameter)."""
    p = body.parameters
    _refuse_unsupported(p, body.stream)
    samples = p.samples
    return converted(
        {
            "prompt": body.inputs,
            "stream": body.stream,
            "adapter_id": p.adapter_id or None,
            "adapters": _members(p.merged_adapters),
            "max_tokens": p.max_new_tokens,
            "temperature": (1.0 if p.temperature is None else p.temperature) if samples else 0.0,
            "top_k": p.top_k or 0,
            "top_p": 1.0 if p.top_p is None else p.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0 if p.repetition_penalty is None else p.repetition_penalty,
            "frequency_penalty": p.frequency_penalty,
            "presence_penalty": p.presence_penalty,
            # Told in the details, so that the answer can be had again.
            "seed": secrets.randbits(62) if samples and p.seed is None else p.seed,
            "n": p.best_of,
            "stop": p.stop or None,
            "include_stop_str_in_output": bool(p.stop),
            "ignore_eos": p.ignore_eos_token,
            "truncate_prompt_tokens": p.truncate,
            "logprobs": p.return_k_alternatives or p.top_n_tokens or 0,
            "prompt_logprobs": 0 if p.decoder_input_details else None,
            "response_format": None if p.response_format is None else _format(p.response_format),
            "structured_outputs": None if p.grammar is None else _grammar(p.grammar),
        }
    )


class UnboundedBody(CompletionBody):
    """Without `max_tokens` it goes on as far as the context reaches."""

    default_max_tokens: ClassVar[int | None] = None


def converted(fields: dict[str, Any]) -> CompletionBody:
    """Raises: ApiError(invalid_request) for what only our own form forbids."""
    try:
        return UnboundedBody.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"])
        raise _wrong(param, str(problem["msg"])) from None


def _refuse_unsupported(p: Parameters, stream: bool) -> None:
    if p.typical_p not in (None, 1):
        raise _unsupported("typical_p", "is not supported; use top_p or min_p of /v1/completions")
    if p.watermark:
        raise _unsupported("watermark", "is not supported")
    if p.apply_chat_template:
        raise _unsupported("apply_chat_template", "is not supported; use /v1/chat/completions")
    if p.adapter_id and p.merged_adapters is not None:
        raise _wrong("merged_adapters", "and adapter_id exclude each other; send one of them")
    if p.merged_adapters and len(p.merged_adapters.ids) != len(p.merged_adapters.weights):
        raise _wrong("merged_adapters", "needs as many weights as ids")
    if p.best_of is not None and p.best_of > 1:
        if stream:
            raise _wrong("best_of", "must be 1 in a stream")
        if not p.samples:
            raise _wrong("best_of", "above 1 needs sampling: set do_sample")
    if p.decoder_input_details and stream:
        raise _wrong("decoder_input_details", "come with whole answers only")


def _members(merged: MergedAdapters | None) -> list[AdapterWeight] | None:
    if merged is None:
        return None
    return [
        AdapterWeight(id=name, weight=weight)
        for name, weight in zip(merged.ids, merged.weights, strict=True)
    ]


def _format(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.schema_ is None:
        return {"type": wanted.type}
    return {"type": wanted.type, "schema": wanted.schema_}


def _grammar(wanted: Grammar) -> dict[str, Any]:
    if wanted.type == "regex":
        return {"regex": wanted.value}
    value = wanted.value
    if wanted.type == "json_schema" and isinstance(value, dict) and "schema" in value:
        value = value["schema"]
    return {"json": value}


def _wrong(param: str, why: str) -> ApiError:
    return ApiError("invalid_request", f"{param} {why}", param=param)


def _unsupported(param: str, why: str) -> ApiError:
    return ApiError("unsupported_parameter", f"{param} {why}", param=param)

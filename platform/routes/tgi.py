"""`/generate`, `/generate_stream`, `/`, `/info`: for clients of LoRAX, TGI, SGLang and S-LoRA.

They share `/generate` and are told apart by their fields: SGLang's body has `text` or `input_ids`,
the others' `inputs`, S-LoRA's also `lora_dir`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from loraplex.platform.callers import Caller
from loraplex.platform.dialects import sglang, slora, tgi_schemas
from loraplex.platform.dialects.error_bodies import Dialect, speaking
from loraplex.platform.dialects.tgi_format import TgiResponse
from loraplex.platform.dialects.tgi_schemas import GenerateBody
from loraplex.platform.openai_schemas import MAX_STOPS
from loraplex.platform.runtime import Runtime, caller, runtime

M = TypeVar("M", bound=BaseModel)

router = APIRouter(tags=["other servers' clients"], route_class=speaking(Dialect.TGI))

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]
AnyBody = Annotated[
    dict[str, Any],
    Body(
        description="LoRAX's and TGI's `inputs` and `parameters`, S-LoRA's (with `lora_dir`), or "
        "SGLang's `text` or `input_ids` with `sampling_params` and `lora_path`."
    ),
]

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; streams are server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


@router.post("/generate", responses=_STREAM)
async def generate(body: AnyBody, request: Request, state: State, who: Who) -> Response:
    """Continue a prompt, whole."""
    if "text" in body or "input_ids" in body:
        request.state.dialect = Dialect.NATIVE  # SGLang's errors are OpenAI's
        return await sglang.respond(_checked(sglang.GenerateBody, body), state, who)
    if "lora_dir" in body:
        return await slora.respond(_checked(slora.GenerateBody, body), state, who)
    return await _respond(_checked(GenerateBody, body), state, who, stream=False)


@router.post("/generate_stream", responses=_STREAM)
async def generate_stream(body: AnyBody, state: State, who: Who) -> Response:
    """Continue a prompt, an event for each token."""
    if "lora_dir" in body:
        body = _checked(slora.GenerateBody, body).as_tgi()
    return await _respond(_checked(GenerateBody, body), state, who, stream=True)


@router.post("/", responses=_STREAM)
async def compat_generate(body: GenerateBody, state: State, who: Who) -> Response:
    """The same as `/generate_stream` with `stream`; without, the answer is a list of one."""
    return await _respond(body, state, who, stream=body.stream, as_list=True)


@router.get("/info")
async def info(state: State) -> JSONResponse:
    """The base model and the limits of requests."""
    model, settings = state.served_model(), state.settings
    return JSONResponse(
        {
            "model_id": model.name,
            "model_sha": None,
            "model_dtype": model.info.dtype,
            "model_device_type": model.info.device.partition(":")[0],
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": settings.max_num_waiting,
            "max_best_of": tgi_schemas.MAX_BEST_OF,
            "max_stop_sequences": MAX_STOPS,
            "max_input_length": model.info.max_model_len - 1,
            "max_input_tokens": model.info.max_model_len - 1,
            "max_total_tokens": model.info.max_model_len,
            "validation_workers": 1,
            "embedding_model": False,
            "version": version("loraplex"),
            "sha": None,
            "docker_label": None,
        }
    )


async def _respond(
    body: GenerateBody, state: Runtime, who: Caller, *, stream: bool, as_list: bool = False
) -> Response:
    body = body.model_copy(update={"stream": stream})
    model = state.served_model()
    completion = tgi_schemas.completion_body(body)
    prepared = await state.inference.prepare_completion(completion, model, who)
    return TgiResponse(prepared, state.generation_ended, body, model, as_list=as_list)


def _checked(kind: type[M], body: dict[str, Any]) -> M:
    """As FastAPI would. Raises: RequestValidationError."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problems = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(problems) from None

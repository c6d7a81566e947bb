"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, SGLang's without `/v1`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from loraplex.platform.callers import Caller
from loraplex.platform.dialects import lora_loading
from loraplex.platform.dialects.error_bodies import Dialect, speaking
from loraplex.platform.errors import ApiError
from loraplex.platform.runtime import Runtime, caller, runtime

vllm = APIRouter(prefix="/v1", route_class=speaking(Dialect.VLLM))
sglang = APIRouter(route_class=speaking(Dialect.SGLANG))

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]
Name = Annotated[str, Field(min_length=1)]
Path = Annotated[
    str,
    Field(
        min_length=1,
        max_length=4096,
        description="A path below one of --source-dirs, a hub id (org/name), or a source as in "
        "/v1/adapters/pull.",
    ),
]


class VllmLoad(BaseModel):
    model_config = ConfigDict(extra="ignore")

    lora_name: Name
    lora_path: Path
    load_inplace: bool = False


class VllmUnload(BaseModel):
    model_config = ConfigDict(extra="ignore")

    lora_name: Name


class SglangLoad(BaseModel):
    model_config = ConfigDict(extra="ignore")

    lora_name: Name
    lora_path: Path
    pinned: bool = False


class SglangUnload(BaseModel):
    model_config = ConfigDict(extra="ignore")

    lora_name: Name


@vllm.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load_for_vllm(body: VllmLoad, state: State, who: Who) -> PlainTextResponse:
    """Register an adapter from a path; with `load_inplace` as a new version of its name."""
    await lora_loading.load(state, who, body.lora_name, body.lora_path, replaces=body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@vllm.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_for_vllm(body: VllmUnload, state: State, who: Who) -> PlainTextResponse:
    """Forget an adapter that was registered from a path."""
    await lora_loading.unload(state, who, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@sglang.post("/load_lora_adapter")
async def load_for_sglang(body: SglangLoad, state: State, who: Who) -> JSONResponse:
    """Register an adapter from a path."""
    try:
        await lora_loading.load(
            state, who, body.lora_name, body.lora_path, replaces=False, pinned=body.pinned
        )
    except ApiError as error:
        return await _sglang_answer(state, who, error)
    return await _sglang_answer(state, who)


@sglang.post("/unload_lora_adapter")
async def unload_for_sglang(body: SglangUnload, state: State, who: Who) -> JSONResponse:
    """Forget an adapter that was registered from a path, once its requests are done."""
    try:
        await lora_loading.unload(state, who, body.lora_name)
    except ApiError as error:
        return await _sglang_answer(state, who, error)
    return await _sglang_answer(state, who)


async def _sglang_answer(
    state: Runtime, who: Caller, error: ApiError | None = None
) -> JSONResponse:
    body = {
        "success": error is None,
        "error_message": None if error is None else error.message,
        "loaded_adapters": await lora_loading.loaded(state, who),
    }
    return JSONResponse(body, 200 if error is None else 400)

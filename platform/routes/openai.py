"""`/v1/completions`, `/v1/chat/completions`, `/v1/models`: OpenAI's API, with adapters."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import JSONResponse

from loraplex.platform.callers import Caller
from loraplex.platform.chat_schemas import ChatBody
from loraplex.platform.embedding_schemas import EmbeddingBody
from loraplex.platform.errors import ApiError
from loraplex.platform.openai_schemas import CompletionBody
from loraplex.platform.responses import EmbeddingResponse, GenerationResponse
from loraplex.platform.runtime import Runtime, caller, runtime

router = APIRouter(prefix="/v1", tags=["inference"])

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]
StickyKey = Annotated[
    str | None,
    Header(
        alias="x-sticky-key",
        description="Requests with one key get one version of an alias that is split. "
        "Default: the field `user`; without that, each request is on its own.",
    ),
]

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; with `stream` server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


@router.post("/completions", responses=_STREAM)
async def completions(
    body: CompletionBody, state: State, who: Who, sticky_key: StickyKey = None
) -> Response:
    """Continue a prompt. `adapter_id` (or `model`) names the adapter; without one the base model
    answers.
    """
    prepared = await state.inference.prepare_completion(body, state.served_model(), who, sticky_key)
    return GenerationResponse(prepared, state.generation_ended)


@router.post("/chat/completions", responses=_STREAM)
async def chat_completions(
    body: ChatBody, state: State, who: Who, sticky_key: StickyKey = None
) -> Response:
    """Answer a chat, formatted by the model's chat template."""
    prepared = await state.inference.prepare_chat(body, state.served_model(), who, sticky_key)
    return GenerationResponse(prepared, state.generation_ended)


@router.post("/embeddings")
async def embeddings(
    body: EmbeddingBody, state: State, who: Who, sticky_key: StickyKey = None
) -> Response:
    """Vectors of texts: pooled final hidden states of the base model or an adapter."""
    model = state.served_model()
    prepared, form = await state.embeddings.prepare(body, model, who, sticky_key)
    return EmbeddingResponse(prepared, state.generation_ended, form)


@router.get("/models")
async def models(state: State, who: Who) -> JSONResponse:
    """The base model, every adapter with a usable version, and their aliases."""
    model = state.served_model()
    adapters = [
        _adapter_card(reference, reference.partition(":")[0], created, model.name)
        for reference, created in await state.adapters.names(who)
    ]
    return JSONResponse({"object": "list", "data": [_base_card(state), *adapters]})


@router.get("/models/{model_id:path}")
async def retrieve_model(model_id: str, state: State, who: Who) -> JSONResponse:
    """One model or adapter."""
    model = state.served_model()
    if model_id in (model.name, model.info.name):
        return JSONResponse(_base_card(state))
    try:
        await state.resolver.choose(who, model_id, "")
        detail = await state.adapters.get(who, model_id)
    except ApiError as error:
        if error.code != "adapter_not_found":
            raise
        raise ApiError(
            "model_not_found", f"there is no model or adapter {model_id[:140]!r}", param="model"
        ) from None
    return JSONResponse(_adapter_card(model_id, detail.id, detail.created_at, model.name))


def _base_card(state: Runtime) -> dict[str, Any]:
    model = state.served_model()
    card = _card(model.name, model.created_at, root=model.public_name, parent=None)
    return {**card, "max_model_len": model.info.max_model_len}


def _adapter_card(reference: str, name: str, created: int, base: str) -> dict[str, Any]:
    return {**_card(reference, created, root=name, parent=base), "max_model_len": None}


def _card(name: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loraplex",
        "root": root,
        "parent": parent,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }

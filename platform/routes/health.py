"""`/healthz`, `/readyz`, `/metrics`, `/version`: for probes, scrapers and the curious; `/health`,
`/ping` and `/load` as vLLM and TGI have them.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from loraplex.engine.errors import EngineError
from loraplex.platform.exposition import EngineSnapshot, exposition
from loraplex.platform.runtime import Runtime, runtime

router = APIRouter(tags=["health"])

State = Annotated[Runtime, Depends(runtime)]

SCRAPE_TIMEOUT_S = 2.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is up. Says nothing of the model: see /readyz."""
    return {"status": "ok"}


@router.get(
    "/readyz", responses={503: {"description": "The model is loading or the engine is away"}}
)
async def readyz(state: State) -> JSONResponse:
    """The model is loaded and the engine answers."""
    if state.ready:
        return JSONResponse({"status": "ready"})
    if state.failure is not None:
        return JSONResponse({"status": "failed", "reason": state.told_failure}, 503)
    status = "loading" if state.model is None else "engine restarting"
    return JSONResponse({"status": status}, 503, headers={"retry-after": "1"})


@router.get("/health", response_class=Response, responses={503: {"description": "Not ready"}})
@router.get("/ping", response_class=Response, responses={503: {"description": "Not ready"}})
async def health(state: State) -> Response:
    """As /readyz, without a body: what load balancers in front of vLLM and TGI ask."""
    return Response(status_code=200 if state.ready else 503)


@router.get("/load")
async def load(state: State) -> dict[str, int]:
    """Requests that run or wait now, as vLLM counts them."""
    state.served_model()
    stats = await state.engine.stats()
    return {"server_load": stats.num_running + stats.num_waiting}


@router.get("/version")
async def server_version(state: State) -> dict[str, str]:
    return {"version": version("loraplex"), "model": state.base_name}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: State) -> Response:
    """Prometheus exposition: `vllm:` names where they apply, `loraplex:` for the rest."""
    snapshot = EngineSnapshot()
    if state.ready:
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                stats, memory = await state.engine.stats(), await state.engine.memory()
                adapters = await state.engine.adapters()
            digests = {info.digest for info in adapters}
            digests |= {*stats.running_digests, *stats.waiting_digests}
            snapshot = EngineSnapshot(stats, memory, adapters, await state.admin.names(digests))
        except (EngineError, TimeoutError):
            pass  # a scrape of a busy or restarting engine still shows what the API process knows
    registry = exposition(
        state.base_name,
        state.ready,
        state.metrics,
        snapshot,
        state.pulls.counters(),
        state.admin.residency_log,
        await state.proofs.counts(),
        state.engine.supervision,
    )
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

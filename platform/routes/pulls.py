"""Adapters fetched from a source: `/v1/adapters/pull`, `.../{id}/pull`, `/v1/admin/pulls`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from loraplex.platform.callers import Caller
from loraplex.platform.routes.adapters import AdapterId
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.sources.pulls import never_pulled
from loraplex.platform.sources.schemas import (
    AdapterWithPull,
    PendingAdapter,
    PullList,
    PullObject,
    PullOrder,
)

router = APIRouter(tags=["pulls"])

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]


@router.post("/v1/adapters/pull", status_code=202)
async def pull_adapter(
    order: PullOrder, state: State, who: Who
) -> AdapterWithPull | PendingAdapter:
    """Fetch an adapter, or a new version of it, in the background; `pull` in the answer, and in
    the adapter from then on, tells how far it is and how it ended. The same order again joins it.
    """
    await state.pulls.start(who, order, state.served_model())
    return await state.pulled.get(who, order.name)


@router.get("/v1/adapters/{adapter_id}/pull")
async def get_pull(adapter_id: AdapterId, state: State, who: Who) -> PullObject:
    """The adapter's last pull."""
    found = await state.pulls.find(who, adapter_id)
    if found is None:
        raise never_pulled(adapter_id)
    return found


@router.delete("/v1/adapters/{adapter_id}/pull")
async def cancel_pull(adapter_id: AdapterId, state: State, who: Who) -> PullObject:
    """Cancel the pull that is under way, keeping the adapter's versions; forget one that ended."""
    return await state.pulls.cancel(who, adapter_id)


@router.get("/v1/admin/pulls", tags=["admin"])
async def list_pulls(state: State, who: Who) -> PullList:
    """The last pull of every adapter, by id."""
    return await state.pulls.page(who)

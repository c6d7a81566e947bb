"""`/v1/admin`: residency, memory, running requests, the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from loraplex.platform.callers import Caller
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.schemas import (
    EventList,
    Evicted,
    EvictOrder,
    LoadOrder,
    Memory,
    RequestList,
    Slot,
    SlotList,
    TieredAdapterList,
    TransitionList,
)

router = APIRouter(prefix="/v1/admin", tags=["admin"])

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]


@router.get("/slots")
async def slots(state: State, who: Who) -> SlotList:
    """Adapters on the device."""
    state.served_model()
    return await state.admin.slots(who)


@router.get("/adapters")
async def adapters(state: State, who: Who) -> TieredAdapterList:
    """Every adapter and version, with where it is and what it takes there."""
    return await state.admin.tiers(who)


@router.post(
    "/adapters/{adapter_id}/load", responses={202: {"model": Slot, "description": "Loading"}}
)
async def load(
    adapter_id: str, response: Response, state: State, who: Who, order: LoadOrder | None = None
) -> Slot:
    """Bring an adapter to the device now: 200 when it is there, 202 with `wait: false`."""
    state.served_model()
    order = order or LoadOrder()
    slot = await state.admin.load(who, adapter_id, wait=order.wait)
    response.status_code = 200 if slot.state == "device" else 202
    return slot


@router.post("/adapters/{adapter_id}/evict")
async def evict(
    adapter_id: str, state: State, who: Who, order: EvictOrder | None = None
) -> Evicted:
    """Free an adapter's memory. It comes back by itself when it is next used."""
    state.served_model()
    return await state.admin.evict(who, adapter_id, order or EvictOrder())


@router.post("/adapters/{adapter_id}/pin")
async def pin(adapter_id: str, state: State, who: Who) -> Slot:
    """Load an adapter and keep it on the device."""
    state.served_model()
    return await state.admin.pin(who, adapter_id, pinned=True)


@router.post("/adapters/{adapter_id}/unpin")
async def unpin(adapter_id: str, state: State, who: Who) -> Slot:
    """Let an adapter be evicted again."""
    state.served_model()
    return await state.admin.pin(who, adapter_id, pinned=False)


@router.get("/transitions")
async def transitions(
    state: State,
    who: Who,
    adapter: Annotated[str | None, Query(description="Only this one: id, id@3, id:prod.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> TransitionList:
    """What was loaded, evicted or failed lately, why, and how long it took; newest first."""
    return await state.admin.transitions(who, adapter, limit)


@router.get("/memory")
async def memory(state: State) -> Memory:
    """Where the bytes are, and how many more adapters fit."""
    state.served_model()
    return await state.admin.memory()


@router.get("/requests")
async def requests(state: State, who: Who) -> RequestList:
    """Running and waiting sequences, with what they wait for."""
    state.served_model()
    return await state.admin.requests(who)


@router.get("/events")
async def events(
    state: State,
    who: Who,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Continue behind this event id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> EventList:
    """The audit log, oldest first."""
    return await state.admin.events(who, after=after, limit=limit)

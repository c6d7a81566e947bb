"""`/v1/adapters/{id}/aliases`: set, list, split, delete, look back, roll back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from loraplex.platform.callers import Caller
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.schemas import (
    AliasDeleted,
    AliasHistory,
    AliasList,
    AliasObject,
    AliasOrder,
    RollbackOrder,
)

router = APIRouter(prefix="/v1/adapters/{adapter_id}/aliases", tags=["aliases"])

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]


@router.get("")
async def list_aliases(adapter_id: str, state: State, who: Who) -> AliasList:
    """The aliases of an adapter, by name."""
    return await state.aliases.list(who, adapter_id)


@router.get("/{alias}")
async def get_alias(adapter_id: str, alias: str, state: State, who: Who) -> AliasObject:
    """One alias and what it means."""
    return await state.aliases.get(who, adapter_id, alias)


@router.put("/{alias}")
async def set_alias(
    adapter_id: str, alias: str, order: AliasOrder, state: State, who: Who
) -> AliasObject:
    """Let `id:alias` mean a version, or several by weight. The next request sees it; running ones
    end on the version they began with.
    """
    return await state.aliases.set(who, adapter_id, alias, order)


@router.delete("/{alias}")
async def delete_alias(adapter_id: str, alias: str, state: State, who: Who) -> AliasDeleted:
    """Remove an alias; its versions stay, and a rollback brings it back."""
    await state.aliases.delete(who, adapter_id, alias)
    return AliasDeleted(id=adapter_id, alias=alias)


@router.get("/{alias}/history")
async def alias_history(
    adapter_id: str,
    alias: str,
    state: State,
    who: Who,
    before: Annotated[int, Query(ge=1, le=10**9, description="Only revisions below this one.")] = 10
    ** 9,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AliasHistory:
    """What the alias has been, newest first, and who made it so."""
    return await state.aliases.history(who, adapter_id, alias, before=before, limit=limit)


@router.post("/{alias}/rollback")
async def roll_alias_back(
    adapter_id: str, alias: str, state: State, who: Who, order: RollbackOrder | None = None
) -> AliasObject:
    """Let the alias mean again what it meant before, or at the revision that is named."""
    revision = None if order is None else order.revision
    return await state.aliases.rollback(who, adapter_id, alias, revision)

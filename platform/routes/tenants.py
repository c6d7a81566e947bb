"""`/v1/admin/tenants`, `/v1/admin/keys`: who may use this server, for what, and how much."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from loraplex.platform.callers import Caller
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.tenant_schemas import (
    CreatedKey,
    KeyList,
    KeyObject,
    KeyOrder,
    TenantList,
    TenantObject,
    TenantOrder,
    TenantPatch,
)

router = APIRouter(prefix="/v1/admin", tags=["tenants and keys"])

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]


@router.get("/tenants")
async def list_tenants(state: State) -> TenantList:
    """Every tenant with its limits. For operators."""
    return await state.tenants.tenants()


@router.post("/tenants", status_code=201)
async def create_tenant(order: TenantOrder, state: State, who: Who) -> TenantObject:
    """Make a tenant: a space of names for adapters, with keys and limits of its own."""
    return await state.tenants.create_tenant(who, order)


@router.patch("/tenants/{tenant}")
async def patch_tenant(tenant: str, change: TenantPatch, state: State, who: Who) -> TenantObject:
    """Change a tenant's limits, or disable it: its keys are refused until it is enabled again."""
    return await state.tenants.patch_tenant(who, tenant, change)


@router.get("/keys")
async def list_keys(state: State, who: Who) -> KeyList:
    """The keys of your tenant; an operator sees all. Never their secrets."""
    return await state.tenants.keys(who)


@router.post("/keys", status_code=201)
async def create_key(order: KeyOrder, state: State, who: Who) -> CreatedKey:
    """Make a key. The answer is the only place that ever shows it."""
    return await state.tenants.create_key(who, order)


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: str, state: State, who: Who) -> KeyObject:
    """Revoke a key. It stays in the list, so that the audit log keeps its meaning."""
    return await state.tenants.revoke_key(who, key_id)

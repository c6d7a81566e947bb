"""Tenants and API keys: made, listed, changed, revoked; every change is in the audit log.

Works on the registry alone, so the command line uses it without a server.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from loraplex.platform.callers import Caller, Scope
from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.keys import new_key
from loraplex.platform.models import ApiKey, Tenant, utc_now
from loraplex.platform.repositories import AuditRepository
from loraplex.platform.tenant_repositories import KeyRepository, TenantRepository, require_tenant
from loraplex.platform.tenant_schemas import (
    CreatedKey,
    KeyLimits,
    KeyList,
    KeyObject,
    KeyOrder,
    TenantLimits,
    TenantList,
    TenantObject,
    TenantOrder,
    TenantPatch,
    limits_dict,
)


class TenantService:
    """on_change is called after every commit that changes who gets in."""

    def __init__(self, db: Database, on_change: Callable[[], None]) -> None:
        self._db = db
        self._on_change = on_change

    # --- tenants ----------------------------------------------------------------------------------

    async def tenants(self) -> TenantList:
        async with self._db.read() as session:
            rows = await TenantRepository(session).all()
        return TenantList(data=[_tenant_object(row) for row in rows])

    async def create_tenant(self, caller: Caller, order: TenantOrder) -> TenantObject:
        """Raises: ApiError(name_taken)."""
        async with self._db.unit_of_work() as session:
            if await session.get(Tenant, order.name) is not None:
                raise ApiError("name_taken", f"there is a tenant {order.name!r}", param="name")
            row = Tenant(
                name=order.name, description=order.description, limits=limits_dict(order.limits)
            )
            session.add(row)
            await session.flush()
            AuditRepository(session, None).add(
                caller.actor, "tenant.create", row.name, after=_described(row)
            )
        self._on_change()
        return _tenant_object(row)

    async def patch_tenant(self, caller: Caller, name: str, change: TenantPatch) -> TenantObject:
        """Raises: ApiError(tenant_not_found)."""
        async with self._db.unit_of_work() as session:
            row = await require_tenant(session, name)
            before = _described(row)
            if change.description is not None:
                row.description = change.description
            if change.limits is not None:
                row.limits = limits_dict(change.limits)
            if change.disabled is not None and change.disabled != (row.disabled_at is not None):
                row.disabled_at = utc_now() if change.disabled else None
            after = _described(row)
            if before != after:
                row.changed_at = utc_now()
                AuditRepository(session, None).add(
                    caller.actor, "tenant.patch", name, before=before, after=after
                )
        self._on_change()
        return _tenant_object(row)

    # --- keys -------------------------------------------------------------------------------------

    async def keys(self, caller: Caller) -> KeyList:
        """An operator's: all; a tenant's: its own."""
        async with self._db.read() as session:
            rows = await KeyRepository(session).all(caller.tenant)
        return KeyList(data=[_key_object(row) for row in rows])

    async def create_key(self, caller: Caller, order: KeyOrder) -> CreatedKey:
        """Raises: ApiError(tenant_not_found | permission_denied)."""
        tenant = order.tenant or caller.tenant
        key_id, key, hashed = new_key()
        async with self._db.unit_of_work() as session:
            if tenant is not None:
                if not caller.may_change(tenant):  # as if there were no such tenant
                    raise ApiError(
                        "tenant_not_found", f"there is no tenant {tenant!r}", param="tenant"
                    )
                await require_tenant(session, tenant)
            _check_listed(caller, order, tenant)
            lifetime = order.expires_in_s
            row = ApiKey(
                id=key_id,
                hash=hashed,
                tenant=tenant,
                name=order.name,
                scopes=sorted({str(scope) for scope in order.scopes}),
                adapters=order.adapters,
                limits=limits_dict(order.limits),
                expires_at=None if lifetime is None else utc_now() + timedelta(seconds=lifetime),
            )
            session.add(row)
            await session.flush()
            AuditRepository(session, tenant).add(
                caller.actor,
                "key.create",
                key_id,
                after=_key_object(row).model_dump(mode="json", exclude={"id", "object", "status"}),
            )
        self._on_change()
        return CreatedKey(**dict(_key_object(row)), key=key)

    async def revoke_key(self, caller: Caller, key_id: str) -> KeyObject:
        """At once in this process. Again: nothing more. Raises: ApiError(key_not_found)."""
        async with self._db.unit_of_work() as session:
            row = await KeyRepository(session).get(key_id)
            if row is None or caller.tenant not in (None, row.tenant):
                raise ApiError("key_not_found", f"there is no key {key_id[:140]!r}", param="key_id")
            if row.revoked_at is None:
                row.revoked_at = row.changed_at = utc_now()
                AuditRepository(session, row.tenant).add(
                    caller.actor,
                    "key.revoke",
                    key_id,
                    before={"status": "active"},
                    after={"status": "revoked"},
                )
        self._on_change()
        return _key_object(row)


def _check_listed(caller: Caller, order: KeyOrder, tenant: str | None) -> None:
    """A key that is for some adapters only makes no key for others."""
    if caller.adapters is None:
        return
    home = tenant or caller.home
    wanted = {name if "/" in name else f"{home}/{name}" for name in order.adapters or ()}
    if order.adapters is None or not wanted <= caller.adapters:
        raise ApiError(
            "permission_denied",
            "this API key is for some adapters only; name some of them for the new key",
            param="adapters",
        )


def _described(row: Tenant) -> dict[str, Any]:
    return {
        "description": row.description,
        "limits": row.limits,
        "disabled": row.disabled_at is not None,
    }


def _tenant_object(row: Tenant) -> TenantObject:
    return TenantObject(
        name=row.name,
        description=row.description,
        limits=TenantLimits(**row.limits),
        disabled=row.disabled_at is not None,
        created_at=int(row.created_at.timestamp()),
    )


def _key_object(row: ApiKey) -> KeyObject:
    expired = row.expires_at is not None and row.expires_at <= utc_now()
    return KeyObject(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        scopes=[Scope(scope) for scope in row.scopes],
        adapters=row.adapters,
        limits=KeyLimits(**row.limits),
        created_at=int(row.created_at.timestamp()),
        expires_at=None if row.expires_at is None else int(row.expires_at.timestamp()),
        revoked_at=None if row.revoked_at is None else int(row.revoked_at.timestamp()),
        status="revoked" if row.revoked_at else "expired" if expired else "active",
    )

"""Queries of tenants, API keys and usage. Sessions come in, rows go out; nobody commits here."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from loraplex.platform.errors import ApiError
from loraplex.platform.models import Adapter, AdapterVersion, ApiKey, Tenant


async def require_tenant(session: AsyncSession, name: str) -> Tenant:
    """Raises: ApiError(tenant_not_found)."""
    found = await session.get(Tenant, name)
    if found is None:
        raise ApiError("tenant_not_found", f"there is no tenant {name[:140]!r}", param="tenant")
    return found


async def check_storage(session: AsyncSession, tenant: Tenant, *, is_new: bool, size: int) -> None:
    """Room for one more version of `size` bytes, of an adapter that was just added or an old one.
    Within one transaction with what it is for. Every version counts whole, also where files are
    shared.

    Raises: ApiError(quota_exceeded).
    """
    most, most_bytes = tenant.limits.get("max_adapters"), tenant.limits.get("max_bytes")
    if most is not None and is_new:
        query = select(func.count()).where(
            Adapter.tenant == tenant.name, Adapter.deleted_at.is_(None)
        )
        found = await session.scalar(query) or 0  # with the new one
        if found > most:
            raise _over_quota(tenant, f"{found - 1} adapters", f"max_adapters {most}")
    if most_bytes is not None:
        stored = (
            select(func.sum(AdapterVersion.manifest["size_bytes"].as_integer()))
            .join(AdapterVersion.adapter)
            .where(Adapter.tenant == tenant.name)
        )
        used = await session.scalar(stored) or 0
        if used + size > most_bytes:
            raise _over_quota(
                tenant,
                f"{used} bytes of adapters and this one of {size}",
                f"max_bytes {most_bytes}",
            )


def _over_quota(tenant: Tenant, has: str, limit: str) -> ApiError:
    return ApiError(
        "quota_exceeded",
        f"tenant {tenant.name!r} has {has}; its limit is {limit}: delete adapters or versions, or "
        "ask the operator for more",
    )


class TenantRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def all(self) -> Sequence[Tenant]:
        """By name."""
        return (await self._session.scalars(select(Tenant).order_by(Tenant.name))).all()

    async def state(self) -> object:
        """Equal as long as no tenant was made or changed."""
        changed, disabled = func.max(Tenant.changed_at), func.count(Tenant.disabled_at)
        query = select(func.count(), changed, disabled).select_from(Tenant)
        return tuple((await self._session.execute(query)).one())


class KeyRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, key_id: str) -> ApiKey | None:
        return await self._session.get(ApiKey, key_id)

    async def all(self, tenant: str | None = None) -> Sequence[ApiKey]:
        """The oldest first; only of one tenant where one is named."""
        query = select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)
        if tenant is not None:
            query = query.where(ApiKey.tenant == tenant)
        return (await self._session.scalars(query)).all()

    async def any(self) -> bool:
        """There is a key, or was one."""
        return (await self._session.scalar(select(ApiKey.id).limit(1))) is not None

    async def state(self) -> object:
        """Equal as long as no key was made or changed."""
        # Clocks differ between servers: a revocation shows whatever time it was given.
        changed, revoked = func.max(ApiKey.changed_at), func.count(ApiKey.revoked_at)
        query = select(func.count(), changed, revoked).select_from(ApiKey)
        return tuple((await self._session.execute(query)).one())

"""Every query of the registry, always within one tenant. Sessions come in, rows go out; nobody
commits here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, exists, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import contains_eager, selectinload

from loraplex.platform.models import (
    DEFAULT_TENANT,
    Adapter,
    AdapterVersion,
    Alias,
    AuditEvent,
    utc_now,
)
from loraplex.platform.names import Reference

_LIVE = Adapter.deleted_at.is_(None)


class AdapterRepository:
    """Adapters, versions and aliases of one tenant."""

    def __init__(self, session: AsyncSession, tenant: str = DEFAULT_TENANT) -> None:
        self._session = session
        self._tenant = tenant

    async def get(self, name: str, *, include_deleted: bool = False) -> Adapter | None:
        """With its versions and aliases. A deleted one (no versions) only on demand."""
        query = (
            select(Adapter)
            .where(Adapter.tenant == self._tenant, Adapter.name == name)
            .options(selectinload(Adapter.versions), selectinload(Adapter.aliases))
        )
        if not include_deleted:
            query = query.where(_LIVE)
        found: Adapter | None = await self._session.scalar(query)
        return found

    async def page(self, *, after: str, contains: str, limit: int) -> Sequence[Adapter]:
        """By name, strictly after `after`, at most `limit`, with versions and aliases."""
        query = (
            select(Adapter)
            .where(Adapter.tenant == self._tenant, _LIVE, Adapter.name > after)
            .options(selectinload(Adapter.versions), selectinload(Adapter.aliases))
            .order_by(Adapter.name)
            .limit(limit)
        )
        if contains:
            query = query.where(Adapter.name.contains(contains, autoescape=True))
        return (await self._session.scalars(query)).all()

    async def names(self) -> Sequence[tuple[str, datetime]]:
        """(name, created_at) of every adapter that has a ready version, by name."""
        usable = exists().where(
            AdapterVersion.adapter_id == Adapter.id, AdapterVersion.status == "ready"
        )
        query = (
            select(Adapter.name, Adapter.created_at)
            .where(Adapter.tenant == self._tenant, _LIVE, usable)
            .order_by(Adapter.name)
        )
        return [(row[0], row[1]) for row in await self._session.execute(query)]

    async def resolve(
        self, reference: Reference, *, include_draining: bool = False
    ) -> AdapterVersion | None:
        """The version a reference means, with its adapter; a bare name means the newest.

        A version that is being deleted is no more, unless asked for.
        """
        query = (
            select(AdapterVersion)
            .join(AdapterVersion.adapter)
            .where(Adapter.tenant == self._tenant, _LIVE)
            .options(contains_eager(AdapterVersion.adapter))
            .order_by(AdapterVersion.version.desc(), AdapterVersion.id)
            .limit(1)
        )
        if not include_draining:
            query = query.where(AdapterVersion.status != "draining")
        if reference.digest is not None:
            query = query.where(AdapterVersion.digest == reference.digest)
        else:
            query = query.where(Adapter.name == reference.name)
        if reference.version is not None:
            query = query.where(AdapterVersion.version == reference.version)
        if reference.alias is not None:
            query = query.join(
                Alias,
                (Alias.adapter_id == AdapterVersion.adapter_id)
                & (Alias.version == AdapterVersion.version),
            ).where(Alias.alias == reference.alias)
        found: AdapterVersion | None = await self._session.scalar(query)
        return found

    async def versions(self) -> Sequence[AdapterVersion]:
        """Every version of every adapter, with its adapter, by name and version."""
        query = (
            select(AdapterVersion)
            .join(AdapterVersion.adapter)
            .where(Adapter.tenant == self._tenant, _LIVE)
            .options(contains_eager(AdapterVersion.adapter))
            .order_by(Adapter.name, AdapterVersion.version)
        )
        return (await self._session.scalars(query)).all()

    async def named(self, digests: Iterable[str]) -> dict[str, AdapterVersion]:
        """digest -> the newest version that has it, with its adapter."""
        query = (
            select(AdapterVersion)
            .join(AdapterVersion.adapter)
            .where(Adapter.tenant == self._tenant, AdapterVersion.digest.in_(set(digests)))
            .options(contains_eager(AdapterVersion.adapter))
            .order_by(AdapterVersion.id)
        )
        return {row.digest: row for row in await self._session.scalars(query)}


class ContentRepository:
    """Contents (digests) over all tenants: files are shared, so only here does the tenant not
    matter.
    """

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def in_use(self, digest: str) -> bool:
        found = await self._session.scalar(select(exists().where(AdapterVersion.digest == digest)))
        return bool(found)

    async def used_elsewhere(self, digests: Iterable[str], version_ids: Iterable[int]) -> set[str]:
        """Those of `digests` that versions other than `version_ids` have too."""
        query = select(AdapterVersion.digest).where(
            AdapterVersion.digest.in_(set(digests)), AdapterVersion.id.not_in(set(version_ids))
        )
        return set(await self._session.scalars(query))

    async def all(self) -> Sequence[AdapterVersion]:
        """Every version with its adapter, for the reconciliation at start."""
        query = select(AdapterVersion).options(selectinload(AdapterVersion.adapter))
        return (await self._session.scalars(query)).all()

    async def add_usage(self, version_id: int, requests: int, prompt: int, generated: int) -> None:
        await self._session.execute(
            update(AdapterVersion)
            .where(AdapterVersion.id == version_id)
            .values(
                num_requests=AdapterVersion.num_requests + requests,
                num_prompt_tokens=AdapterVersion.num_prompt_tokens + prompt,
                num_generated_tokens=AdapterVersion.num_generated_tokens + generated,
                last_used_at=utc_now(),
            )
        )

    async def remove_versions(self, version_ids: Iterable[int]) -> None:
        await self._session.execute(
            delete(AdapterVersion).where(AdapterVersion.id.in_(set(version_ids)))
        )


class AuditRepository:
    """The audit log: append and read."""

    def __init__(self, session: AsyncSession, tenant: str = DEFAULT_TENANT) -> None:
        self._session = session
        self._tenant = tenant

    def add(
        self,
        actor: str,
        action: str,
        subject: str,
        *,
        before: dict[str, Any] | None = None,
        after: dict[str, Any] | None = None,
    ) -> None:
        self._session.add(
            AuditEvent(
                tenant=self._tenant,
                actor=actor,
                action=action,
                subject=subject,
                before=before,
                after=after,
            )
        )

    async def page(self, *, after: int, limit: int) -> Sequence[AuditEvent]:
        query = (
            select(AuditEvent)
            .where(AuditEvent.tenant == self._tenant, AuditEvent.id > after)
            .order_by(AuditEvent.id)
            .limit(limit)
        )
        return (await self._session.scalars(query)).all()

"""Every query of adapters, always within what the caller may see. Sessions come in, rows go out;
nobody commits here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import contains_eager, selectinload

from loraplex.platform.callers import Caller
from loraplex.platform.models import (
    Adapter,
    AdapterShare,
    AdapterVersion,
    Alias,
    AliasRevision,
    AliasTarget,
    AuditEvent,
    Proof,
    Pull,
    utc_now,
)
from loraplex.platform.names import DEFAULT_ALIAS, LATEST_ALIAS, Reference

_LIVE = Adapter.deleted_at.is_(None)
_DISPROVED = and_(  # Proof.is_refused, for the database
    Proof.probed_at.is_not(None),
    Proof.agrees.is_not(True),
    or_(
        Proof.accepted_error.is_(None),
        Proof.error.is_(None),
        Proof.error > Proof.accepted_error,
    ),
)
_USABLE = and_(
    AdapterVersion.status == "ready",
    ~exists().where(
        Proof.digest == AdapterVersion.digest, or_(Proof.damage.is_not(None), _DISPROVED)
    ),
)
_VERSIONS_AND_ALIASES = (
    selectinload(Adapter.versions),
    selectinload(Adapter.aliases).selectinload(Alias.targets),
    selectinload(Adapter.shares),
)


def _visible(caller: Caller) -> ColumnElement[bool]:
    """Adapters that a caller may see: an operator all, a tenant its own and those it was given, a
    key with a list those on it.
    """
    seen: list[ColumnElement[bool]] = [_LIVE]
    if caller.tenant is not None:
        given = exists().where(
            AdapterShare.adapter_id == Adapter.id, AdapterShare.tenant == caller.tenant
        )
        seen.append(
            or_(
                Adapter.tenant == caller.tenant,
                Adapter.visibility == "public",
                and_(Adapter.visibility == "shared", given),
            )
        )
    if caller.adapters is not None:
        seen.append((Adapter.tenant + "/" + Adapter.name).in_(caller.adapters))
    return and_(*seen)


class AdapterRepository:
    """Adapters, versions and aliases, as far as the caller may see them."""

    def __init__(self, session: AsyncSession, caller: Caller) -> None:
        self._session = session
        self.caller = caller
        self._seen = _visible(caller)

    async def get(
        self, name: str, *, owner: str | None = None, include_deleted: bool = False
    ) -> Adapter | None:
        """With its versions, aliases and shares. owner: None = the caller's home. A deleted one (no
        versions) only on demand.
        """
        query = (
            select(Adapter)
            .where(Adapter.tenant == (owner or self.caller.home), Adapter.name == name)
            .options(*_VERSIONS_AND_ALIASES)
        )
        if not include_deleted:
            query = query.where(self._seen)
        found: Adapter | None = await self._session.scalar(query)
        return found

    async def page(self, *, after: str, contains: str, limit: int) -> Sequence[Adapter]:
        """The home's by name, strictly after `after`, at most `limit`, with versions, aliases and
        shares.
        """
        query = (
            select(Adapter)
            .where(Adapter.tenant == self.caller.home, self._seen, Adapter.name > after)
            .options(*_VERSIONS_AND_ALIASES)
            .order_by(Adapter.name)
            .limit(limit)
        )
        if contains:
            query = query.where(Adapter.name.contains(contains, autoescape=True))
        return (await self._session.scalars(query)).all()

    async def names(self) -> Sequence[tuple[str, datetime]]:
        """(name as the caller says it, created_at) of every adapter that has a version to be used;
        the home's first, by name.
        """
        usable = exists().where(AdapterVersion.adapter_id == Adapter.id, _USABLE)
        query = (
            select(Adapter.tenant, Adapter.name, Adapter.created_at)
            .where(self._seen, usable)
            .order_by(Adapter.tenant != self.caller.home, Adapter.tenant, Adapter.name)
        )
        rows = await self._session.execute(query)
        return [(self.caller.shown(row[0], row[1]), row[2]) for row in rows]

    async def alias_names(self) -> Sequence[tuple[str, str]]:
        """(name as the caller says it, alias) of every alias that leads to a version to be used."""
        query = (
            select(Adapter.tenant, Adapter.name, Alias.alias)
            .distinct()
            .select_from(Alias)
            .join(Adapter, Adapter.id == Alias.adapter_id)
            .join(AliasTarget, (AliasTarget.alias_id == Alias.id) & (AliasTarget.weight > 0))
            .join(
                AdapterVersion,
                (AdapterVersion.adapter_id == AliasTarget.adapter_id)
                & (AdapterVersion.version == AliasTarget.version),
            )
            .where(self._seen, _USABLE)
            .order_by(Adapter.tenant, Adapter.name, Alias.alias)
        )
        rows = await self._session.execute(query)
        return [(self.caller.shown(row[0], row[1]), row[2]) for row in rows]

    async def resolve(
        self, reference: Reference, *, include_draining: bool = False
    ) -> list[tuple[AdapterVersion, int]]:
        """The versions a reference means, each with its adapter and weight; empty if there is none.

        A bare name means its alias `default` if it has one, else the newest version, which
        `name:latest` means too. A version that is being deleted is no more, unless asked for.
        """
        if reference.name is not None and reference.version is None:
            alias = reference.alias or DEFAULT_ALIAS
            found = await self._targets(reference, alias, include_draining)
            if found or reference.alias not in (None, LATEST_ALIAS):
                return found
        return await self._single(reference, include_draining)

    async def _targets(
        self, reference: Reference, alias: str, include_draining: bool
    ) -> list[tuple[AdapterVersion, int]]:
        query = (
            self._usable(include_draining)
            .add_columns(AliasTarget.weight)
            .join(
                AliasTarget,
                (AliasTarget.adapter_id == AdapterVersion.adapter_id)
                & (AliasTarget.version == AdapterVersion.version),
            )
            .join(Alias, Alias.id == AliasTarget.alias_id)
            .where(self._is(reference), Alias.alias == alias, AliasTarget.weight > 0)
        )
        return [(row, weight) for row, weight in await self._session.execute(query)]

    async def _single(
        self, reference: Reference, include_draining: bool
    ) -> list[tuple[AdapterVersion, int]]:
        query = self._usable(include_draining).limit(1)
        if reference.digest is not None:
            query = query.where(AdapterVersion.digest == reference.digest)
        else:
            query = query.where(self._is(reference))
        if reference.version is not None:
            query = query.where(AdapterVersion.version == reference.version)
        return [(row, 1) for row in await self._session.scalars(query)]

    def _is(self, reference: Reference) -> ColumnElement[bool]:
        owner = reference.tenant or self.caller.home
        return and_(Adapter.tenant == owner, Adapter.name == reference.name)

    def _usable(self, include_draining: bool) -> Select[Any]:
        """Versions with their adapters, the home's before others', newest first."""
        query = (
            select(AdapterVersion)
            .join(AdapterVersion.adapter)
            .where(self._seen)
            .options(contains_eager(AdapterVersion.adapter))
            .order_by(
                Adapter.tenant != self.caller.home,
                AdapterVersion.version.desc(),
                AdapterVersion.id,
            )
        )
        return query if include_draining else query.where(AdapterVersion.status != "draining")

    async def versions(self) -> Sequence[AdapterVersion]:
        """Every version of every adapter that is the caller's own (an operator's: all), with its
        adapter, by name and version.
        """
        query = (
            select(AdapterVersion)
            .join(AdapterVersion.adapter)
            .where(self._seen, *self._own())
            .options(contains_eager(AdapterVersion.adapter))
            .order_by(Adapter.tenant, Adapter.name, AdapterVersion.version)
        )
        return (await self._session.scalars(query)).all()

    async def named(self, digests: Iterable[str]) -> dict[str, AdapterVersion]:
        """digest -> the newest of the caller's own versions that has it, with its adapter."""
        query = (
            select(AdapterVersion)
            .join(AdapterVersion.adapter)
            .where(self._seen, *self._own(), AdapterVersion.digest.in_(set(digests)))
            .options(contains_eager(AdapterVersion.adapter))
            .order_by(AdapterVersion.id)
        )
        return {row.digest: row for row in await self._session.scalars(query)}

    def _own(self) -> list[ColumnElement[bool]]:
        tenant = self.caller.tenant
        return [] if tenant is None else [Adapter.tenant == tenant]


class AliasRepository:
    """Changes of aliases, and their history. What they mean now comes with their adapter."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    def move(
        self,
        adapter: Adapter,
        name: str,
        split: Mapping[int, int],
        actor: str,
        *,
        restores: int | None = None,
    ) -> Alias:
        """Make an alias mean `split` (version -> weight; nothing = delete it), and write that down.

        Nothing changes when it means that already. adapter: with versions and aliases.
        """
        alias = next((row for row in adapter.aliases if row.alias == name), None)
        if alias is None:
            alias = Alias(alias=name, revision=0, targets=[])
            adapter.aliases.append(alias)
        before = alias.split
        if before == split:
            return alias
        kept = [target for target in alias.targets if target.version in split]
        for target in kept:
            target.weight = split[target.version]
        added = [
            AliasTarget(version=version, adapter_id=adapter.id, weight=weight)
            for version, weight in split.items()
            if version not in before
        ]
        alias.targets[:] = sorted([*kept, *added], key=lambda target: target.version)
        alias.revision += 1
        self._session.add(
            AliasRevision(
                alias=alias,
                revision=alias.revision,
                actor=actor,
                split=_listed(split),
                restores=restores,
            )
        )
        AuditRepository(self._session, adapter.tenant).add(
            actor,
            "alias.set" if split else "alias.delete",
            f"{adapter.name}:{name}",
            before={"split": _listed(before)} if before else None,
            after={"split": _listed(split)} if split else None,
        )
        return alias

    async def history(self, alias: Alias, *, before: int, limit: int) -> Sequence[AliasRevision]:
        """Revisions below `before`, newest first, at most `limit`."""
        query = (
            select(AliasRevision)
            .where(AliasRevision.alias_id == alias.id, AliasRevision.revision < before)
            .order_by(AliasRevision.revision.desc())
            .limit(limit)
        )
        return (await self._session.scalars(query)).all()

    async def revision(self, alias: Alias, number: int) -> AliasRevision | None:
        found: AliasRevision | None = await self._session.scalar(
            select(AliasRevision).where(
                AliasRevision.alias_id == alias.id, AliasRevision.revision == number
            )
        )
        return found


def _listed(split: Mapping[int, int]) -> list[dict[str, int]]:
    return [{"version": version, "weight": weight} for version, weight in sorted(split.items())]


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
        """Those of `digests` that versions other than `version_ids` have too, and will keep."""
        query = select(AdapterVersion.digest).where(
            AdapterVersion.digest.in_(set(digests)),
            AdapterVersion.id.not_in(set(version_ids)),
            AdapterVersion.status != "draining",
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
        """And what was known about contents that no version has any more."""
        await self._session.execute(
            delete(AdapterVersion).where(AdapterVersion.id.in_(set(version_ids)))
        )
        await self._session.execute(
            delete(Proof).where(Proof.digest.not_in(select(AdapterVersion.digest)))
        )


class ProofRepository:
    """What is known about contents, over all tenants."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, digest: str) -> Proof | None:
        return await self._session.get(Proof, digest)

    async def of(self, digest: str) -> Proof:
        """A new one where there is none yet."""
        found = await self.get(digest)
        if found is None:
            found = Proof(digest=digest)
            self._session.add(found)
        return found

    async def versions(self, digest: str) -> Sequence[AdapterVersion]:
        """All that have this content, with their adapters."""
        query = (
            select(AdapterVersion)
            .where(AdapterVersion.digest == digest)
            .options(selectinload(AdapterVersion.adapter))
            .order_by(AdapterVersion.id)
        )
        return (await self._session.scalars(query)).all()

    async def unproven(self, facts: Mapping[str, str]) -> dict[str, int]:
        """digest -> pages of contents that are in use and were not probed with these facts (columns
        of `Proof`), the newest first.
        """
        same = and_(*(getattr(Proof, name) == value for name, value in facts.items()))
        query = (
            select(AdapterVersion.digest, AdapterVersion.manifest)
            .outerjoin(Proof, Proof.digest == AdapterVersion.digest)
            .where(
                AdapterVersion.status == "ready",
                Proof.damage.is_(None),
                or_(Proof.probed_at.is_(None), ~same),
            )
            .order_by(AdapterVersion.id.desc())
        )
        rows = await self._session.execute(query)
        return {digest: manifest["pages"] for digest, manifest in rows}

    async def mend(self, digest: str) -> None:
        """Its files are whole again. What was loaded of the old ones is to be probed."""
        await self._session.execute(
            update(Proof)
            .where(Proof.digest == digest, Proof.damage.is_not(None))
            .values(damage=None, probed_at=None)
        )

    async def counts(self) -> dict[str, int]:
        """Ready versions by outcome: agrees, disagrees, damaged, unproven."""
        outcomes: dict[str, ColumnElement[bool]] = {
            "damaged": Proof.damage.is_not(None),
            "disagrees": and_(
                Proof.damage.is_(None), Proof.probed_at.is_not(None), Proof.agrees.is_not(True)
            ),
            "agrees": and_(
                Proof.damage.is_(None), Proof.probed_at.is_not(None), Proof.agrees.is_(True)
            ),
            "unproven": and_(Proof.damage.is_(None), Proof.probed_at.is_(None)),
        }
        columns = [func.count().filter(condition) for condition in outcomes.values()]
        query = (
            select(*columns)
            .select_from(AdapterVersion)
            .outerjoin(Proof, Proof.digest == AdapterVersion.digest)
            .where(AdapterVersion.status == "ready")
        )
        row = (await self._session.execute(query)).one()
        return dict(zip(outcomes, row, strict=True))


class PullRepository:
    """The last pull of each tenant's name."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, tenant: str, name: str) -> Pull | None:
        found: Pull | None = await self._session.scalar(
            select(Pull).where(Pull.tenant == tenant, Pull.name == name)
        )
        return found

    async def all(self, tenant: str | None = None) -> Sequence[Pull]:
        """By tenant and name; only of one tenant where one is named."""
        query = select(Pull).order_by(Pull.tenant, Pull.name)
        if tenant is not None:
            query = query.where(Pull.tenant == tenant)
        return (await self._session.scalars(query)).all()

    async def remove(self, tenant: str, name: str) -> None:
        await self._session.execute(delete(Pull).where(Pull.tenant == tenant, Pull.name == name))

    async def replace(self, pull: Pull) -> None:
        """Make this the last pull of its name."""
        await self.remove(pull.tenant, pull.name)
        self._session.add(pull)


class AuditRepository:
    """The audit log: append what was done to something of `tenant`, and read.

    tenant: None reads all, and writes of what belongs to no tenant, under an empty name.
    """

    def __init__(self, session: AsyncSession, tenant: str | None) -> None:
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
                tenant=self._tenant or "",
                actor=actor,
                action=action,
                subject=subject,
                before=before,
                after=after,
            )
        )

    async def page(self, *, after: int, limit: int) -> Sequence[AuditEvent]:
        query = select(AuditEvent).where(AuditEvent.id > after).order_by(AuditEvent.id).limit(limit)
        if self._tenant is not None:
            query = query.where(AuditEvent.tenant == self._tenant)
        return (await self._session.scalars(query)).all()

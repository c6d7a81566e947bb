"""What can be done with adapters: register, describe, remove. The registry is the source of truth.

Order of effects, so that a crash at any point leaves the old or the new state: an upload first
commits its files, then its rows (files without rows are swept at start); a removal first makes the
engine let go, then deletes the rows, then the files. Knows nothing of HTTP bodies or tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError

from loraplex.adapters import archive, intake
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest
from loraplex.adapters.store import AdapterStore, Staging
from loraplex.engine.api import AdapterResidencyInfo
from loraplex.engine.errors import AdapterInUse, EngineDead
from loraplex.platform import adapter_view, patching, uploads
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.errors import ApiError
from loraplex.platform.finishing import finished
from loraplex.platform.letting_go import forget_stragglers, keep
from loraplex.platform.models import Adapter, AdapterVersion, utc_now
from loraplex.platform.names import Reference, adapter_not_found
from loraplex.platform.registration import Registration
from loraplex.platform.repositories import (
    AdapterRepository,
    AliasRepository,
    AuditRepository,
    ContentRepository,
    ProofRepository,
)
from loraplex.platform.resolution import Resolver
from loraplex.platform.schemas import (
    ONLY_WEIGHT,
    AdapterDeleted,
    AdapterDetail,
    AdapterList,
    AdapterObject,
    AdapterPatch,
    Freed,
)
from loraplex.platform.served_model import ServedModel
from loraplex.platform.shipped_defaults import Shipped, shipped_defaults
from loraplex.platform.template_rules import may_bring_template
from loraplex.platform.tenant_repositories import check_storage, require_tenant

ARCHIVE_FILE = "archive"
MAX_RETRIES = 8


@dataclass(frozen=True, slots=True)
class _Content:
    """What makes a version: the tensors, and what their files say of their use."""

    manifest: AdapterManifest
    shipped: Shipped

    def is_of(self, row: AdapterVersion) -> bool:
        same_use = row.shipped_defaults == self.shipped.defaults
        return same_use and row.digest == self.manifest.digest


class AdapterService:
    def __init__(
        self,
        db: Database,
        store: AdapterStore,
        engine: EnginePort,
        resolver: Resolver,
        max_upload_bytes: int,
        on_registered: Callable[[], None],
        *,
        tenant_templates: bool = False,
    ) -> None:
        self._tenant_templates = tenant_templates
        self._db = db
        self._resolver = resolver
        self._store = store
        self._engine = engine
        self._max_upload_bytes = max_upload_bytes
        self._on_registered = on_registered
        self._limits = Limits(max_weights_bytes=max_upload_bytes)
        # Between "is any row using this content?" and "remove its files" no upload may commit the
        # same content.
        self._files_lock = asyncio.Lock()

    # --- reading ---------------------------------------------------------------------------------

    async def get(self, caller: Caller, text: str) -> AdapterDetail:
        """An adapter with all its versions. A bare name shows the newest, a split the heaviest."""
        reference = Reference.parse(text)
        if reference is None:
            raise adapter_not_found(text)
        async with self._db.read() as session:
            adapters = AdapterRepository(session, caller)
            if reference.is_bare:
                adapter, row = await require_adapter(adapters, text), None
            else:
                rows = await adapters.resolve(reference, include_draining=True)
                if not rows:
                    raise adapter_not_found(text)
                row = max(rows, key=lambda item: item[1])[0]
                owner = row.adapter
                adapter = await require_adapter(adapters, f"{owner.tenant}/{owner.name}")
        return adapter_view.adapter_detail(caller, adapter, await self.residency(), row)

    async def page(self, caller: Caller, *, limit: int, after: str, contains: str) -> AdapterList:
        """One page by name. `contains` filters by a part of the name."""
        async with self._db.read() as session:
            rows = await AdapterRepository(session, caller).page(
                after=after, contains=contains, limit=limit + 1
            )
        resident = await self.residency()
        return AdapterList(
            data=[adapter_view.adapter_object(caller, row, resident) for row in rows[:limit]],
            has_more=len(rows) > limit,
        )

    async def names(self, caller: Caller) -> list[tuple[str, int]]:
        """(reference, created_at in unix seconds) of every adapter that can be used, and behind it
        of its aliases.
        """
        async with self._db.read() as session:
            adapters = AdapterRepository(session, caller)
            rows = await adapters.names()
            aliases: dict[str, list[str]] = {}
            for name, alias in await adapters.alias_names():
                aliases.setdefault(name, []).append(f"{name}:{alias}")
        return [
            (reference, int(created_at.timestamp()))
            for name, created_at in rows
            for reference in (name, *aliases.get(name, ()))
        ]

    async def residency(self) -> dict[str, AdapterResidencyInfo]:
        """digest -> where it is; empty while the engine is away (then everything is on disk)."""
        if not self._engine.ready:
            return {}
        try:
            return {info.digest: info for info in await self._engine.adapters()}
        except EngineDead:
            return {}

    def files(self, digest: str) -> Path:
        """The directory with an adapter's files."""
        return self._store.path(digest)

    # --- registering -----------------------------------------------------------------------------

    async def register(
        self, caller: Caller, chunks: AsyncIterator[bytes], content_type: str, model: ServedModel
    ) -> tuple[AdapterObject, bool]:
        """Receive, check, store and register an upload. Returns the adapter and whether it is new.

        Raises: ApiError, AdapterRefused (with every problem found), StorageFull.
        """
        await self._check_room(caller)
        async with self.staging() as staging:
            upload = await uploads.receive_upload(
                chunks, content_type, self._writers(staging), self._max_upload_bytes
            )
            order = Registration.from_upload(upload, model)
            manifest = await asyncio.to_thread(
                self.inspect, staging, "archive" in upload.files, model
            )
            adapter, created = await self.admit(caller, order, staging, manifest, model)
        return adapter_view.adapter_object(caller, adapter, await self.residency()), created

    async def _check_room(self, caller: Caller) -> None:
        """Before anything is received. Raises: ApiError."""
        caller.check_may_register()
        async with self._db.read() as session:
            tenant = await require_tenant(session, caller.home)
            await check_storage(session, tenant, is_new=False, size=1)

    async def admit(
        self,
        caller: Caller,
        order: Registration,
        staging: Staging,
        manifest: AdapterManifest,
        model: ServedModel,
        source: str | None = None,
    ) -> tuple[Adapter, bool]:
        """Store and register what was staged and inspected. Returns the adapter, its versions
        loaded, and whether its newest one is new.

        source: where it was pulled from, for the audit log.
        """
        trusted = may_bring_template(caller, self._tenant_templates)
        shipped = await shipped_defaults(staging.path, model, with_template=trusted)
        async with self._files_lock:
            await asyncio.to_thread(self._store.commit, staging, manifest)
            content = _Content(manifest, shipped)
            try:
                adapter, created = await self._insert(caller, order, content, model, source)
            except ApiError:
                await self._remove_unused(manifest.digest)
                raise
        self._resolver.forget()
        await keep(self._engine, [manifest.digest])  # while another name of it is deleted
        self._on_registered()
        return adapter, created

    @asynccontextmanager
    async def staging(self) -> AsyncIterator[Staging]:
        """A staging folder, entered and left in a worker thread: both wait for the disk."""
        context = self._store.staging()
        try:
            yield await finished(asyncio.to_thread(context.__enter__))
        finally:
            await finished(asyncio.to_thread(context.__exit__, None, None, None))

    def _writers(self, staging: Staging) -> dict[str, uploads.OpenWriter]:
        fields = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE, "archive": ARCHIVE_FILE}
        return {
            field: partial(staging.writer, name, self.max_bytes(name))
            for field, name in fields.items()
        }

    def max_bytes(self, name: str) -> int:
        """How large a staged file of this name may be."""
        if name == CONFIG_FILE:
            return self._limits.max_config_bytes
        return self._max_upload_bytes

    def inspect(self, staging: Staging, packed: bool, model: ServedModel) -> AdapterManifest:
        """Check what was staged. packed: it is an archive, to be unpacked first. Blocks.

        Raises: AdapterRefused with every problem; StorageFull.
        """
        if packed:
            archive.unpack(staging.path / ARCHIVE_FILE, staging, self._limits)
        return intake.inspect(
            staging.path,
            model.info.modules,
            self._limits,
            model.public_name,
            model.info.vocab_size,
        )

    async def _insert(
        self,
        caller: Caller,
        order: Registration,
        content: _Content,
        model: ServedModel,
        source: str | None,
    ) -> tuple[Adapter, bool]:
        for _ in range(MAX_RETRIES):
            try:
                return await self._try_insert(caller, order, content, model, source)
            except IntegrityError:  # another server took the same name or version number first
                continue
        raise ApiError("name_taken", f"adapter {order.name!r} is being changed by others; retry")

    async def _try_insert(
        self,
        caller: Caller,
        order: Registration,
        content: _Content,
        model: ServedModel,
        source: str | None,
    ) -> tuple[Adapter, bool]:
        caller.check_may_register(order.name)
        async with self._db.unit_of_work() as session:
            tenant = await require_tenant(session, caller.home)
            adapters = AdapterRepository(session, caller)
            adapter = await adapters.get(order.name, include_deleted=True)
            if adapter is None:
                adapter = Adapter(
                    tenant=caller.home,
                    name=order.name,
                    metadata_={},
                    versions=[],
                    aliases=[],
                    shares=[],
                )
                session.add(adapter)
                await session.flush()
            if adapter.deleted_at is not None:
                adapter.deleted_at, adapter.created_at = None, utc_now()
                adapter.description, adapter.metadata_ = "", {}
                adapter.visibility, adapter.defaults = "private", None
                adapter.shares.clear()
            newest = adapter.versions[-1] if adapter.versions else None
            manifest = content.manifest
            created = newest is None or not content.is_of(newest) or newest.status != "ready"
            if order.description is not None:
                adapter.description = order.description
            if order.metadata is not None:
                adapter.metadata_ = order.metadata
            if created:
                await check_storage(
                    session, tenant, is_new=not adapter.versions, size=manifest.size_bytes
                )
                newest = AdapterVersion(
                    version=adapter.next_version,
                    digest=manifest.digest,
                    base_model=model.name,
                    model_signature=model.signature,
                    manifest=adapter_view.manifest_summary(manifest, content.shipped.warnings),
                    shipped_defaults=content.shipped.defaults,
                )
                adapter.next_version += 1
                adapter.versions.append(newest)
                await session.flush()
                after: dict[str, Any] = {
                    "version": newest.version,
                    "digest": f"sha256:{newest.digest}",
                }
                if source is not None:
                    after["source"] = source
                AuditRepository(session, caller.home).add(
                    caller.actor, "adapter.register", order.name, after=after
                )
            assert newest is not None
            await ProofRepository(session).mend(manifest.digest)
            await session.refresh(newest, ["proof"])
            if order.alias is not None:
                AliasRepository(session).move(
                    adapter, order.alias, {newest.version: ONLY_WEIGHT}, caller.actor
                )
            await session.flush()
        return adapter, created

    # --- changing --------------------------------------------------------------------------------

    async def patch(self, caller: Caller, name: str, change: AdapterPatch) -> AdapterDetail:
        """`change.defaults` was checked (`default_checks`)."""
        async with self._db.unit_of_work() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            before = patching.described(adapter)
            patching.apply(change, adapter)
            after = patching.described(adapter)
            if before != after:
                AuditRepository(session, adapter.tenant).add(
                    caller.actor, "adapter.patch", adapter.name, before=before, after=after
                )
        self._resolver.forget()
        return await self.get(caller, name)

    # --- removing --------------------------------------------------------------------------------

    async def delete(
        self,
        caller: Caller,
        name: str,
        *,
        version: int | None,
        force: bool,
        drain_timeout_s: float | None,
    ) -> AdapterDeleted:
        """Remove one version or all of them. New requests are refused from the first moment on.

        Running requests: `force` aborts them, `drain_timeout_s` waits for them so long, else they
        are a conflict. Raises: ApiError(adapter_not_found | adapter_in_use | version_has_alias);
        then nothing has changed.
        """
        leaving = await self._begin_delete(caller, name, version, force)
        try:
            freed = await self._release(leaving, force, drain_timeout_s)
        except BaseException:
            await asyncio.shield(self._set_status(leaving, "ready"))
            await asyncio.shield(keep(self._engine, {row.digest for row in leaving}))
            raise
        return await finished(self._finish_delete(caller, name, leaving, freed))

    async def _begin_delete(
        self, caller: Caller, name: str, version: int | None, force: bool
    ) -> list[AdapterVersion]:
        async with self._db.unit_of_work() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            leaving = [row for row in adapter.versions if version in (None, row.version)]
            if not leaving:
                raise adapter_not_found(f"{name}@{version}", param="version")
            aliases = [a.alias for a in adapter.aliases if version in a.split]
            if aliases and not force:
                raise ApiError(
                    "version_has_alias",
                    f"{name}@{version} is behind {', '.join(f'{name}:{a}' for a in aliases)}; "
                    f"point it elsewhere first (PUT /v1/adapters/{name}/aliases/{aliases[0]}), "
                    "or use force=true to take the version out",
                )
            if any(row.status == "draining" for row in leaving):
                raise ApiError("adapter_in_use", f"adapter {name!r} is being deleted already")
            for row in leaving:
                row.status = "draining"
        self._resolver.forget()
        return leaving

    async def _release(
        self, leaving: list[AdapterVersion], force: bool, drain_timeout_s: float | None
    ) -> Freed:
        """Make the engine let go of every content that only the leaving versions have."""
        freed = Freed()
        timeout_s = drain_timeout_s or 0.0  # none would mean: wait for ever
        digests = {row.digest for row in leaving}
        async with self._db.read() as session:
            kept = await ContentRepository(session).used_elsewhere(
                digests, (row.id for row in leaving)
            )
        for digest in digests - kept:
            try:
                released = await self._engine.forget(digest, force=force, timeout_s=timeout_s)
            except AdapterInUse as error:
                raise ApiError("adapter_in_use", error.message) from None
            except EngineDead:
                continue  # nothing is resident in an engine that is not there
            freed.device_bytes += released.device_bytes
            freed.host_bytes += released.host_bytes
        return freed

    async def _finish_delete(
        self, caller: Caller, name: str, leaving: list[AdapterVersion], freed: Freed
    ) -> AdapterDeleted:
        # The lock is taken in here: who hangs up must not open it while files are being removed.
        async with self._files_lock:
            return await self._remove(caller, name, leaving, freed)

    async def _remove(
        self, caller: Caller, name: str, leaving: list[AdapterVersion], freed: Freed
    ) -> AdapterDeleted:
        async with self._db.unit_of_work() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            gone = {row.version for row in leaving}
            if all(row.version in gone for row in adapter.versions):
                adapter.deleted_at = utc_now()
                adapter.aliases.clear()
            for alias in adapter.aliases:
                left = {v: weight for v, weight in alias.split.items() if v not in gone}
                if not any(left.values()):
                    left = {}
                AliasRepository(session).move(adapter, alias.alias, left, caller.actor)
            await session.flush()
            await ContentRepository(session).remove_versions(row.id for row in leaving)
            AuditRepository(session, adapter.tenant).add(
                caller.actor,
                "adapter.delete",
                adapter.name,
                before={
                    "versions": {str(row.version): f"sha256:{row.digest}" for row in leaving},
                },
            )
        self._resolver.forget()
        for digest in {row.digest for row in leaving}:
            if removed := await self._remove_unused(digest):
                freed.disk_bytes += removed
                await forget_stragglers(self._engine, digest, freed)
        return AdapterDeleted(id=name, versions=[row.version for row in leaving], freed=freed)

    async def _remove_unused(self, digest: str) -> int:
        """Remove files that no version has any more, and tell their bytes. Under the files lock."""
        async with self._db.read() as session:
            if await ContentRepository(session).in_use(digest):
                return 0
        return await asyncio.to_thread(self._store.remove, digest)

    async def _set_status(self, rows: list[AdapterVersion], status: str) -> None:
        async with self._db.unit_of_work() as session:
            for row in rows:
                fresh = await session.get(AdapterVersion, row.id)
                if fresh is not None:
                    fresh.status = status
        self._resolver.forget()


async def require_adapter(adapters: AdapterRepository, name: str) -> Adapter:
    """The adapter with this id, if the caller may see it.

    Raises: ApiError(adapter_not_found | invalid_request).
    """
    reference = Reference.parse(name)
    if reference is None:
        raise adapter_not_found(name)
    if not reference.is_bare:
        raise ApiError(
            "invalid_request",
            f"{name!r} refers to one version, and this is about the whole adapter; name it by its "
            "id alone",
            param="adapter_id",
        )
    assert reference.name is not None, "a bare reference is a name"
    adapter = await adapters.get(reference.name, owner=reference.tenant)
    if adapter is None or not adapter.versions:
        raise adapter_not_found(name)
    return adapter


async def require_own(adapters: AdapterRepository, name: str) -> Adapter:
    """As `require_adapter`, to be changed. Raises also: ApiError(permission_denied)."""
    adapter = await require_adapter(adapters, name)
    adapters.caller.check_may_change(adapter.tenant, f"adapter {name!r}")
    return adapter

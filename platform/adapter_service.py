"""What can be done with adapters: register, describe, alias, resolve, remove. The registry is the
source of truth.

Order of effects, so that a crash at any point leaves the old or the new state: an upload first
commits its files, then its rows (files without rows are swept at start); a removal first makes the
engine let go, then deletes the rows, then the files. Knows nothing of HTTP bodies or tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError

from loraplex.adapters import archive, intake
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest
from loraplex.adapters.store import AdapterStore, Staging
from loraplex.engine.api import AdapterResidencyInfo
from loraplex.engine.errors import AdapterInUse, EngineDead
from loraplex.platform import adapter_view, uploads
from loraplex.platform.db import Database
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.errors import ApiError
from loraplex.platform.models import Adapter, AdapterVersion, Alias, utc_now
from loraplex.platform.names import Reference, adapter_not_found, check_name
from loraplex.platform.registration import Registration
from loraplex.platform.repositories import AdapterRepository, AuditRepository, ContentRepository
from loraplex.platform.schemas import (
    AdapterDeleted,
    AdapterDetail,
    AdapterList,
    AdapterObject,
    AdapterPatch,
    AliasObject,
    Freed,
)
from loraplex.platform.served_model import ServedModel

ARCHIVE_FILE = "archive"
MAX_RETRIES = 8
MAX_CACHED_REFERENCES = 16_384


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """What a reference means right now."""

    name: str
    version: int
    version_id: int
    digest: str
    rank: int


class AdapterService:
    def __init__(
        self, db: Database, store: AdapterStore, engine: EnginePort, max_upload_bytes: int
    ) -> None:
        self._db = db
        self._store = store
        self._engine = engine
        self._max_upload_bytes = max_upload_bytes
        self._limits = Limits(max_weights_bytes=max_upload_bytes)
        # Between "is any row using this content?" and "remove its files" no upload may commit the
        # same content.
        self._files_lock = asyncio.Lock()
        self._cache: dict[str, ResolvedAdapter] = {}
        self._cache_generation = 0

    # --- reading ---------------------------------------------------------------------------------

    async def resolve(self, text: str, *, param: str | None = None) -> ResolvedAdapter:
        """The adapter that `text` means. Raises: ApiError(adapter_not_found | adapter_not_ready).

        Cached until the registry changes through this process; inference calls it once per request.
        """
        found = self._cache.get(text)
        if found is not None:
            return found
        generation = self._cache_generation
        row = await self._row(text, param=param)
        if row.status != "ready":
            why = row.error or f"its status is {row.status}"
            raise ApiError(
                "adapter_not_ready", f"adapter {text!r} cannot be used: {why}", param=param
            )
        found = ResolvedAdapter(
            row.adapter.name, row.version, row.id, row.digest, row.manifest["rank"]
        )
        if generation == self._cache_generation:
            if len(self._cache) >= MAX_CACHED_REFERENCES:
                self._cache.clear()
            self._cache[text] = found
        return found

    async def find(self, text: str) -> ResolvedAdapter:
        """Like `resolve`, but of any status: for operators."""
        row = await self._row(text, include_draining=True)
        return ResolvedAdapter(
            row.adapter.name, row.version, row.id, row.digest, row.manifest["rank"]
        )

    async def get(self, text: str) -> AdapterDetail:
        async with self._db.read() as session:
            adapters = AdapterRepository(session)
            row = await _require(adapters, text, include_draining=True)
            adapter = await adapters.get(row.adapter.name)
        if adapter is None or not adapter.versions:
            raise adapter_not_found(text)
        return adapter_view.adapter_detail(adapter, await self.residency(), row)

    async def page(self, *, limit: int, after: str, contains: str) -> AdapterList:
        """One page by name. `contains` filters by a part of the name."""
        async with self._db.read() as session:
            rows = await AdapterRepository(session).page(
                after=after, contains=contains, limit=limit + 1
            )
        resident = await self.residency()
        return AdapterList(
            data=[adapter_view.adapter_object(row, resident) for row in rows[:limit]],
            has_more=len(rows) > limit,
        )

    async def names(self) -> list[tuple[str, int]]:
        """(id, created_at in unix seconds) of every adapter that can be used."""
        async with self._db.read() as session:
            rows = await AdapterRepository(session).names()
        return [(name, int(created_at.timestamp())) for name, created_at in rows]

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
        self, chunks: AsyncIterator[bytes], content_type: str, model: ServedModel, actor: str
    ) -> tuple[AdapterObject, bool]:
        """Receive, check, store and register an upload. Returns the adapter and whether it is new.

        Raises: ApiError, AdapterRefused (with every problem found), StorageFull.
        """
        async with self._staging() as staging:
            upload = await uploads.receive_upload(
                chunks, content_type, self._writers(staging), self._max_upload_bytes
            )
            order = Registration.from_upload(upload, model)
            manifest = await asyncio.to_thread(
                self._inspect, staging, "archive" in upload.files, model
            )
            async with self._files_lock:
                await asyncio.to_thread(self._store.commit, staging, manifest)
                adapter, created = await self._insert(order, manifest, model, actor)
        self._forget_cached()
        return adapter_view.adapter_object(adapter, await self.residency()), created

    @asynccontextmanager
    async def _staging(self) -> AsyncIterator[Staging]:
        """A staging folder, entered and left in a worker thread: both wait for the disk."""
        context = self._store.staging()
        staging = await asyncio.to_thread(context.__enter__)
        try:
            yield staging
        finally:
            await asyncio.shield(asyncio.to_thread(context.__exit__, None, None, None))

    def _writers(self, staging: Staging) -> dict[str, uploads.OpenWriter]:
        limits = self._limits
        return {
            "config": lambda: staging.writer(CONFIG_FILE, limits.max_config_bytes),
            "weights": lambda: staging.writer(WEIGHTS_FILE, limits.max_weights_bytes),
            "archive": lambda: staging.writer(ARCHIVE_FILE, self._max_upload_bytes),
        }

    def _inspect(self, staging: Staging, packed: bool, model: ServedModel) -> AdapterManifest:
        if packed:
            archive.unpack(staging.path / ARCHIVE_FILE, staging, self._limits)
        return intake.inspect(staging.path, model.info.modules, self._limits, model.info.name)

    async def _insert(
        self, order: Registration, manifest: AdapterManifest, model: ServedModel, actor: str
    ) -> tuple[Adapter, bool]:
        for _ in range(MAX_RETRIES):
            try:
                return await self._try_insert(order, manifest, model, actor)
            except IntegrityError:  # another server took the same name or version number first
                continue
        raise ApiError("name_taken", f"adapter {order.name!r} is being changed by others; retry")

    async def _try_insert(
        self, order: Registration, manifest: AdapterManifest, model: ServedModel, actor: str
    ) -> tuple[Adapter, bool]:
        async with self._db.unit_of_work() as session:
            adapters = AdapterRepository(session)
            adapter = await adapters.get(order.name, include_deleted=True)
            if adapter is None:
                adapter = Adapter(name=order.name, metadata_={}, versions=[], aliases=[])
                session.add(adapter)
                await session.flush()
            if adapter.deleted_at is not None:
                adapter.deleted_at, adapter.created_at = None, utc_now()
                adapter.description, adapter.metadata_ = "", {}
            newest = adapter.versions[-1] if adapter.versions else None
            created = newest is None or newest.digest != manifest.digest or newest.status != "ready"
            if order.description is not None:
                adapter.description = order.description
            if order.metadata is not None:
                adapter.metadata_ = order.metadata
            if created:
                newest = AdapterVersion(
                    version=adapter.next_version,
                    digest=manifest.digest,
                    base_model=model.name,
                    model_signature=model.signature,
                    manifest=adapter_view.manifest_summary(manifest),
                )
                adapter.next_version += 1
                adapter.versions.append(newest)
                await session.flush()
                AuditRepository(session).add(
                    actor,
                    "adapter.register",
                    order.name,
                    after={"version": newest.version, "digest": f"sha256:{newest.digest}"},
                )
            assert newest is not None
            if order.alias is not None:
                _set_alias(session, adapter, order.alias, newest.version, actor)
            await session.flush()
        return adapter, created

    # --- changing --------------------------------------------------------------------------------

    async def patch(self, name: str, change: AdapterPatch, actor: str) -> AdapterDetail:
        async with self._db.unit_of_work() as session:
            adapter = await _require_adapter(AdapterRepository(session), name)
            before = {"description": adapter.description, "metadata": adapter.metadata_}
            if change.description is not None:
                adapter.description = change.description
            if change.metadata is not None:
                adapter.metadata_ = change.metadata
            after = {"description": adapter.description, "metadata": adapter.metadata_}
            if before != after:
                AuditRepository(session).add(
                    actor, "adapter.patch", name, before=before, after=after
                )
        return await self.get(name)

    async def set_alias(self, name: str, alias: str, version: int, actor: str) -> AliasObject:
        check_name(alias, what="alias", param="alias")
        async with self._db.unit_of_work() as session:
            adapter = await _require_adapter(AdapterRepository(session), name)
            if version not in {row.version for row in adapter.versions}:
                raise adapter_not_found(f"{name}@{version}", param="version")
            _set_alias(session, adapter, alias, version, actor)
        self._forget_cached()
        return AliasObject(id=name, alias=alias, version=version)

    async def delete_alias(self, name: str, alias: str, actor: str) -> None:
        async with self._db.unit_of_work() as session:
            adapter = await _require_adapter(AdapterRepository(session), name)
            row = next((row for row in adapter.aliases if row.alias == alias), None)
            if row is None:
                raise ApiError(
                    "alias_not_found", f"adapter {name!r} has no alias {alias!r}", param="alias"
                )
            adapter.aliases.remove(row)
            AuditRepository(session).add(
                actor, "alias.delete", f"{name}:{alias}", before={"version": row.version}
            )
        self._forget_cached()

    # --- removing --------------------------------------------------------------------------------

    async def delete(
        self,
        name: str,
        *,
        version: int | None,
        force: bool,
        drain_timeout_s: float | None,
        actor: str,
    ) -> AdapterDeleted:
        """Remove one version or all of them. New requests are refused from the first moment on.

        Running requests: `force` aborts them, `drain_timeout_s` waits for them so long, else they
        are a conflict. Raises: ApiError(adapter_not_found | adapter_in_use | version_has_alias);
        then nothing has changed.
        """
        leaving = await self._begin_delete(name, version, force)
        try:
            freed = await self._release(leaving, force, drain_timeout_s)
        except BaseException:
            await asyncio.shield(self._set_status(leaving, "ready"))
            raise
        async with self._files_lock:
            return await asyncio.shield(self._finish_delete(name, leaving, freed, actor))

    async def _begin_delete(
        self, name: str, version: int | None, force: bool
    ) -> list[AdapterVersion]:
        async with self._db.unit_of_work() as session:
            adapter = await _require_adapter(AdapterRepository(session), name)
            leaving = [row for row in adapter.versions if version in (None, row.version)]
            if not leaving:
                raise adapter_not_found(f"{name}@{version}", param="version")
            aliases = [a.alias for a in adapter.aliases if a.version == version]
            if aliases and not force:
                raise ApiError(
                    "version_has_alias",
                    f"alias {aliases[0]!r} points to {name}@{version}; "
                    "move it first, or use force=true",
                )
            if any(row.status == "draining" for row in leaving):
                raise ApiError("adapter_in_use", f"adapter {name!r} is being deleted already")
            for row in leaving:
                row.status = "draining"
        self._forget_cached()
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
        self, name: str, leaving: list[AdapterVersion], freed: Freed, actor: str
    ) -> AdapterDeleted:
        async with self._db.unit_of_work() as session:
            await ContentRepository(session).remove_versions(row.id for row in leaving)
            adapter = await AdapterRepository(session).get(name)
            if adapter is not None and not adapter.versions:
                adapter.deleted_at = utc_now()
            AuditRepository(session).add(
                actor,
                "adapter.delete",
                name,
                before={
                    "versions": {str(row.version): f"sha256:{row.digest}" for row in leaving},
                },
            )
        self._forget_cached()
        for digest in {row.digest for row in leaving}:
            async with self._db.read() as session:
                in_use = await ContentRepository(session).in_use(digest)
            if not in_use:
                freed.disk_bytes += await asyncio.to_thread(self._store.remove, digest)
        return AdapterDeleted(id=name, versions=[row.version for row in leaving], freed=freed)

    async def _set_status(self, rows: list[AdapterVersion], status: str) -> None:
        async with self._db.unit_of_work() as session:
            for row in rows:
                fresh = await session.get(AdapterVersion, row.id)
                if fresh is not None:
                    fresh.status = status
        self._forget_cached()

    # --- inside ----------------------------------------------------------------------------------

    async def _row(
        self, text: str, *, param: str | None = None, include_draining: bool = False
    ) -> AdapterVersion:
        async with self._db.read() as session:
            return await _require(
                AdapterRepository(session), text, param=param, include_draining=include_draining
            )

    def _forget_cached(self) -> None:
        self._cache.clear()
        self._cache_generation += 1


def _set_alias(session: Any, adapter: Adapter, alias: str, version: int, actor: str) -> None:
    row = next((row for row in adapter.aliases if row.alias == alias), None)
    before = None if row is None else {"version": row.version}
    if before == {"version": version}:
        return
    if row is None:
        adapter.aliases.append(Alias(alias=alias, version=version))
    else:
        row.version = version
    AuditRepository(session).add(
        actor, "alias.set", f"{adapter.name}:{alias}", before=before, after={"version": version}
    )


async def _require(
    adapters: AdapterRepository,
    text: str,
    *,
    param: str | None = None,
    include_draining: bool = False,
) -> AdapterVersion:
    reference = Reference.parse(text)
    row = None
    if reference is not None:
        row = await adapters.resolve(reference, include_draining=include_draining)
    if row is None:
        raise adapter_not_found(text, param=param)
    return row


async def _require_adapter(adapters: AdapterRepository, name: str) -> Adapter:
    adapter = await adapters.get(name)
    if adapter is None or not adapter.versions:
        raise adapter_not_found(name)
    return adapter

"""Pulls: an adapter fetched from a source into the same intake as an upload.

One pull per adapter at a time; the same order again joins it. Each ends in exactly one way: ready,
failed (with the reason that an upload would get, or the source's), or cancelled, and nothing is
left in staging. Its progress lives in memory, its row says what it was and how it ended: a row
without an end at start is a pull that a stop of the server interrupted. It is begun again, once,
unless it needed a secret, which is never kept.

Knows nothing of the kinds of sources.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import Any

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest
from loraplex.adapters.store import Staging
from loraplex.platform.adapter_service import ARCHIVE_FILE, AdapterService
from loraplex.platform.callers import Caller, system
from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.finishing import finished, irrevocable
from loraplex.platform.models import DEFAULT_TENANT, Pull, utc_now
from loraplex.platform.names import Reference
from loraplex.platform.origin_queries import pulled_versions
from loraplex.platform.registration import Registration
from loraplex.platform.repositories import AuditRepository, PullRepository
from loraplex.platform.served_model import ServedModel
from loraplex.platform.sources import pull_view
from loraplex.platform.sources.http_origins import SIGNED
from loraplex.platform.sources.origin import Origin
from loraplex.platform.sources.parsing import Sources
from loraplex.platform.sources.pull_rows import copy_of, new_row, ordered, problem_of
from loraplex.platform.sources.schemas import PullList, PullObject, PullOrder
from loraplex.platform.sources.transfer import Progress, fetch
from loraplex.platform.tenant_repositories import require_tenant

log = logging.getLogger(__name__)

MAX_UNFINISHED = 1000
MAX_RESTARTS = 1
_UNFINISHED = frozenset({"queued", "downloading", "validating"})


@dataclass(slots=True, eq=False)
class Job:
    """A pull under way. `row` is ours alone; it is copied to the registry when it changes."""

    row: Pull
    order: Registration
    origin: Origin
    source: str  # whole: with this and the token two orders are told apart
    token: str | None = None
    by_operator: bool = False  # not known any more of one that a stop interrupted
    progress: Progress = field(default_factory=Progress)
    cancelled_by: str | None = None
    task: asyncio.Task[None] | None = None

    def is_same(self, other: Job) -> bool:
        return self._identity() == other._identity()

    def _identity(self) -> tuple[Any, ...]:
        return (self.source, self.row.pin, self.row.stamp, self.order, self.token)


@dataclass(slots=True)
class PullCounters:
    """For the metrics."""

    ended: dict[str, int] = field(default_factory=dict)  # outcome -> pulls
    running: dict[str, int] = field(default_factory=dict)  # status -> pulls under way
    bytes_pulled: int = 0


class PullService:
    """For one event loop. `begin` once the model is known, `close` at the end."""

    def __init__(
        self,
        db: Database,
        adapters: AdapterService,
        sources: Sources,
        *,
        max_pulls: int,
        timeout_s: float,
    ) -> None:
        self._db = db
        self._adapters = adapters
        self._sources = sources
        self._places = asyncio.Semaphore(max_pulls)
        self._timeout_s = timeout_s
        self._jobs: dict[tuple[str, str], Job] = {}
        self._beginning = asyncio.Lock()  # a pull is there wholly, or not yet
        self._counters = PullCounters()

    # --- orders -----------------------------------------------------------------------------------

    async def start(self, caller: Caller, order: PullOrder, model: ServedModel) -> None:
        """Begin a pull, or join the same one that is under way.

        Raises: ApiError(invalid_request | name_taken | source_not_allowed | pull_under_way |
        queue_full).
        """
        caller.check_may_register(order.name)
        token = None if order.token is None else order.token.get_secret_value()
        registration = Registration.checked(
            model,
            name=order.name,
            alias=order.alias,
            description=order.description,
            metadata=order.metadata,
        )
        origin = self._sources.origin(order.source, order.revision, token)
        async with self._db.read() as session:
            await require_tenant(session, caller.home)
        row = new_row(registration, origin, caller)
        row.revision = order.revision
        row.pin = None if order.digest is None else order.digest.removeprefix("sha256:")
        row.has_secret = token is not None or origin.shown.endswith(SIGNED)
        source = order.source if row.has_secret else origin.shown
        job = Job(row, registration, origin, source, token, caller.is_operator)
        await self._launch(job, model)

    async def pull_folder(
        self, caller: Caller, name: str, origin: Origin, stamp: str, model: ServedModel
    ) -> Job:
        """Begin a pull of a watched folder in the state `stamp`. Raises: as `start`."""
        registration = Registration.checked(
            model, name=name, alias=None, description=None, metadata=None
        )
        row = new_row(registration, origin, caller)
        row.stamp = stamp
        job = Job(row, registration, origin, origin.shown)
        await self._launch(job, model)
        return job

    async def cancel(self, caller: Caller, name: str) -> PullObject:
        """Stop a pull and forget it; one that has ended is forgotten.

        One that is being registered at this moment ends well instead.

        Raises: ApiError(not_found).
        """
        stopped = await self.stop(caller, name)
        if stopped is not None:
            return stopped
        async with self._db.unit_of_work() as session:
            pulls = PullRepository(session)
            key = _key(caller, name)
            row = None if key is None else await pulls.get(*key)
            if row is None:
                raise never_pulled(name)
            await pulls.remove(row.tenant, row.name)
            AuditRepository(session, row.tenant).add(
                caller.actor, "adapter.pull.forget", row.name, before=ordered(row)
            )
        return pull_view.pull_object(row)

    async def stop(self, caller: Caller, name: str) -> PullObject | None:
        """Cancel the pull of this name that is under way, if there is one, and wait for its end."""
        async with self._beginning:
            job = self._job(caller, name)
        if job is None or job.task is None:
            return None
        job.cancelled_by = caller.actor
        job.task.cancel()
        await asyncio.wait({job.task})
        return pull_view.pull_object(job.row, job.progress)

    async def forget(self, caller: Caller, name: str) -> None:
        """Drop the record of an ended pull."""
        key = _key(caller, name)
        if key is not None:
            async with self._db.unit_of_work() as session:
                await PullRepository(session).remove(*key)

    # --- reading ----------------------------------------------------------------------------------

    async def find(self, caller: Caller, name: str) -> PullObject | None:
        """The last pull of this name, if the caller may see it."""
        job = self._job(caller, name)
        if job is not None:
            return pull_view.pull_object(job.row, job.progress)
        row = await self.row(caller, name)
        return None if row is None else pull_view.pull_object(row)

    async def ended(self, caller: Caller, name: str) -> PullObject:
        """The pull of this name, once it has ended. Raises: ApiError(not_found)."""
        job = self._job(caller, name)
        if job is not None and job.task is not None:
            await asyncio.wait({job.task})
        found = await self.find(caller, name)
        if found is not None:
            return found
        if job is None:
            raise never_pulled(name)
        return pull_view.pull_object(job.row, job.progress)  # cancelled: it left no record

    async def folder_stamps(self) -> dict[str, str]:
        """adapter -> the state of the watched folder that was pulled last, and went well."""
        async with self._db.read() as session:
            rows = await PullRepository(session).all(DEFAULT_TENANT)
        return {row.name: row.stamp for row in rows if row.stamp and row.status == "ready"}

    async def row(self, caller: Caller, name: str) -> Pull | None:
        """The last pull of this name as the registry has it, or as it is under way."""
        key = _key(caller, name)
        if key is None:
            return None
        job = self._jobs.get(key)
        if job is not None:
            return job.row
        async with self._db.read() as session:
            return await PullRepository(session).get(*key)

    async def versions(self, caller: Caller, name: str) -> set[int]:
        """Those of an adapter of the caller's own that were pulled, not uploaded."""
        key = _key(caller, name)
        if key is None:
            return set()
        tenant, bare = key
        async with self._db.read() as session:
            return await pulled_versions(session, tenant, bare)

    def _job(self, caller: Caller, name: str) -> Job | None:
        key = _key(caller, name)
        return None if key is None else self._jobs.get(key)

    async def page(self, caller: Caller) -> PullList:
        """The last pull of every name: an operator's of all tenants, as that one names them."""
        async with self._db.read() as session:
            rows = await PullRepository(session).all(caller.tenant)
        data = []
        for row in rows:
            if _key(caller, f"{row.tenant}/{row.name}") is None:
                continue
            job = self._jobs.get((row.tenant, row.name))
            pull = (
                pull_view.pull_object(row)
                if job is None
                else pull_view.pull_object(job.row, job.progress)
            )
            data.append(pull.model_copy(update={"id": caller.shown(row.tenant, row.name)}))
        return PullList(data=data)

    def counters(self) -> PullCounters:
        """As of now."""
        running = dict.fromkeys(sorted(_UNFINISHED), 0)
        for job in self._jobs.values():
            running[job.row.status] += 1
        self._counters.running = running
        return self._counters

    # --- start and end of the server --------------------------------------------------------------

    async def begin(self, model: ServedModel) -> None:
        """Begin again what the last stop interrupted, or say why not."""
        async with self._db.read() as session:
            rows = [r for r in await PullRepository(session).all() if r.status in _UNFINISHED]
        for row in rows:
            await self._resume(row, model)

    async def close(self) -> None:
        """Stop every pull; their rows stay as they are, for the next `begin`."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _resume(self, row: Pull, model: ServedModel) -> None:
        order = Registration(row.name, row.description, row.metadata_, row.alias)
        try:
            if row.stamp is not None:
                why = "its folder is looked at again"
                raise ApiError("pull_interrupted", f"the server was stopped meanwhile; {why}")
            if row.has_secret:
                why = "it used a token or a signed URL, which is never kept: pull it again"
                raise ApiError("pull_interrupted", f"the server was stopped meanwhile; {why}")
            if row.restarts >= MAX_RESTARTS:
                why = "and it was begun again before: pull it once more if that was no accident"
                raise ApiError("pull_interrupted", f"the server was stopped meanwhile, {why}")
            origin = self._sources.origin(row.source, row.revision)
        except ApiError as error:
            await self._end(row, "failed", error)
            return
        row.restarts += 1
        row.status = "queued"
        row.bytes_done, row.bytes_total = 0, None
        job = Job(copy_of(row), order, origin, origin.shown)
        await self._launch(job, model, action="adapter.pull.restart")

    # --- one pull ---------------------------------------------------------------------------------

    async def _launch(self, job: Job, model: ServedModel, action: str = "adapter.pull") -> None:
        name = job.row.name
        key = (job.row.tenant, name)
        async with self._beginning:
            active = self._jobs.get(key)
            if active is not None:
                if active.is_same(job):
                    return
                raise ApiError(
                    "pull_under_way",
                    f"adapter {name!r} is being pulled from {active.row.source}; wait for its end, "
                    f"or cancel it with DELETE /v1/adapters/{name}/pull",
                )
            if len(self._jobs) >= MAX_UNFINISHED:
                raise ApiError("queue_full", f"{MAX_UNFINISHED} pulls are waiting; try again later")
            await self._save(job.row, action, ordered(job.row))
            self._jobs[key] = job
            job.task = asyncio.create_task(self._run(job, model), name=f"pull {name}")

    async def _run(self, job: Job, model: ServedModel) -> None:
        row = job.row
        try:
            try:
                async with self._places:
                    row.status = "downloading"
                    await self._attempt(job, model)
            except asyncio.CancelledError:
                if job.cancelled_by is None:  # the server stops; the row stays unfinished
                    return
                await finished(self._forget(job))
            except (ApiError, AdapterError) as error:
                await finished(self._end(row, "failed", error, job.progress))
            except Exception:
                log.exception("pull_broke", extra={"adapter": row.name})
                ours = ApiError("internal_error", "an internal error; the server's log has more")
                await finished(self._end(row, "failed", ours, job.progress))
            else:
                await finished(self._end(row, "ready", None, job.progress))
        finally:
            self._counters.bytes_pulled += job.progress.bytes_done
            key = (row.tenant, row.name)
            if self._jobs.get(key) is job:  # the server stops, or its end could not be saved
                del self._jobs[key]

    async def _attempt(self, job: Job, model: ServedModel) -> None:
        row = job.row
        async with self._adapters.staging() as staging:
            try:
                async with asyncio.timeout(self._timeout_s):
                    manifest = await self._bring(job, staging, model)
            except TimeoutError:
                raise ApiError(
                    "source_failed",
                    f"{row.source} took longer than {self._timeout_s:g} s; raise --pull-timeout-s",
                ) from None
            if row.pin not in (None, manifest.digest):
                raise ApiError(
                    "digest_mismatch",
                    f"{row.source} is sha256:{manifest.digest}, the order said "
                    f"sha256:{row.pin}; nothing was registered",
                    param="digest",
                )
            caller = system(row.actor, row.tenant)
            if job.by_operator:
                caller = replace(caller, tenant=None)
            adapter, _ = await irrevocable(
                self._adapters.admit(caller, job.order, staging, manifest, model, row.source)
            )
            row.version, row.digest = adapter.versions[-1].version, manifest.digest

    async def _bring(self, job: Job, staging: Staging, model: ServedModel) -> AdapterManifest:
        names = [ARCHIVE_FILE] if job.origin.packed else [CONFIG_FILE, WEIGHTS_FILE]
        for name in names:
            limit = self._adapters.max_bytes(name)
            last = name == names[-1]
            await fetch(job.origin, name, staging, limit, job.progress, last=last)
        job.row.status = "validating"
        return await finished(
            asyncio.to_thread(self._adapters.inspect, staging, job.origin.packed, model)
        )

    # --- the registry -----------------------------------------------------------------------------

    async def _save(self, row: Pull, action: str, after: dict[str, Any]) -> None:
        async with self._db.unit_of_work() as session:
            await PullRepository(session).replace(copy_of(row))
            AuditRepository(session, row.tenant).add(row.actor, action, row.name, after=after)

    async def _end(
        self,
        row: Pull,
        status: str,
        error: ApiError | AdapterError | None,
        progress: Progress | None = None,
    ) -> None:
        ended = copy_of(row)
        if progress is not None:
            ended.bytes_done, ended.retries = progress.bytes_done, progress.retries
            ended.bytes_total = progress.bytes_total
        ended.status, ended.ended_at = status, utc_now()
        ended.error = None if error is None else problem_of(error, row.source)
        async with self._db.unit_of_work() as session:
            await PullRepository(session).replace(ended)
            if error is not None:
                after = {"source": row.source, "code": error.code, "message": error.message}
                AuditRepository(session, row.tenant).add(
                    row.actor, "adapter.pull.fail", row.name, after=after
                )
        self._over(row, status, error)

    async def _forget(self, job: Job) -> None:
        row = job.row
        row.ended_at = utc_now()
        async with self._db.unit_of_work() as session:
            await PullRepository(session).remove(row.tenant, row.name)
            AuditRepository(session, row.tenant).add(
                job.cancelled_by or row.actor,
                "adapter.pull.cancel",
                row.name,
                before=ordered(row),
            )
        self._over(row, "cancelled", None)

    def _over(self, row: Pull, status: str, error: ApiError | AdapterError | None) -> None:
        """Whoever sees the end may order the next pull at once."""
        row.status = status
        self._jobs.pop((row.tenant, row.name), None)
        ended = self._counters.ended
        ended[status] = ended.get(status, 0) + 1
        fields: dict[str, Any] = {"adapter": row.name, "source": row.source, "status": status}
        if error is not None:
            fields |= {"code": error.code, "reason": error.message}
        log.info("pull", extra=fields)


def _key(caller: Caller, text: str) -> tuple[str, str] | None:
    """(tenant, name) of a pull that is the caller's own; None for others'."""
    reference = Reference.parse(text)
    if reference is None or reference.name is None or not reference.is_bare:
        return None
    owner = reference.tenant or caller.home
    listed = caller.adapters is None or f"{owner}/{reference.name}" in caller.adapters
    return (owner, reference.name) if listed and caller.may_change(owner) else None


def never_pulled(name: str) -> ApiError:
    return ApiError("not_found", f"adapter {name[:140]!r} was never pulled")

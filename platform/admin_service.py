"""The operator's view: what is resident where, what runs, where the bytes are, what was changed by
whom.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from loraplex.adapters.store import AdapterStore
from loraplex.engine.api import AdapterResidencyInfo, AdapterState, MemoryInfo
from loraplex.platform import adapter_view
from loraplex.platform.adapter_series import AdapterLabel
from loraplex.platform.adapter_service import AdapterService
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.limits import Admission
from loraplex.platform.models import AdapterVersion
from loraplex.platform.repositories import AdapterRepository, AuditRepository
from loraplex.platform.residency_log import MAX_KEPT, ResidencyLog
from loraplex.platform.resolution import ResolvedAdapter, Resolver
from loraplex.platform.schemas import (
    AdapterRoom,
    Event,
    EventList,
    Evicted,
    EvictOrder,
    Freed,
    Memory,
    MemoryPurpose,
    RequestList,
    RequestObject,
    SharedMemory,
    Slot,
    SlotList,
    SlotTotals,
    TieredAdapterList,
    TokenRoom,
    TransitionList,
    TransitionObject,
)

_ON_DEVICE = frozenset({AdapterState.DEVICE, AdapterState.DEVICE_LOADING, AdapterState.DRAINING})
_RANKS = (8, 16, 32, 64, 128)
_PAGE_RANKS = 16
_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdminService:
    def __init__(
        self,
        db: Database,
        store: AdapterStore,
        engine: EnginePort,
        adapters: AdapterService,
        resolver: Resolver,
        admission: Admission,
    ) -> None:
        self._db = db
        self._resolver = resolver
        self._store = store
        self._engine = engine
        self._adapters = adapters
        self._admission = admission
        self.residency_log = ResidencyLog()
        engine.on_event(self.residency_log.hear)

    async def slots(self, caller: Caller) -> SlotList:
        """Adapters on the device: a tenant sees its own, and no totals."""
        resident = [info for info in await self._engine.adapters() if info.state in _ON_DEVICE]
        memory = await self._engine.memory()
        names = await self._named(caller, (info.digest for info in resident))
        page = max(1, memory.adapter_page_bytes)
        free = memory.adapter_bytes_total - memory.adapter_bytes_used
        return SlotList(
            data=[
                adapter_view.slot(caller, info, names.get(info.digest))
                for info in resident
                if caller.is_operator or info.digest in names
            ],
            totals=None
            if not caller.is_operator
            else SlotTotals(
                adapters=len(resident),
                pages_total=memory.adapter_bytes_total // page,
                pages_used=-(-memory.adapter_bytes_used // page),
                pages_free=free // page,
                bytes_total=memory.adapter_bytes_total,
                bytes_used=memory.adapter_bytes_used,
                bytes_free=free,
            ),
        )

    async def tiers(self, caller: Caller) -> TieredAdapterList:
        """Every version of every adapter, of a tenant its own, with where it is and what it takes
        there.
        """
        async with self._db.read() as session:
            rows = await AdapterRepository(session, caller).versions()
        resident = await self._adapters.residency()
        sizes = await asyncio.to_thread(
            lambda: {digest: self._store.disk_bytes(digest) for digest in {r.digest for r in rows}}
        )
        return TieredAdapterList(
            data=[
                adapter_view.tiered_adapter(
                    caller, row, resident.get(row.digest), sizes[row.digest]
                )
                for row in rows
            ]
        )

    async def load(self, caller: Caller, text: str, *, wait: bool) -> Slot:
        adapter = await self._resolver.one(caller, text)
        caller.check_may_change(adapter.tenant, f"adapter {adapter.name!r}")
        info = await self._engine.load(adapter.digest, wait=wait)
        await self._record(caller, "adapter.load", adapter)
        return await self._slot(caller, info)

    async def evict(self, caller: Caller, text: str, order: EvictOrder) -> Evicted:
        adapter = await self._resolver.find(caller, text)
        caller.check_may_change(adapter.tenant, f"adapter {adapter.name!r}")
        freed = await self._engine.evict(
            adapter.digest, tier=order.tier, drain=order.drain, timeout_s=order.timeout_s
        )
        await self._record(caller, f"adapter.evict.{order.tier}", adapter)
        return Evicted(
            id=adapter.name,
            version=adapter.version,
            digest=f"sha256:{adapter.digest}",
            tier=order.tier,
            freed=Freed(device_bytes=freed.device_bytes, host_bytes=freed.host_bytes),
        )

    async def pin(self, caller: Caller, text: str, *, pinned: bool) -> Slot:
        if pinned:
            adapter = await self._resolver.one(caller, text)
            info = await self._engine.pin(adapter.digest)
        else:
            adapter = await self._resolver.find(caller, text)
            info = await self._engine.unpin(adapter.digest)
        action = "adapter.pin" if pinned else "adapter.unpin"
        await self._record(caller, action, adapter)
        return await self._slot(caller, info)

    async def memory(self) -> Memory:
        info = await self._engine.memory()
        free = info.adapter_bytes_total - info.adapter_bytes_used
        obtainable = free + info.adapter_bytes_obtainable
        most = max(info.adapter_bytes_max, info.adapter_bytes_total)
        blocks_free = info.kv_blocks_total - info.kv_blocks_used + info.kv_blocks_obtainable
        page = max(1, info.adapter_page_bytes)
        return Memory(
            weights_bytes=info.weights_bytes,
            kv_cache_bytes=info.kv_cache_bytes,
            kv_block_bytes=info.kv_block_bytes,
            kv_blocks_total=info.kv_blocks_total,
            kv_blocks_used=info.kv_blocks_used,
            kv_blocks_cached=info.kv_blocks_cached,
            block_size=info.block_size,
            adapter_bytes_total=info.adapter_bytes_total,
            adapter_bytes_used=info.adapter_bytes_used,
            adapter_bytes_free=free,
            adapter_page_bytes=info.adapter_page_bytes,
            host_adapter_bytes_total=info.host_adapter_bytes_total,
            host_adapter_bytes_used=info.host_adapter_bytes_used,
            workspace_bytes=info.workspace_bytes,
            device_bytes_total=info.device_bytes_total,
            device_bytes_free=info.device_bytes_free,
            shared=_shared(info),
            not_shared_because=info.static_because,
            tokens_that_fit=TokenRoom(
                tokens=blocks_free * info.block_size,
                in_all=max(info.kv_blocks_max, info.kv_blocks_total) * info.block_size,
            ),
            adapters_that_fit=[
                AdapterRoom(
                    rank=rank,
                    adapters=obtainable // (page * -(-rank // _PAGE_RANKS)),
                    in_all=most // (page * -(-rank // _PAGE_RANKS)),
                )
                for rank in _RANKS
            ],
            explanation=_explained(info),
        )

    async def transitions(self, caller: Caller, text: str | None, limit: int) -> TransitionList:
        """The latest changes of residency, newest first; a tenant sees those of its adapters."""
        digest = None if text is None else (await self._resolver.find(caller, text)).digest
        events = self.residency_log.recent(limit if caller.is_operator else MAX_KEPT, digest)
        rows = await self._named(caller, (event.digest for event in events))
        names = {
            digest: (caller.shown(row.adapter.tenant, row.adapter.name), row.version)
            for digest, row in rows.items()
        }
        if not caller.is_operator:
            events = [event for event in events if event.digest in names][:limit]

        def told(detail: str) -> str:
            """Whom an adapter makes room for may be another tenant's."""
            if caller.is_operator:
                return detail
            return _DIGEST.sub(lambda m: m[0] if m[0] in names else "another adapter", detail)

        return TransitionList(
            data=[
                TransitionObject(
                    id=names[event.digest][0] if event.digest in names else None,
                    version=names[event.digest][1] if event.digest in names else None,
                    digest=f"sha256:{event.digest}",
                    at=event.time,
                    before=str(event.before),
                    after=str(event.after),
                    seconds=event.seconds,
                    reason=event.reason,
                    detail=told(event.detail),
                    phases=event.phases,
                )
                for event in events
            ]
        )

    async def requests(self, caller: Caller) -> RequestList:
        """Running and waiting sequences; a tenant sees those that its own keys began."""
        infos = await self._engine.requests()
        if not caller.is_operator:
            infos = [info for info in infos if self._admission.is_of(info.request_id, caller)]
        names = await self._named(caller, (digest for info in infos for digest in info.digests))
        return RequestList(
            data=[
                RequestObject(
                    id=info.request_id,
                    state=info.state,
                    waiting_reason=info.waiting_reason,
                    adapters=[
                        f"{caller.shown(names[d].adapter.tenant, names[d].adapter.name)}"
                        f"@{names[d].version}"
                        for d in info.digests
                        if d in names
                    ],
                    digests=[f"sha256:{digest}" for digest in info.digests],
                    prompt_tokens=info.prompt_tokens,
                    output_tokens=info.output_tokens,
                    age_s=info.age_s,
                )
                for info in infos
            ]
        )

    async def events(self, caller: Caller, *, after: int, limit: int) -> EventList:
        """The audit log, of a tenant its own."""
        async with self._db.read() as session:
            rows = await AuditRepository(session, caller.tenant).page(after=after, limit=limit + 1)
        return EventList(
            data=[
                Event(
                    id=row.id,
                    at=int(row.at.timestamp()),
                    tenant=row.tenant,
                    actor=row.actor,
                    action=row.action,
                    subject=row.subject,
                    before=row.before,
                    after=row.after,
                )
                for row in rows[:limit]
            ],
            has_more=len(rows) > limit,
        )

    async def names(self, digests: Iterable[str]) -> dict[str, AdapterLabel]:
        """digest -> adapter and version as an operator calls them, of those that still have one."""
        operator = Caller()
        return {
            digest: (operator.shown(row.adapter.tenant, row.adapter.name), str(row.version))
            for digest, row in (await self._named(operator, digests)).items()
        }

    async def _named(self, caller: Caller, digests: Iterable[str]) -> dict[str, AdapterVersion]:
        wanted = set(digests)
        if not wanted:
            return {}
        async with self._db.read() as session:
            return await AdapterRepository(session, caller).named(wanted)

    async def _slot(self, caller: Caller, info: AdapterResidencyInfo) -> Slot:
        names = await self._named(caller, [info.digest])
        return adapter_view.slot(caller, info, names.get(info.digest))

    async def _record(self, caller: Caller, action: str, adapter: ResolvedAdapter) -> None:
        name = adapter.name.rpartition("/")[2]
        async with self._db.unit_of_work() as session:
            AuditRepository(session, adapter.tenant).add(
                caller.actor, action, f"{name}@{adapter.version}"
            )


def _shared(info: MemoryInfo) -> SharedMemory | None:
    if info.superblock_bytes == 0:
        return None
    kv_bytes_max = info.kv_blocks_max * info.kv_block_bytes
    return SharedMemory(
        bytes=info.shared_bytes,
        superblock_bytes=info.superblock_bytes,
        kv_cache_bytes_min=info.kv_blocks_min * info.kv_block_bytes,
        kv_cache_bytes_max=kv_bytes_max,
        adapter_bytes_min=info.shared_bytes - kv_bytes_max,
        adapter_bytes_max=info.adapter_bytes_max,
        to_kv_cache=info.superblocks_to_kv,
        to_adapters=info.superblocks_to_adapters,
        lost=info.superblocks_lost,
    )


def _explained(info: MemoryInfo) -> list[MemoryPurpose]:
    """Where the bytes are, in words; the same purposes as in the start-up table and in
    `loraplex plan`.
    """
    page = max(1, info.adapter_page_bytes)
    tokens = info.kv_blocks_total * info.block_size
    host = info.host_adapter_bytes_total
    return [
        MemoryPurpose(
            purpose="weights",
            bytes=info.weights_bytes,
            used=info.weights_bytes,
            text="the base model, shared by all adapters",
        ),
        MemoryPurpose(
            purpose="kv cache",
            bytes=info.kv_cache_bytes,
            used=info.kv_blocks_used * info.kv_block_bytes,
            text=f"{tokens:,} tokens in {info.kv_blocks_total:,} blocks of {info.block_size}; "
            f"{info.kv_blocks_cached:,} free blocks hold reusable prefixes"
            + _range(info, info.kv_blocks_min, info.kv_blocks_max, info.block_size, "tokens"),
        ),
        MemoryPurpose(
            purpose="adapters on the device",
            bytes=info.adapter_bytes_total,
            used=info.adapter_bytes_used,
            text=f"{info.adapter_bytes_total // page:,} pages of rank {_PAGE_RANKS}"
            + _range(info, 0, info.adapter_bytes_max // page, 1, "pages"),
        ),
        MemoryPurpose(
            purpose="adapters on the host",
            bytes=host,
            used=info.host_adapter_bytes_used,
            text=f"{host // page:,} pages of rank {_PAGE_RANKS}: what left the device comes back "
            "from here without reading files",
        ),
        MemoryPurpose(
            purpose="workspace",
            bytes=info.workspace_bytes,
            used=info.workspace_bytes,
            text="the largest step, and the runtime",
        ),
        MemoryPurpose(
            purpose="left to others",
            bytes=info.device_bytes_free,
            used=0,
            text=f"free now, of {info.device_bytes_total:,} bytes of the device",
        ),
    ]


def _range(info: MemoryInfo, least: int, most: int, factor: int, unit: str) -> str:
    """What trading can make of a size."""
    if info.superblock_bytes == 0:
        return ""
    floor = f"never fewer than {least * factor:,}, " if least else ""
    return f"; shared: {floor}up to {most * factor:,} {unit} while the other side leaves them"

"""The operator's view: what is resident where, what runs, where the bytes are, what was changed by
whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from loraplex.adapters.store import AdapterStore
from loraplex.engine.api import AdapterResidencyInfo, AdapterState, MemoryInfo
from loraplex.platform import adapter_view
from loraplex.platform.adapter_series import AdapterLabel
from loraplex.platform.adapter_service import AdapterService
from loraplex.platform.db import Database
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.models import AdapterVersion
from loraplex.platform.repositories import AdapterRepository, AuditRepository
from loraplex.platform.residency_log import ResidencyLog
from loraplex.platform.resolution import Resolver
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
    Slot,
    SlotList,
    SlotTotals,
    TieredAdapterList,
    TransitionList,
    TransitionObject,
)

_ON_DEVICE = frozenset({AdapterState.DEVICE, AdapterState.DEVICE_LOADING, AdapterState.DRAINING})
_RANKS = (8, 16, 32, 64, 128)
_PAGE_RANKS = 16


class AdminService:
    def __init__(
        self,
        db: Database,
        store: AdapterStore,
        engine: EnginePort,
        adapters: AdapterService,
        resolver: Resolver,
    ) -> None:
        self._db = db
        self._resolver = resolver
        self._store = store
        self._engine = engine
        self._adapters = adapters
        self.residency_log = ResidencyLog()
        engine.on_event(self.residency_log.hear)

    async def slots(self) -> SlotList:
        """Adapters on the device."""
        resident = [info for info in await self._engine.adapters() if info.state in _ON_DEVICE]
        memory = await self._engine.memory()
        names = await self._named(info.digest for info in resident)
        page = max(1, memory.adapter_page_bytes)
        free = memory.adapter_bytes_total - memory.adapter_bytes_used
        return SlotList(
            data=[adapter_view.slot(info, names.get(info.digest)) for info in resident],
            totals=SlotTotals(
                adapters=len(resident),
                pages_total=memory.adapter_bytes_total // page,
                pages_used=-(-memory.adapter_bytes_used // page),
                pages_free=free // page,
                bytes_total=memory.adapter_bytes_total,
                bytes_used=memory.adapter_bytes_used,
                bytes_free=free,
            ),
        )

    async def tiers(self) -> TieredAdapterList:
        """Every version of every adapter with where it is and what it takes there."""
        async with self._db.read() as session:
            rows = await AdapterRepository(session).versions()
        resident = await self._adapters.residency()
        sizes = await asyncio.to_thread(
            lambda: {digest: self._store.disk_bytes(digest) for digest in {r.digest for r in rows}}
        )
        return TieredAdapterList(
            data=[
                adapter_view.tiered_adapter(row, resident.get(row.digest), sizes[row.digest])
                for row in rows
            ]
        )

    async def load(self, text: str, *, wait: bool, actor: str) -> Slot:
        adapter = await self._resolver.one(text)
        info = await self._engine.load(adapter.digest, wait=wait)
        await self._record(actor, "adapter.load", adapter.reference)
        return await self._slot(info)

    async def evict(self, text: str, order: EvictOrder, actor: str) -> Evicted:
        adapter = await self._resolver.find(text)
        freed = await self._engine.evict(
            adapter.digest, tier=order.tier, drain=order.drain, timeout_s=order.timeout_s
        )
        await self._record(actor, f"adapter.evict.{order.tier}", adapter.reference)
        return Evicted(
            id=adapter.name,
            version=adapter.version,
            digest=f"sha256:{adapter.digest}",
            tier=order.tier,
            freed=Freed(device_bytes=freed.device_bytes, host_bytes=freed.host_bytes),
        )

    async def pin(self, text: str, *, pinned: bool, actor: str) -> Slot:
        if pinned:
            adapter = await self._resolver.one(text)
            info = await self._engine.pin(adapter.digest)
        else:
            adapter = await self._resolver.find(text)
            info = await self._engine.unpin(adapter.digest)
        action = "adapter.pin" if pinned else "adapter.unpin"
        await self._record(actor, action, adapter.reference)
        return await self._slot(info)

    async def memory(self) -> Memory:
        info = await self._engine.memory()
        free = info.adapter_bytes_total - info.adapter_bytes_used
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
            adapters_that_fit=[
                AdapterRoom(
                    rank=rank,
                    adapters=free // (page * -(-rank // _PAGE_RANKS)),
                    in_all=info.adapter_bytes_total // (page * -(-rank // _PAGE_RANKS)),
                )
                for rank in _RANKS
            ],
            explanation=_explained(info),
        )

    async def transitions(self, text: str | None, limit: int) -> TransitionList:
        """The latest changes of residency, newest first."""
        digest = None if text is None else (await self._resolver.find(text)).digest
        events = self.residency_log.recent(limit, digest)
        names = await self.names(event.digest for event in events)
        return TransitionList(
            data=[
                TransitionObject(
                    id=names[event.digest][0] if event.digest in names else None,
                    version=int(names[event.digest][1]) if event.digest in names else None,
                    digest=f"sha256:{event.digest}",
                    at=event.time,
                    before=str(event.before),
                    after=str(event.after),
                    seconds=event.seconds,
                    reason=event.reason,
                    detail=event.detail,
                    phases=event.phases,
                )
                for event in events
            ]
        )

    async def requests(self) -> RequestList:
        infos = await self._engine.requests()
        names = await self._named(digest for info in infos for digest in info.digests)
        return RequestList(
            data=[
                RequestObject(
                    id=info.request_id,
                    state=info.state,
                    waiting_reason=info.waiting_reason,
                    adapters=[
                        f"{names[d].adapter.name}@{names[d].version}"
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

    async def events(self, *, after: int, limit: int) -> EventList:
        async with self._db.read() as session:
            rows = await AuditRepository(session).page(after=after, limit=limit + 1)
        return EventList(
            data=[
                Event(
                    id=row.id,
                    at=int(row.at.timestamp()),
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
        """digest -> adapter id and version, of those that still have one."""
        return {
            digest: (row.adapter.name, str(row.version))
            for digest, row in (await self._named(digests)).items()
        }

    async def _named(self, digests: Iterable[str]) -> dict[str, AdapterVersion]:
        wanted = set(digests)
        if not wanted:
            return {}
        async with self._db.read() as session:
            return await AdapterRepository(session).named(wanted)

    async def _slot(self, info: AdapterResidencyInfo) -> Slot:
        names = await self._named([info.digest])
        return adapter_view.slot(info, names.get(info.digest))

    async def _record(self, actor: str, action: str, subject: str) -> None:
        async with self._db.unit_of_work() as session:
            AuditRepository(session).add(actor, action, subject)


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
            f"{info.kv_blocks_cached:,} free blocks hold reusable prefixes",
        ),
        MemoryPurpose(
            purpose="adapters on the device",
            bytes=info.adapter_bytes_total,
            used=info.adapter_bytes_used,
            text=f"{info.adapter_bytes_total // page:,} pages of rank {_PAGE_RANKS}",
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

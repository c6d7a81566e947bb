"""What is used, counted per hour, tenant, key and adapters, and written to the registry in batches,
off the request path.

At most `FLUSH_INTERVAL_S` and the time of one write are lost when the process is killed; a normal
stop loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.finishing import finished
from loraplex.platform.models import utc_now
from loraplex.platform.repositories import ContentRepository
from loraplex.platform.resolution import ResolvedAdapter
from loraplex.platform.usage_repository import UsageRepository

FLUSH_INTERVAL_S = 2.0
FINAL_TRIES = 5
MAX_LABEL = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UsageKey:
    """One row of the registry."""

    hour: datetime
    tenant: str
    key_id: str
    adapter: str


@dataclass(slots=True)
class Use:
    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def absorb(self, other: Use) -> None:
        self.requests += other.requests
        self.failures += other.failures
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.seconds += other.seconds


class UsageMeter:
    """`add` is cheap and never waits; a task writes what has gathered. Idle, it sleeps."""

    def __init__(self, db: Database, now: Callable[[], datetime] = utc_now) -> None:
        self._db = db
        self._now = now
        self._versions: dict[int, Use] = {}
        self._hours: dict[UsageKey, Use] = {}
        self._dirty = asyncio.Event()
        self._writing = asyncio.Lock()

    def add(self, caller: Caller, adapters: Sequence[ResolvedAdapter], use: Use) -> None:
        """One request. A composition is one row, so that sums count every token once; each of its
        versions has counted it too.
        """
        hour = self._now().astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        label = "+".join(adapter.reference for adapter in adapters)[:MAX_LABEL]
        key = UsageKey(hour, caller.billed, caller.key_id, label)
        self._hours.setdefault(key, Use()).absorb(use)
        for adapter in adapters:
            self._versions.setdefault(adapter.version_id, Use()).absorb(use)
        self._dirty.set()

    async def run(self) -> None:
        """Until cancelled. A failing write is logged and tried again with the next batch."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(FLUSH_INTERVAL_S)
            await finished(self.flush())  # a commit that is under way is not to be done again

    async def flush(self) -> bool:
        """Write what there is. Returns whether nothing is left to write."""
        async with self._writing:
            versions, self._versions = self._versions, {}
            hours, self._hours = self._hours, {}
            self._dirty.clear()
            if not hours:
                return True
            try:
                await self._write(versions, hours)
            except Exception:  # a driver that finds no server raises errors of its own
                for id_, use in versions.items():
                    self._versions.setdefault(id_, Use()).absorb(use)
                for key, use in hours.items():
                    self._hours.setdefault(key, Use()).absorb(use)
                self._dirty.set()
                log.exception("usage_write_failed", extra={"rows": len(hours)})
                return False
            return True

    async def close(self) -> None:
        """The last flush: nothing more is added. A registry that is busy is tried a few times."""
        for _ in range(FINAL_TRIES):
            if await self.flush():
                return
            await asyncio.sleep(0.2)
        log.error("usage_lost", extra={"rows": len(self._hours)})

    async def _write(self, versions: dict[int, Use], hours: dict[UsageKey, Use]) -> None:
        async with self._db.unit_of_work() as session:
            contents, usage = ContentRepository(session), UsageRepository(session)
            for id_, use in versions.items():
                await contents.add_usage(id_, use.requests, use.prompt_tokens, use.generated_tokens)
            for key, use in hours.items():
                await usage.add(
                    key.hour,
                    key.tenant,
                    key.key_id,
                    key.adapter,
                    {
                        "requests": use.requests,
                        "failures": use.failures,
                        "prompt_tokens": use.prompt_tokens,
                        "generated_tokens": use.generated_tokens,
                        "seconds": use.seconds,
                    },
                )

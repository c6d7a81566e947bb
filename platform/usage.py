"""Counts requests and tokens per adapter version, and writes them to the registry in batches, off
the request path.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from loraplex.platform.db import Database
from loraplex.platform.repositories import ContentRepository

FLUSH_INTERVAL_S = 2.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Use:
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


class UsageMeter:
    """`add` is cheap and never waits; a task writes what has gathered. Idle, it sleeps."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._pending: dict[int, _Use] = {}
        self._dirty = asyncio.Event()

    def add(self, version_id: int, prompt_tokens: int, generated_tokens: int) -> None:
        use = self._pending.setdefault(version_id, _Use())
        use.requests += 1
        use.prompt_tokens += prompt_tokens
        use.generated_tokens += generated_tokens
        self._dirty.set()

    async def run(self) -> None:
        """Until cancelled. A failing write is logged and tried again with the next batch."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(FLUSH_INTERVAL_S)
            await self.flush()

    async def flush(self) -> None:
        pending, self._pending = self._pending, {}
        self._dirty.clear()
        if not pending:
            return
        try:
            async with self._db.unit_of_work() as session:
                contents = ContentRepository(session)
                for version_id, use in pending.items():
                    await contents.add_usage(
                        version_id, use.requests, use.prompt_tokens, use.generated_tokens
                    )
        except SQLAlchemyError:
            log.exception("usage_write_failed versions=%d", len(pending))
            for version_id, use in pending.items():
                again = self._pending.setdefault(version_id, _Use())
                again.requests += use.requests
                again.prompt_tokens += use.prompt_tokens
                again.generated_tokens += use.generated_tokens
            self._dirty.set()

"""Registry and files brought into agreement at start, after whatever a crash left.

Files that no row names are removed; rows whose files are gone fail, with the reason; removals that
were under way and never acknowledged are taken back. Once the model is known, adapters validated
against another one are checked again.
"""

from __future__ import annotations

import asyncio
import logging

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.store import AdapterStore
from loraplex.platform.db import Database
from loraplex.platform.models import AdapterVersion
from loraplex.platform.repositories import ContentRepository
from loraplex.platform.served_model import ServedModel

log = logging.getLogger(__name__)


async def reconcile_files(db: Database, store: AdapterStore) -> None:
    """Before anything is served. Safe to repeat."""
    freed = await asyncio.to_thread(store.sweep)
    present = set(await asyncio.to_thread(lambda: list(store.digests())))
    async with db.unit_of_work() as session:
        rows = await ContentRepository(session).all()
        for row in rows:
            if row.digest not in present:
                _fail(row, "its files are gone from the data directory; upload it again")
            elif row.status != "ready":
                row.status, row.error = "ready", None
    orphans = present - {row.digest for row in rows}
    for digest in orphans:
        freed += await asyncio.to_thread(store.remove, digest)
    if freed:
        log.info("left_overs_removed", extra={"adapters": len(orphans), "bytes": freed})


async def reconcile_model(db: Database, store: AdapterStore, model: ServedModel) -> None:
    """Once the model is loaded: which adapters fit? Those validated against its shapes do."""
    async with db.read() as session:
        rows = await ContentRepository(session).all()
    strangers = [
        row for row in rows if row.status == "ready" and row.model_signature != model.signature
    ]
    reasons = await asyncio.to_thread(
        lambda: {row.id: _mismatch(store, row.digest, model) for row in strangers}
    )
    if not reasons:
        return
    async with db.unit_of_work() as session:
        for row in await ContentRepository(session).all():
            if row.id not in reasons:
                continue
            reason = reasons[row.id]
            if reason is None:
                row.model_signature = model.signature
            else:
                _fail(row, reason)


def _mismatch(store: AdapterStore, digest: str, model: ServedModel) -> str | None:
    try:
        problems = store.manifest(digest).mismatches(model.info.modules)
    except AdapterError as error:
        return error.message
    return f"it does not fit {model.name}: {problems[0].message}" if problems else None


def _fail(row: AdapterVersion, reason: str) -> None:
    row.status, row.error = "failed", reason
    log.warning(
        "adapter_failed",
        extra={"adapter": f"{row.adapter.name}@{row.version}", "reason": reason},
    )

"""Pulls as the objects that clients see. Pure functions."""

from __future__ import annotations

from loraplex.platform.models import Pull
from loraplex.platform.sources.schemas import PendingAdapter, PullError, PullObject
from loraplex.platform.sources.transfer import Progress


def pull_object(row: Pull, progress: Progress | None = None) -> PullObject:
    """progress: of a pull under way, newer than the row."""
    now = progress or Progress(row.bytes_done, row.bytes_total, row.retries)
    return PullObject(
        id=row.name,
        source=row.source,
        revision=row.revision,
        status=row.status,  # type: ignore[arg-type]  # checked by pydantic
        bytes_done=now.bytes_done,
        bytes_total=now.bytes_total,
        retries=now.retries,
        restarts=row.restarts,
        version=row.version,
        digest=None if row.digest is None else f"sha256:{row.digest}",
        error=None if row.error is None else PullError(**row.error),
        created_at=int(row.created_at.timestamp()),
        ended_at=None if row.ended_at is None else int(row.ended_at.timestamp()),
    )


def pending_adapter(row: Pull, pull: PullObject) -> PendingAdapter:
    return PendingAdapter(
        id=row.name,
        tenant=row.tenant,
        status=pull.status,
        error=None if pull.error is None else pull.error.message,
        description=row.description or "",
        metadata=row.metadata_ or {},
        pull=pull,
    )

"""Queries of usage by the hour. Sessions come in, rows go out; nobody commits here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncSession

from loraplex.platform.models import UsageHour


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """None = any. `start` is the first hour, `end` the first that does not count any more.

    `adapter`: a name with or without version, wherever it is in a composition; empty = the base.
    """

    tenant: str | None = None
    key_id: str | None = None
    adapter: str | None = None
    start: datetime | None = None
    end: datetime | None = None


class UsageRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def add(
        self,
        hour: datetime,
        tenant: str,
        key_id: str,
        adapter: str,
        counts: Mapping[str, float],
    ) -> None:
        """Add to a row, which is made where it is missing."""
        same = {"hour": hour, "tenant": tenant, "key_id": key_id, "adapter": adapter}
        grown: dict[str, Any] = {
            name: getattr(UsageHour, name) + value for name, value in counts.items()
        }
        query = update(UsageHour).filter_by(**same).values(**grown)
        found = await self._session.execute(query)
        assert isinstance(found, CursorResult), "an update without rows to return"
        if found.rowcount == 0:
            self._session.add(UsageHour(**same, **counts))
            await self._session.flush()

    async def page(self, wanted: UsageFilter, *, offset: int, limit: int) -> Sequence[UsageHour]:
        """By hour, the oldest first."""
        query = _filtered(wanted).order_by(UsageHour.hour, UsageHour.id)
        return (await self._session.scalars(query.offset(offset).limit(limit))).all()


def _filtered(wanted: UsageFilter) -> Select[UsageHour]:
    query = select(UsageHour)
    if wanted.tenant is not None:
        query = query.where(UsageHour.tenant == wanted.tenant)
    if wanted.key_id is not None:
        query = query.where(UsageHour.key_id == wanted.key_id)
    if wanted.start is not None:
        query = query.where(UsageHour.hour >= wanted.start)
    if wanted.end is not None:
        query = query.where(UsageHour.hour < wanted.end)
    if wanted.adapter == "":
        query = query.where(UsageHour.adapter == "")
    elif wanted.adapter is not None:
        # `sql` is `sql@1`, `sql@2`...; between two `+` each member of a composition stands alone.
        text = "+" + UsageHour.adapter + "+"
        end = "+" if "@" in wanted.adapter else "@"
        query = query.where(text.contains(f"+{wanted.adapter}{end}", autoescape=True))
    return query

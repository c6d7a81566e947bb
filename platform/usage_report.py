"""Usage as clients see it: rows of the registry, as JSON or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel

from loraplex.platform.callers import Caller, Scope
from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.models import UsageHour
from loraplex.platform.usage import UsageMeter
from loraplex.platform.usage_repository import UsageFilter, UsageRepository


class UsageRow(BaseModel):
    """One hour of one tenant's key on one adapter, or composition (`a@1+b@2`); empty = the base.

    `hour` is its first second, in unix seconds. `failures` are among the `requests`.
    """

    hour: int
    tenant: str
    key_id: str
    adapter: str
    requests: int
    failures: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float


class UsageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageRow]
    has_more: bool


class UsageReport:
    def __init__(self, db: Database, meter: UsageMeter) -> None:
        self._db = db
        self._meter = meter

    async def page(
        self,
        caller: Caller,
        *,
        tenant: str | None,
        key_id: str | None,
        adapter: str | None,
        start: int | None,
        end: int | None,
        offset: int,
        limit: int,
    ) -> UsageList:
        """What this process has counted is in it, up to now.

        A key sees its own use, with the scope admin its tenant's, an operator's then everybody's.
        Raises: ApiError(permission_denied).
        """
        if Scope.ADMIN not in caller.scopes:
            if key_id not in (None, caller.key_id) or tenant not in (None, caller.billed):
                raise ApiError(
                    "permission_denied", "a key without the scope admin sees its own use only"
                )
            key_id, tenant = caller.key_id, caller.billed
        elif not caller.is_operator:
            if tenant not in (None, caller.tenant):
                raise ApiError("permission_denied", "a tenant's key sees its tenant's use only")
            tenant = caller.tenant
        wanted = UsageFilter(tenant, key_id, adapter, _moment(start), _moment(end))
        await self._meter.flush()
        async with self._db.read() as session:
            rows = await UsageRepository(session).page(wanted, offset=offset, limit=limit + 1)
        return UsageList(data=[_row(row) for row in rows[:limit]], has_more=len(rows) > limit)


def as_csv(rows: Iterable[UsageRow]) -> str:
    """With a header line; hours as ISO 8601, in UTC."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(UsageRow.model_fields)
    for row in rows:
        values = row.model_dump()
        hour = datetime.fromtimestamp(row.hour, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        writer.writerow({**values, "hour": hour}.values())
    return out.getvalue()


def _moment(unix_s: int | None) -> datetime | None:
    return None if unix_s is None else datetime.fromtimestamp(unix_s, UTC)


def _row(row: UsageHour) -> UsageRow:
    return UsageRow(
        hour=int(row.hour.timestamp()),
        tenant=row.tenant,
        key_id=row.key_id,
        adapter=row.adapter,
        requests=row.requests,
        failures=row.failures,
        prompt_tokens=row.prompt_tokens,
        generated_tokens=row.generated_tokens,
        seconds=round(row.seconds, 3),
    )

"""`/v1/usage`: what was used, by the hour."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import JSONResponse

from loraplex.platform.callers import Caller
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.usage_report import UsageList, as_csv

router = APIRouter(prefix="/v1", tags=["usage"])

_MAX_UNIX_S = 4_102_444_800  # the year 2100

_AS_CSV: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/csv": {}}, "description": "Rows, oldest first."}
}


@router.get("/usage", response_model=UsageList, responses=_AS_CSV)
async def usage(
    state: Annotated[Runtime, Depends(runtime)],
    who: Annotated[Caller, Depends(caller)],
    start: Annotated[
        int | None, Query(ge=0, le=_MAX_UNIX_S, description="First hour, in unix seconds.")
    ] = None,
    end: Annotated[
        int | None, Query(ge=0, le=_MAX_UNIX_S, description="Hours before this one.")
    ] = None,
    tenant: Annotated[str | None, Query(max_length=128)] = None,
    key: Annotated[str | None, Query(max_length=32, description="Of this key's id.")] = None,
    adapter: Annotated[
        str | None,
        Query(max_length=256, description="`sql` or `sql@3`, also in compositions; empty: base."),
    ] = None,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    format: Annotated[Literal["json", "csv"] | None, Query()] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """Requests, tokens and seconds by hour, tenant, key and adapter. A key sees its own, with the
    scope `admin` its tenant's, an operator's everybody's. CSV by `format` or `Accept: text/csv`.
    """
    found = await state.usage_report.page(
        who,
        tenant=tenant,
        key_id=key,
        adapter=adapter,
        start=start,
        end=end,
        offset=offset,
        limit=limit,
    )
    if format == "csv" or (format is None and "text/csv" in accept):
        return Response(as_csv(found.data), media_type="text/csv; charset=utf-8")
    return JSONResponse(found.model_dump(mode="json"))

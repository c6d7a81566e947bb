"""`loraplex usage`: what was used, by the hour, from a running server."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from loraplex.platform.cli import output
from loraplex.platform.cli.key import seconds
from loraplex.platform.cli.server_api import DEFAULT_URL, ApiKey, AsJson, ServerApi, Url

PAGE = 10_000
_COUNTS = ("requests", "failures", "prompt_tokens", "generated_tokens", "seconds")


def usage(
    since: Annotated[str, typer.Option(help="How far back: 30d, 24h.", metavar="TIME")] = "24h",
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    key: Annotated[str | None, typer.Option(help="Only of this key's id.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Only of this adapter.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, by the hour.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show requests, tokens and seconds by tenant, key and adapter."""
    wanted = {"tenant": tenant, "key": key, "adapter": adapter}
    start = int(time.time() - seconds(since)) // 3600 * 3600
    query = {"start": start, **{name: value for name, value in wanted.items() if value is not None}}
    rows: list[dict[str, Any]] = []
    with ServerApi(url, api_key) as api:
        while True:
            page = api.get("/v1/usage", limit=PAGE, offset=len(rows), **query)
            rows += page["data"]
            if not page["has_more"]:
                break
    if csv:
        from loraplex.platform.usage_report import UsageRow, as_csv

        sys.stdout.write(as_csv(UsageRow(**row) for row in rows))
    elif as_json:
        output.print_json({"object": "list", "data": rows})
    else:
        _show(rows)


def _show(rows: list[dict[str, Any]]) -> None:
    """Summed over the hours."""
    sums: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        group = (row["tenant"], row["key_id"], row["adapter"])
        into = sums.setdefault(group, dict.fromkeys(_COUNTS, 0))
        for name in _COUNTS:
            into[name] += row[name]
    table = output.table(
        "tenant", "key", "adapter", ">requests", ">failed", ">tokens in", ">out", ">seconds"
    )
    for (tenant, key, adapter), counts in sorted(sums.items()):
        numbers = (f"{counts[name]:,.0f}" for name in _COUNTS)
        table.add_row(tenant, key or "-", adapter or "(base)", *numbers)
    output.stdout().print(table if sums else "nothing was used")

"""A run as a table for people and as one line of JSON for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from loraplex.platform.bench.machine import machine

_ROWS = (
    ("requests", "requests", "{:,}"),
    ("errors", "errors", "{:,}"),
    ("duration", "duration_s", "{:.2f} s"),
    ("output tokens", "output_tokens", "{:,}"),
    ("output tok/s", "output_tok_s", "{:,.1f}"),
    ("requests/s", "req_s", "{:.2f}"),
)
_LATENCIES = (("TTFT", "ttft"), ("inter-token", "itl"), ("whole request", "e2e"))


def json_line(bench: str, **fields: Any) -> str:
    """One line that can be read a year later: what ran, on what, from which commit."""
    record = {
        "bench": bench,
        "time": int(time.time()),
        **fields,
        "machine": machine().as_dict(),
    }
    return json.dumps(record, ensure_ascii=False)


def result_table(title: str, result: Mapping[str, Any]) -> Table:
    """The figures of `Summary.as_dict()`."""
    rows = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    rows.add_column()
    rows.add_column(justify="right")
    rows.add_column()
    for label, key, form in _ROWS:
        rows.add_row(label, form.format(result[key]))
    for label, key in _LATENCIES:
        p50, p99 = result[f"{key}_p50_ms"], result[f"{key}_p99_ms"]
        if p50 is not None:
            rows.add_row(label, f"p50 {p50:,.1f} ms", f"p99 {p99:,.1f} ms")
    for message, count in result["error_messages"].items():
        rows.add_row("[red]error[/]", f"{count:,} x", escape(message))
    return rows

"""How commands speak: results to stdout, everything else to stderr, errors in one line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class CliError(Exception):
    """A failure to tell the user about: exit status 1, one line on stderr, details as a list."""

    def __init__(self, message: str, details: Sequence[str] = (), *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.details = list(details)
        self.exit_code = exit_code

    def print(self) -> None:
        console = stderr()
        console.print(f"[bold red]error:[/] {escape(self.message)}", soft_wrap=True)
        for detail in self.details:
            console.print(f"  [red]-[/] {escape(detail)}", soft_wrap=True)


class UsageError(CliError):
    """The command line itself is wrong: exit status 2."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message, details, exit_code=2)


# Made per call, not once: tests and pipes replace sys.stdout and sys.stderr.
def stdout() -> Console:
    return Console(highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """One line of JSON, for machines."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table(*columns: str, title: str | None = None) -> Table:
    """Columns whose name starts with `>` are right-aligned."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return made


def size(num_bytes: float | None) -> str:
    """`13.6 MB`: powers of 1000."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def ago(unix_s: float | None) -> str:
    """`5 min ago`, or `-` for never."""
    if unix_s is None:
        return "-"
    seconds = max(0, int(time.time() - unix_s))
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // divisor} {unit} ago"
    return f"{seconds // 86400} d ago"

"""`loraplex bench overhead`: what the API process costs beside an engine that answers at once."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError
from loraplex.platform.cli.server_api import AsJson


def overhead(
    streams: Annotated[int, typer.Option(min=1, help="Streams open at once.")] = 64,
    rates: Annotated[
        str, typer.Option(help="Tokens per second over all streams, comma-separated.")
    ] = "2000,4000,8000",
    seconds: Annotated[float, typer.Option(min=0.1, help="Per rate and server.")] = 4.0,
    probes: Annotated[int, typer.Option(min=3, help="Requests for the time to first token.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Measure the API process alone, beside plain Starlette."""
    from loraplex.platform.bench.overhead import measure
    from loraplex.platform.bench.report import json_line

    try:
        offered = tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        raise CliError(f"--rates {rates!r} is not a list of numbers such as 2000,4000") from None
    try:
        found = asyncio.run(measure(streams=streams, rates=offered, seconds=seconds, probes=probes))
    except RuntimeError as error:
        raise CliError(str(error)) from None
    if not as_json:
        rows = output.table("offered tok/s", ">got", ">events", ">tok per CPU s", ">Starlette")
        for ours, plain in zip(found.ours, found.plain, strict=True):
            rows.add_row(
                f"{ours.offered_per_s:,.0f}",
                f"{ours.tokens_per_s:,.0f}",
                f"{ours.events / ours.tokens:.0%}",
                f"{ours.tokens_per_cpu_s:,.0f}",
                f"{plain.tokens_per_cpu_s:,.0f}",
            )
        output.stdout().print(rows)
        first, plain_first = found.our_first, found.plain_first
        output.stdout().print(
            f"CPU per token against Starlette alone: {found.ratio:.2f}; time to first token "
            f"{first.median_ms:.2f} ms against {plain_first.median_ms:.2f}, CPU per request "
            f"{first.cpu_ms:.2f} ms against {plain_first.cpu_ms:.2f}",
            soft_wrap=True,
        )
    typer.echo(json_line("overhead", **found.as_dict()))

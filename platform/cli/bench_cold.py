"""`loraplex bench cold`: what cold adapters cost, against a server that holds them all."""

from __future__ import annotations

import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError
from loraplex.platform.cli.server_api import AsJson


def cold(
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="A tiny model and few requests, to try it out: no target."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Of both sides, in turns.")] = 3,
    round_s: Annotated[float, typer.Option(min=1, help="Seconds of each, to each side.")] = 15,
    folder: Annotated[
        Path | None,
        typer.Option(help="An empty folder to keep all in; default: a temporary one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare time to first token and inter-token latency with room for few adapters and for all.

    16 adapters on room for 8, arriving at random, and 200 on room for 20 by a power law. Takes
    6 to 8 minutes on two idle cores by estimate, and 2 GB of disk.
    """
    from loraplex.platform.bench import cold as bench
    from loraplex.platform.bench import models
    from loraplex.platform.bench.compare import medians
    from loraplex.platform.bench.peer import PeerError
    from loraplex.platform.bench.report import json_line
    from loraplex.platform.bench.upload import UploadError
    from loraplex.platform.cli.bench import ratio_table

    # Its servers are to end with it, and its folder to go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    progress, reached = output.stderr(), True
    with (
        nullcontext(str(folder)) if folder else tempfile.TemporaryDirectory(prefix="loraplex-cold-")
    ) as root:
        runner = bench.ColdBench(
            bench.TINY_SHAPE if tiny else models.SMALL,
            Path(root),
            1 if tiny else rounds,
            8 if tiny else round_s,
            lambda text: progress.print(f"[dim]{escape(text)}[/]", soft_wrap=True),
        )
        for case in bench.TINY_CASES if tiny else bench.CASES:
            try:
                measured, how = runner.run(case)
            except (PeerError, UploadError) as error:
                raise CliError(str(error)) from error
            results = bench.evaluate(measured)
            errors = sum(result["errors"] for rows in measured.values() for result in rows)
            # What is tiny tells whether all of it works, and no figure.
            reached &= (tiny or all(result.reached for result in results)) and not errors
            if not as_json:
                output.stdout().print(ratio_table(case.name, results))
            print(
                json_line(
                    "cold",
                    case=case.name,
                    **how,
                    ratios={r.ratio.figure: round(r.value, 4) for r in results},
                    **{side: medians(rows) for side, rows in measured.items()},
                ),
                flush=True,
            )
    if not reached:
        raise CliError("not every target was reached, or requests failed; see above")

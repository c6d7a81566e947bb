"""`loraplex demo`: a server on the shipped model, and a tour of what it does."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError


def demo(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where registry and adapters are kept; default: your cache folder."),
    ] = None,
    exit_: Annotated[
        bool, typer.Option("--exit", help="Stop after the tour; status 0 if all was right.")
    ] = False,
) -> None:
    """Start a server on the shipped demo model, show what it can do, and keep serving."""
    from loraplex.platform.cli import serve
    from loraplex.platform.cli.settings_flags import build_settings
    from loraplex.platform.demo import tour

    assets = Path(str(files("loraplex.platform.demo"))) / "assets"
    if not (assets / "skills.json").is_file():
        raise CliError(f"the demo model is not where it should be: {assets}")
    kept = data_dir or default_data_dir()
    settings = build_settings(
        {
            "model": str(assets / "model"),
            "served_model_name": "loraplex-demo",
            "host": "127.0.0.1",
            "port": port,
            "data_dir": kept,
            "api_key": (),
            "log_level": "warning",
        }
    )
    console = output.stdout()
    console.print(f"[dim]data in {kept}: kept for the next run, safe to delete[/]", soft_wrap=True)
    all_right: list[bool] = []

    def after_ready(url: str) -> bool:
        all_right.append(tour.run(url, assets, console))
        if not exit_:
            console.print("[dim]serving until Ctrl-C[/]")
        return not exit_

    serve.run(settings, after_ready)
    if exit_ and all_right != [True]:
        raise CliError("the tour did not go right; its table says where")


def default_data_dir() -> Path:
    """A folder that a second run finds again, and that nobody misses."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loraplex" / "demo"

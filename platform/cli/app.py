"""All commands of `loraplex`, and the one place where a failure becomes an exit status.

Exit status: 0 done, 1 failed, 2 the command line was wrong.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loraplex.platform.cli import adapter, bench, key, tenant
from loraplex.platform.cli.chat import chat
from loraplex.platform.cli.demo import demo
from loraplex.platform.cli.doctor import doctor
from loraplex.platform.cli.output import CliError
from loraplex.platform.cli.plan import plan
from loraplex.platform.cli.usage import usage


class Commands(TyperGroup):
    """Turns CliError, wherever it comes from, into its line on stderr and its exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            error.print()
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    name="loraplex",
    cls=Commands,
    help="Serve one base model with thousands of LoRA adapters from one process pair.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags short
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"loraplex {version('loraplex')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(ctx: typer.Context) -> None:
    """Serve a base model and its adapters over HTTP."""
    # Its flags are made from the Settings model, which takes a while to import: not for `--help`.
    from loraplex.platform.cli.serve import command

    command().main(args=ctx.args, prog_name=ctx.command_path, standalone_mode=False)


app.command()(demo)
app.add_typer(adapter.app, name="adapter")
app.add_typer(tenant.app, name="tenant")
app.add_typer(key.app, name="key")
app.command()(usage)
app.command()(chat)
app.command()(doctor)
app.command()(plan)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the `loraplex` script."""
    app(prog_name="loraplex")

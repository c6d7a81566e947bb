"""`loraplex key ...`: API keys, made and revoked in the registry itself."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from loraplex.platform.cli import output
from loraplex.platform.cli.output import UsageError
from loraplex.platform.cli.registry import DEFAULT_DATA_DIR, DataDir, with_tenants
from loraplex.platform.cli.server_api import AsJson

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, list and revoke API keys. A running server sees it within two seconds.",
)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command()
def create(
    tenant: Annotated[
        str | None, typer.Option(help="Whose key; without it an operator's, who may everything.")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is for, for the list.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="infer, upload or admin; several times. Default: infer."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="How long it is good for: 90d, 12h, 30m.", metavar="TIME")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Only for this adapter; several times. Default: all of its tenant."),
    ] = None,
    requests_per_s: Annotated[float | None, typer.Option(help="Requests a second.")] = None,
    tokens_per_min: Annotated[int | None, typer.Option(help="Tokens a minute.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from loraplex.platform.cli.orders import checked
    from loraplex.platform.tenant_schemas import KeyOrder

    limits = _given(
        requests_per_s=requests_per_s, tokens_per_min=tokens_per_min, max_concurrent=max_concurrent
    )
    order = checked(
        KeyOrder,
        tenant=tenant,
        name=name,
        scopes=scope or ["infer"],
        expires_in_s=None if expires is None else seconds(expires),
        adapters=adapter or None,
        limits=limits,
    )
    from loraplex.platform.callers import system

    made = with_tenants(data_dir, lambda service: service.create_key(system("cli"), order))
    if as_json:
        output.print_json(made.model_dump(mode="json"))
        return
    output.stderr().print(f"key [bold]{made.id}[/], shown this once:")
    output.stdout().print(made.key, soft_wrap=True, markup=False)


@app.command("list")
def list_(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """List all keys, without their secrets."""
    from loraplex.platform.callers import system

    found = with_tenants(data_dir, lambda service: service.keys(system("cli")))
    if as_json:
        output.print_json(found.model_dump(mode="json"))
        return
    rows = output.table("id", "tenant", "name", "scopes", "adapters", "status", "created")
    for key in found.data:
        rows.add_row(
            key.id,
            key.tenant or "(operator)",
            key.name,
            " ".join(key.scopes),
            "all" if key.adapters is None else " ".join(key.adapters),
            key.status,
            output.ago(key.created_at),
        )
    output.stdout().print(rows if found.data else "no keys")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `key list` shows it.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Revoke a key, for good."""
    from loraplex.platform.callers import system

    gone = with_tenants(data_dir, lambda service: service.revoke_key(system("cli"), key_id))
    if as_json:
        output.print_json(gone.model_dump(mode="json"))
    else:
        output.stdout().print(f"[green]revoked[/] {gone.id}")


def seconds(text: str) -> float:
    """`90d` in seconds. Raises: UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise UsageError(f"{text}: write a time such as 90d, 12h, 30m or 45s")
    return float(found[1]) * _SECONDS[found[2]]


def _given(**limits: Any) -> dict[str, Any]:
    return {name: value for name, value in limits.items() if value is not None}

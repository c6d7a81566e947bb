"""`loraplex tenant ...`: tenants and their limits, in the registry itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplex.platform.cli import output
from loraplex.platform.cli.output import UsageError
from loraplex.platform.cli.registry import DEFAULT_DATA_DIR, DataDir, with_tenants
from loraplex.platform.cli.server_api import AsJson

if TYPE_CHECKING:
    from loraplex.platform.tenant_schemas import TenantObject

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, list and change tenants. A running server sees it within two seconds.",
)

Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's name.")]
RequestsPerS = Annotated[float | None, typer.Option(help="Requests a second; 0 = no limit.")]
TokensPerMin = Annotated[int | None, typer.Option(help="Tokens a minute; 0 = no limit.")]
MaxConcurrent = Annotated[int | None, typer.Option(help="Requests at once; 0 = no limit.")]
MaxAdapters = Annotated[int | None, typer.Option(help="Adapters; -1 = no limit.")]
MaxBytes = Annotated[
    str | None, typer.Option(help="Bytes of adapters, such as 20GB; none = no limit.")
]
Share = Annotated[
    float | None, typer.Option(help="Share of the engine against other tenants'; 0 = 1, as usual.")
]
Description = Annotated[str | None, typer.Option(help="For the list.")]


@app.command()
def create(
    name: Name,
    description: Description = None,
    requests_per_s: RequestsPerS = None,
    tokens_per_min: TokensPerMin = None,
    max_concurrent: MaxConcurrent = None,
    max_adapters: MaxAdapters = None,
    max_bytes: MaxBytes = None,
    share: Share = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a tenant. Its keys come from `loraplex key create --tenant`."""
    from loraplex.platform.callers import system
    from loraplex.platform.cli.orders import checked
    from loraplex.platform.tenant_schemas import TenantOrder

    limits = _changed(
        {}, requests_per_s, tokens_per_min, max_concurrent, max_adapters, _bytes(max_bytes), share
    )
    order = checked(TenantOrder, name=name, description=description or "", limits=limits)
    made = with_tenants(data_dir, lambda service: service.create_tenant(system("cli"), order))
    _show([made], as_json, "created")


@app.command("list")
def list_(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """List all tenants with their limits."""
    found = with_tenants(data_dir, lambda service: service.tenants())
    _show(found.data, as_json)


@app.command("set")
def set_(
    name: Name,
    description: Description = None,
    requests_per_s: RequestsPerS = None,
    tokens_per_min: TokensPerMin = None,
    max_concurrent: MaxConcurrent = None,
    max_adapters: MaxAdapters = None,
    max_bytes: MaxBytes = None,
    share: Share = None,
    disabled: Annotated[
        bool | None,
        typer.Option("--disable/--enable", help="Refuse its keys; let them in again."),
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Change a tenant; what is not named stays."""
    from loraplex.platform.callers import system
    from loraplex.platform.cli.orders import checked
    from loraplex.platform.errors import ApiError
    from loraplex.platform.tenant_schemas import TenantLimits, TenantPatch, limits_dict
    from loraplex.platform.tenant_service import TenantService

    async def change(service: TenantService) -> TenantObject:
        known = {tenant.name: tenant for tenant in (await service.tenants()).data}
        if name not in known:
            raise ApiError("tenant_not_found", f"there is no tenant {name!r}")
        limits = _changed(
            limits_dict(known[name].limits),
            requests_per_s,
            tokens_per_min,
            max_concurrent,
            max_adapters,
            _bytes(max_bytes),
            share,
        )
        order = TenantPatch(
            description=description, limits=checked(TenantLimits, **limits), disabled=disabled
        )
        return await service.patch_tenant(system("cli"), name, order)

    _show([with_tenants(data_dir, change)], as_json, "changed")


def _changed(
    before: dict[str, Any],
    requests_per_s: float | None,
    tokens_per_min: int | None,
    max_concurrent: int | None,
    max_adapters: int | None,
    max_bytes: int | None,
    share: float | None,
) -> dict[str, Any]:
    """The limits with those that were given. None stays; what means "no limit" goes."""
    limits = dict(before)
    for name, value, free in (
        ("requests_per_s", requests_per_s, 0),
        ("tokens_per_min", tokens_per_min, 0),
        ("max_concurrent", max_concurrent, 0),
        ("max_adapters", max_adapters, -1),
        ("max_bytes", max_bytes, -1),
        ("share", share, 0),
    ):
        if value == free:
            limits.pop(name, None)
        elif value is not None:
            limits[name] = value
    return limits


def _bytes(text: str | None) -> int | None:
    """-1 for "none". Raises: UsageError."""
    from loraplex.platform.settings import parse_size

    if text is None or text == "none":
        return None if text is None else -1
    try:
        return int(parse_size(text))
    except ValueError as error:
        raise UsageError(f"--max-bytes {error}") from None


def _show(tenants: list[TenantObject], as_json: bool, done: str | None = None) -> None:
    if as_json:
        found: list[Any] = [tenant.model_dump(mode="json") for tenant in tenants]
        output.print_json({"object": "list", "data": found} if done is None else found[0])
        return
    if done is not None:
        output.stdout().print(f"[green]{done}[/] {tenants[0].name}")
    rows = output.table("tenant", "limits", "status", "created", "description")
    for tenant in tenants:
        limits = tenant.limits.model_dump(exclude_none=True)
        rows.add_row(
            tenant.name,
            ", ".join(f"{name} {value}" for name, value in limits.items()) or "none",
            "disabled" if tenant.disabled else "active",
            output.ago(tenant.created_at),
            tenant.description,
        )
    output.stdout().print(rows)

"""`loraplex adapter alias ...`: movable names for versions, split by weight, with a way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from loraplex.platform.cli import output
from loraplex.platform.cli.output import UsageError
from loraplex.platform.cli.server_api import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    ServerApi,
    Url,
    adapter_path,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Let id:alias mean a version, or several by weight.",
)

AdapterId = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter's id.")]
AliasName = Annotated[
    str,
    typer.Argument(metavar="ALIAS", help="Such as prod; `default` is what the bare id means."),
]


@app.command("set")
def set_(
    adapter: AdapterId,
    alias: AliasName,
    targets: Annotated[
        list[str],
        typer.Argument(metavar="VERSION[=WEIGHT]...", help="3, or a split such as 3=90 4=10."),
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version, or split it: `alias set sql prod 3=90 4=10`."""
    with ServerApi(url, api_key) as api:
        _show(api.request("PUT", _path(adapter, alias), json=order(targets)), as_json)


@app.command("list")
def list_(
    adapter: AdapterId, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """List an adapter's aliases and what they mean."""
    with ServerApi(url, api_key) as api:
        found = api.get(_path(adapter))
    if as_json:
        output.print_json(found)
        return
    rows = output.table("alias", "versions", ">revision")
    for item in found["data"]:
        rows.add_row(item["alias"], shares(item["split"]), str(item["revision"]))
    output.stdout().print(rows if found["data"] else "no aliases")


@app.command()
def history(
    adapter: AdapterId,
    alias: AliasName,
    limit: Annotated[int, typer.Option(help="Revisions to show, newest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show what an alias has been, and who made it so."""
    with ServerApi(url, api_key) as api:
        found = api.get(_path(adapter, alias, "history"), limit=limit)
    if as_json:
        output.print_json(found)
        return
    rows = output.table(">revision", "versions", "when", "who", "")
    for item in found["data"]:
        rows.add_row(
            str(item["revision"]),
            shares(item["split"]) or "deleted",
            output.ago(item["at"]),
            item["actor"],
            "" if item["restores"] is None else f"rollback to {item['restores']}",
        )
    output.stdout().print(rows)


@app.command()
def rollback(
    adapter: AdapterId,
    alias: AliasName,
    revision: Annotated[
        int | None, typer.Option(help="Revision to go back to; default: before the last change.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias mean what it meant before. Again = one further back."""
    body = None if revision is None else {"revision": revision}
    with ServerApi(url, api_key) as api:
        _show(api.post(_path(adapter, alias, "rollback"), body), as_json)


@app.command()
def rm(
    adapter: AdapterId,
    alias: AliasName,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Remove an alias; its versions stay, and a rollback brings it back."""
    with ServerApi(url, api_key) as api:
        gone = api.request("DELETE", _path(adapter, alias))
    if as_json:
        output.print_json(gone)
    else:
        output.stdout().print(f"[green]removed[/] {gone['id']}:{gone['alias']}")


def order(targets: Sequence[str]) -> dict[str, Any]:
    """The body of PUT for `3`, or for `3=90 4=10`. Raises: UsageError."""
    pairs = [target.partition("=") for target in targets]
    if any(
        not version.isdecimal() or (sep and not weight.isdecimal())
        for version, sep, weight in pairs
    ):
        raise UsageError(
            f"{' '.join(targets)}: write a version, such as 3, or versions with whole weights, "
            "such as 3=90 4=10"
        )
    if len(pairs) == 1 and not pairs[0][1]:
        return {"version": int(pairs[0][0])}
    if not all(sep for _, sep, _ in pairs):
        raise UsageError("several versions need weights, such as 3=90 4=10")
    return {"split": [{"version": int(v), "weight": int(weight)} for v, _, weight in pairs]}


def shares(split: Sequence[dict[str, Any]]) -> str:
    """`3: 90 %, 4: 10 %`; one version is just its number."""
    if len(split) == 1:
        return str(split[0]["version"])
    return ", ".join(f"{item['version']}: {_percent(item, split)}" for item in split)


def shares_of(version: int, aliases: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The aliases that lead to a version: `prod 90 %`, or just `prod`."""
    return [
        name if len(split) == 1 else f"{name} {_percent(item, split)}"
        for name, split in aliases.items()
        for item in split
        if item["version"] == version
    ]


def _percent(item: dict[str, Any], split: Sequence[dict[str, Any]]) -> str:
    return f"{100 * item['weight'] / sum(each['weight'] for each in split):.4g} %"


def _path(adapter: str, *rest: str) -> str:
    return adapter_path(adapter, "aliases", *(quote(part, safe="") for part in rest))


def _show(alias: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(alias)
        return
    output.stdout().print(
        f"[green]{alias['id']}:{alias['alias']}[/] is now {shares(alias['split'])} "
        f"(revision {alias['revision']})"
    )

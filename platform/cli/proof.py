"""`loraplex adapter verify`: are the files as uploaded, and does the adapter do what they say?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError, UsageError
from loraplex.platform.cli.server_api import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    ServerApi,
    Url,
    adapter_path,
)


def verify(
    adapter: Annotated[
        str | None,
        typer.Argument(metavar="[ADAPTER]", help="id, id@version, id:alias or sha256:digest."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Every version of ADAPTER; without one, of every adapter."),
    ] = False,
    accept: Annotated[
        bool, typer.Option(help="Serve it even if its probe disagrees, up to this error.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Hash stored files again, and compare what adapters do with what the files say.

    Exit status 1 if anything is wrong.
    """
    if adapter is None and not every:
        raise UsageError("name an adapter, or say --all")
    if every and accept:
        raise UsageError("--accept is for one version; name it")
    with ServerApi(url, api_key) as api:
        references = _versions(api, adapter) if every or adapter is None else [adapter]
        results = []
        for reference in references:
            results.append(_verified(api, reference, accept))
            if not as_json:
                output.stdout().print(_line(results[-1]), soft_wrap=True)
    wrong = [result for result in results if not result["ok"]]
    if as_json:
        output.print_json({"object": "list", "data": results})
    elif every:
        output.stdout().print(f"{len(results)} verified, {len(wrong)} wrong")
    if wrong:
        raise typer.Exit(1)


def word(proof: dict[str, Any] | None) -> str:
    """For a table."""
    if proof is None:
        return "-"
    if proof["agrees"]:
        return "no effect" if "no_effect" in proof["flags"] else "agrees"
    return "accepted" if proof["accepted"] else "disagrees"


def told(proof: dict[str, Any] | None) -> str:
    """`agrees: error 1e-07 of at most 2e-06, effect 0.25 (float32, torch; 5 min ago)`."""
    if proof is None:
        return "not probed yet"
    error, tolerance, effect = (_number(proof[k]) for k in ("error", "tolerance", "effect"))
    return (
        f"{word(proof)}: error {error} of at most {tolerance}, effect {effect} "
        f"({proof['dtype']}, {proof['backend']}; {output.ago(proof['probed_at'])})"
    )


def _versions(api: ServerApi, adapter: str | None) -> list[str]:
    names = [a["id"] for a in api.adapters()] if adapter is None else [adapter]
    found = (api.get(adapter_path(name)) for name in names)
    return [f"{a['id']}@{v['version']}" for a in found for v in a.get("versions", [])]


def _verified(api: ServerApi, reference: str, accept: bool) -> dict[str, Any]:
    """As the server answers. One that cannot be verified is wrong, and no reason to stop."""
    try:
        found: dict[str, Any] = api.post(
            adapter_path(reference, "verify"), {"accept": True} if accept else None
        )
    except CliError as error:
        return {"id": reference, "ok": False, "error": error.message}
    return found


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"[red]wrong[/] {escape(result['id'])}: not verified: {escape(result['error'])}"
    named = escape(f"{result['id']}@{result['version']}")
    if result["damage"] is not None:
        return f"[red]wrong[/] {named}: {escape(result['damage'])}; upload it again"
    mark = "[green]ok[/]" if result["ok"] else "[red]wrong[/]"
    way_out = "" if result["ok"] else "; --accept serves it all the same"
    return f"{mark} {named}: files as uploaded; probe {escape(told(result['proof']))}{way_out}"


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2g}"

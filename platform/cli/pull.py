"""`loraplex adapter pull` and `cancel`: have the server fetch an adapter, and watch it do so."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError, UsageError
from loraplex.platform.cli.server_api import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    ServerApi,
    Url,
    adapter_path,
    problem_text,
)

POLL_S = 0.2
_ENDED = ("ready", "failed")


def pull(
    name: Annotated[str, typer.Argument(help="The adapter's id; requests will say adapter_id.")],
    source: Annotated[
        str,
        typer.Argument(
            help="https://host/a.tar.gz, https://host/folder/, hub:org/name@revision, "
            "s3://bucket/prefix or dir:NAME/path."
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub repository.")
    ] = None,
    digest: Annotated[
        str | None, typer.Option(help="The adapter's digest, sha256:...; anything else is refused.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LORAPLEX_SOURCE_TOKEN",
            help="For private https and hub sources. Used once, not kept; better in the variable "
            "than on the command line, where others see it.",
        ),
    ] = None,
    description: Annotated[str | None, typer.Option(help="A line for people.")] = None,
    metadata: Annotated[
        str | None, typer.Option(help="A JSON object to keep with the adapter.")
    ] = None,
    alias_name: Annotated[
        str | None, typer.Option("--alias", help="Alias that shall mean this version from now on.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is ready or has failed.")] = True,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Have the server fetch an adapter, or a new version of one."""
    fields = {
        "name": name,
        "source": source,
        "revision": revision,
        "digest": digest,
        "token": token,
        "description": description,
        "metadata": None if metadata is None else json_object(metadata),
        "alias": alias_name,
    }
    order = {key: value for key, value in fields.items() if value is not None}
    with ServerApi(url, api_key) as api:
        adapter = api.post("/v1/adapters/pull", order)
        if wait:
            ended = _watched(api, adapter["pull"], show_progress=not as_json)
            if ended["status"] == "failed":
                error = ended["error"]
                raise CliError(error["message"], [problem_text(p) for p in error["details"]])
            adapter = api.get(adapter_path(name))
    if as_json:
        output.print_json(adapter)
    elif wait:
        output.stdout().print(
            f"[green]pulled[/] {adapter['id']}@{adapter['pull']['version']}: "
            f"{output.size(adapter['pull']['bytes_done'])}, {adapter['pull']['digest'][:19]}"
        )
    else:
        output.stdout().print(
            f"[green]pulling[/] {name}; `loraplex adapter show {name}` tells how far it is"
        )


def cancel(
    name: Annotated[str, typer.Argument(help="The adapter's id.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Cancel the pull of an adapter; its versions stay."""
    with ServerApi(url, api_key) as api:
        ended = api.request("DELETE", adapter_path(name, "pull"))
    if as_json:
        output.print_json(ended)
    elif ended["status"] == "cancelled":
        output.stdout().print(f"[green]cancelled[/] the pull of {name} from {ended['source']}")
    else:
        output.stdout().print(f"the pull of {name} had ended: {ended['status']}")


def _watched(api: ServerApi, pull: dict[str, Any], *, show_progress: bool) -> dict[str, Any]:
    """The pull once it has ended. Ctrl-C leaves it to the server."""
    console = output.stderr()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not (show_progress and console.is_terminal),
    )
    name = pull["id"]
    try:
        with progress:
            task = progress.add_task(name)
            while pull["status"] not in _ENDED:
                progress.update(
                    task,
                    description=f"{pull['status']} {name}",
                    completed=pull["bytes_done"],
                    total=pull["bytes_total"],
                )
                time.sleep(POLL_S)
                pull = api.get(adapter_path(name, "pull"))
    except KeyboardInterrupt:
        raise CliError(
            f"the server goes on pulling {name}; `loraplex adapter cancel {name}` stops it",
            exit_code=130,
        ) from None
    return pull


def json_object(text: str) -> dict[str, Any]:
    """Raises: UsageError unless `text` is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError('--metadata must be a JSON object, such as \'{"team": "search"}\'')
    return value

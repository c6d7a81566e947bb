"""`loraplex adapter ...`: everything an operator does with adapters, over the server's REST API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from loraplex.platform.cli import alias, output, proof, pull
from loraplex.platform.cli.output import CliError, UsageError
from loraplex.platform.cli.pull import json_object
from loraplex.platform.cli.server_api import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    ServerApi,
    Url,
    adapter_path,
)
from loraplex.platform.cli.upload import MultipartUpload

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Upload, pull, list, load, evict and delete adapters.",
)

app.add_typer(alias.app, name="alias")

Reference = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="id, id@version, id:alias or sha256:digest.")
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The adapter's id; requests will say adapter_id.")],
    path: Annotated[
        Path,
        typer.Argument(
            help=f"Folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a .zip, .tar, .tar.gz of it."
        ),
    ],
    description: Annotated[str | None, typer.Option(help="A line for people.")] = None,
    metadata: Annotated[
        str | None, typer.Option(help="A JSON object to keep with the adapter.")
    ] = None,
    alias_name: Annotated[
        str | None, typer.Option("--alias", help="Alias that shall mean this version from now on.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter, or a new version of one."""
    fields = {"name": name}
    if description is not None:
        fields["description"] = description
    if metadata is not None:
        fields["metadata"] = json.dumps(json_object(metadata))
    if alias_name is not None:
        fields["alias"] = alias_name
    with ServerApi(url, api_key) as api:
        added = upload(api, fields, adapter_files(path), show_progress=not as_json)
    if as_json:
        output.print_json(added)
    else:
        output.stdout().print(
            f"[green]added[/] {added['id']}@{added['version']}: rank {added['rank']}, "
            f"{output.size(added['size_bytes'])}, {added['digest'][:19]}"
        )


app.command("pull")(pull.pull)
app.command("cancel")(pull.cancel)
app.command("verify")(proof.verify)


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Option(help="Only this name.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters, newest versions."""
    with ServerApi(url, api_key) as api:
        found = api.adapters(**({"name": name} if name else {}))
    if as_json:
        output.print_json({"object": "list", "data": found})
    else:
        output.stdout().print(adapters_table(found) if found else "no adapters")


@app.command()
def show(
    adapter: Reference, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Show all about one adapter."""
    with ServerApi(url, api_key) as api:
        found = api.get(adapter_path(adapter))
    if as_json:
        output.print_json(found)
        return
    found["versions"] = [v["version"] for v in found.get("versions", [])]
    rows = output.table("", "")
    rows.columns[1].overflow = "fold"
    first = {key: found[key] for key in ("id", "version", "status", "residency") if key in found}
    for key, value in (first | found).items():
        if key == "proof":
            shown = proof.told(value)
        elif key.endswith("_bytes"):
            shown = output.size(value)
        elif key.endswith("_at"):
            shown = output.ago(value)
        elif isinstance(value, str | int | float) or value is None:
            shown = "-" if value in (None, "") else str(value)
        else:
            shown = json.dumps(value, ensure_ascii=False) if value else "-"
        rows.add_row(f"[bold]{key}[/]", escape(shown))
    output.stdout().print(rows)


@app.command()
def versions(
    adapter: Reference, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """List an adapter's versions, the aliases that lead to them, and their use."""
    with ServerApi(url, api_key) as api:
        found = api.get(adapter_path(adapter))
    if as_json:
        output.print_json({"object": "list", "data": found["versions"]})
        return
    rows = output.table(
        ">version", "aliases", "status", "residency", ">requests", ">tokens", "last used", "digest"
    )
    rows.columns[1].no_wrap = True
    for v in found["versions"]:
        rows.add_row(
            str(v["version"]),
            ", ".join(alias.shares_of(v["version"], found["aliases"])),
            v["status"],
            v["residency"],
            str(v["num_requests"]),
            str(v["num_generated_tokens"]),
            output.ago(v["last_used_at"]),
            v["digest"][:19],
        )
    output.stdout().print(rows)


@app.command()
def rm(
    adapter: Reference,
    version: Annotated[int | None, typer.Option(help="Only this version.")] = None,
    force: Annotated[
        bool, typer.Option(help="Even while requests run on it or an alias leads to it.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter and free its memory and its files."""
    params: dict[str, Any] = {"version": version, "force": force or None}
    with ServerApi(url, api_key) as api:
        gone = api.request(
            "DELETE",
            adapter_path(adapter),
            params={k: v for k, v in params.items() if v is not None},
        )
    _report("deleted", gone, as_json)


@app.command()
def load(
    adapter: Reference, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Bring an adapter to the device now, before the first request needs it."""
    _act("load", adapter, url, api_key, as_json)


@app.command()
def evict(
    adapter: Reference,
    tier: Annotated[
        str, typer.Option(help="device: keep it in host memory; host: leave only the files.")
    ] = "device",
    drain: Annotated[bool, typer.Option(help="Wait for running requests to end.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Free an adapter's memory; it comes back by itself when a request names it."""
    if tier not in ("device", "host"):
        raise UsageError(f"--tier {tier}: must be device or host")
    body = {"tier": tier, "drain": drain} if drain else {"tier": tier}
    _act("evict", adapter, url, api_key, as_json, body)


@app.command()
def pin(
    adapter: Reference, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Keep an adapter on the device whatever else is wanted there."""
    _act("pin", adapter, url, api_key, as_json)


@app.command()
def unpin(
    adapter: Reference, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Let a pinned adapter be evicted again."""
    _act("unpin", adapter, url, api_key, as_json)


@app.command()
def download(
    adapter: Reference,
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; default: <adapter>.tar.gz."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Get an adapter's files back as a tar.gz."""
    target = to or Path(f"{adapter.replace(':', '-').replace('@', '-').replace('/', '-')}.tar.gz")
    part = target.with_name(target.name + ".part")
    try:
        with ServerApi(url, api_key) as api:
            with (
                api.stream("GET", adapter_path(adapter, "download")) as response,
                part.open("wb") as file,
            ):
                for data in response.iter_bytes():
                    file.write(data)
        part.replace(target)
    except OSError as error:
        raise CliError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    if as_json:
        output.print_json({"path": str(target), "size_bytes": target.stat().st_size})
    else:
        output.stdout().print(f"[green]wrote[/] {target} ({output.size(target.stat().st_size)})")


def adapter_files(path: Path) -> dict[str, Path]:
    """The upload's file fields for a folder or an archive. Raises: UsageError when neither."""
    if path.is_dir():
        files = {"config": path / CONFIG_NAME, "weights": path / WEIGHTS_NAME}
        missing = [f.name for f in files.values() if not f.is_file()]
        if missing:
            raise UsageError(f"{path} has no {' and no '.join(missing)}: not a peft adapter folder")
        return files
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if not path.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        raise UsageError(f"{path} is neither a folder nor a .zip, .tar or .tar.gz archive")
    return {"archive": path}


def upload(
    api: ServerApi, fields: dict[str, str], files: dict[str, Path], *, show_progress: bool = True
) -> dict[str, Any]:
    """POST /v1/adapters, streaming. Returns the adapter object. Raises: CliError."""
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
    with progress:
        task = progress.add_task(f"uploading {fields['name']}")
        body = MultipartUpload(fields, files, lambda sent: progress.advance(task, sent))
        progress.update(task, total=body.total_bytes)
        added: dict[str, Any] = api.request(
            "POST", "/v1/adapters", content=body, headers=body.headers
        )
    return added


def adapters_table(adapters: Sequence[dict[str, Any]]) -> Table:
    rows = output.table(
        "adapter",
        ">version",
        ">rank",
        ">size",
        "status",
        "proof",
        "residency",
        "last used",
        "description",
    )
    for a in adapters:
        rows.add_row(
            a["id"],
            str(a["version"]),
            str(a["rank"]),
            output.size(a["size_bytes"]),
            a["status"],
            proof.word(a.get("proof")),
            a["residency"],
            output.ago(a.get("last_used_at")),
            escape(a.get("description") or ""),
        )
    return rows


def _act(
    verb: str,
    adapter: str,
    url: str,
    api_key: str | None,
    as_json: bool,
    body: dict[str, Any] | None = None,
) -> None:
    with ServerApi(url, api_key) as api:
        path = adapter_path(adapter, verb).replace("/v1/", "/v1/admin/", 1)
        result = api.post(path, body)
    words = {"load": "loaded", "evict": "evicted", "pin": "pinned", "unpin": "unpinned"}
    _report(words[verb], {"id": adapter, **(result or {})}, as_json)


def _report(what: str, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(result)
        return
    freed = [
        f"{output.size(count)} of {tier.removesuffix('_bytes')} memory"
        if tier != "disk_bytes"
        else f"{output.size(count)} of disk"
        for tier, count in (result.get("freed") or {}).items()
        if count
    ]
    tail = f", freed {', '.join(freed)}" if freed else ""
    output.stdout().print(f"[green]{what}[/] {result['id']}{tail}")

"""`loraplex plan`: how a machine's memory would be divided, and what fits, before anything is
loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError, UsageError
from loraplex.platform.cli.server_api import AsJson

_TIMEOUT_S = 300  # most of it imports; a hub id's config is fetched
MIB = 1 << 20


def plan(
    model: Annotated[str, typer.Option(help="A Hugging Face model directory or hub id.")],
    gpu_gb: Annotated[
        float | None, typer.Option(help="Memory of the GPU, in GiB; none: this machine's CPU.")
    ] = None,
    ram_gb: Annotated[
        float | None, typer.Option(help="Free host memory, in GiB; default: this machine's.")
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="A rank to count besides 8, 16, 32 and 64.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="As of serve.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help="As of serve.")] = None,
    adapter_memory: Annotated[str | None, typer.Option(help="As of serve.")] = None,
    host_adapter_memory: Annotated[str | None, typer.Option(help="As of serve.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="As of serve.")] = 0.9,
    as_json: AsJson = False,
) -> None:
    """Show how memory would be divided, and how many adapters and tokens fit. Loads nothing."""
    settings = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_memory": _size("--kv-cache-memory", kv_cache_memory),
        "adapter_memory": _size("--adapter-memory", adapter_memory),
        "host_adapter_memory": _size("--host-adapter-memory", host_adapter_memory),
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    for name, number in (("--gpu-gb", gpu_gb), ("--ram-gb", ram_gb), ("--rank", min(rank or [1]))):
        if number is not None and number <= 0:
            raise UsageError(f"{name} {number}: must be more than 0")
    found = _ask(
        {
            "model": model,
            "gpu_gb": gpu_gb,
            "ram_gb": ram_gb,
            "ranks": rank or [],
            "settings": settings,
        }
    )
    if as_json:
        output.print_json(found)
    else:
        _show(found)


def _size(name: str, text: str | None) -> int | None:
    from loraplex.platform.settings import parse_size

    if text is None:
        return None
    try:
        return int(parse_size(text))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} {text}: {error}") from None


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    """Of a process of its own: this one never imports torch."""
    command = [sys.executable, "-m", "loraplex.engine.plan", json.dumps(question)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CliError(f"no plan within {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise CliError((done.stderr.strip().splitlines() or ["torch does not load"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise CliError(found["error"])
    return found


def _show(found: dict[str, Any]) -> None:
    console = output.stdout()
    title = f"{found['model']} in {found['dtype']} on {found['device']}"
    if found["estimated"]:
        title += " (workspace estimated; a server measures it when it starts)"
    memory = output.table("memory", ">MiB", "", title=escape(title))
    for part in found["memory"]:
        reason = part["reason"].replace("measured", "estimated")
        memory.add_row(part["purpose"], f"{part['bytes'] / MIB:,.0f}", f"[dim]{escape(reason)}[/]")
    console.print(memory)
    sequences = found["sequences"]
    typical, full = sequences["of_typical_length"], sequences["of_full_length"]
    console.print(
        f"\n{found['kv_tokens']:,} tokens of KV cache: {typical:,} sequences of "
        f"{sequences['typical_length']:,} tokens at once, or {full:,} of "
        f"{found['max_model_len']:,} (--max-num-seqs {found['max_num_seqs']})\n",
        soft_wrap=True,
    )
    shared = found["shared"]
    if shared is None:
        columns = [">on the device", ">on the host"]
    else:
        columns = [">on the device", ">at most", ">on the host"]
        size = shared["superblock_bytes"] / MIB
        console.print(
            f"KV cache and adapters share {shared['bytes'] / MIB:,.0f} MiB and trade it while they "
            f"run, {size:,.1f} MiB at a time: up to {found['kv_tokens_at_most']:,} tokens, or "
            f"adapters as in the column `at most`. The KV cache never has less than "
            f"{shared['kv_cache_bytes_min'] / MIB:,.0f} MiB, which one sequence of "
            f"{found['max_model_len']:,} tokens takes.\n",
            soft_wrap=True,
        )
    rooms = output.table("adapters, every module", ">MiB each", *columns)
    for room in found["adapters"]:
        rooms.add_row(
            f"rank {room['rank']}",
            f"{room['adapter_bytes'] / MIB:,.1f}",
            f"{room['on_device']:,}",
            *([] if shared is None else [f"{room['at_most']:,}"]),
            f"{room['on_host']:,}",
        )
    console.print(rooms)
    console.print()
    mixes = output.table(
        "mixed ranks",
        "modules",
        ">own MiB",
        ">to 16 ranks",
        ">here",
        ">padded to largest",
        ">here / padded",
        title="mean memory of an adapter",
    )
    for mix in found["mixes"]:
        mib = [f"{mix[key] / MIB:,.1f}" for key in ("own", "rounded", "here", "padded")]
        share = f"{mix['here'] / mix['padded']:.0%}"
        mixes.add_row(mix["ranks"], mix["modules"], *mib, share)
    console.print(mixes)

"""`loraplex doctor`: what this machine has, and what a server here would use."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError
from loraplex.platform.cli.server_api import AsJson

Verdict = Literal["ok", "note", "bad"]
ENOUGH_RAM_BYTES = 2 * 10**9
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[bold red]bad[/]"}

# What only torch knows is asked of a process of its own: this one never imports it.
_PROBE_TIMEOUT_S = 120
_KERNELS_TIMEOUT_S = 600  # most of it compiles what was never compiled here
_PROBE = """
import json, torch
from loraplex.kernels.select import select_ops
cuda = torch.cuda.is_available()
device = torch.device("cuda" if cuda else "cpu")
ops = select_ops("auto", device, torch.bfloat16)
print(json.dumps({
    "torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device),
    "isa": torch.backends.cpu.get_cpu_capability(),
    "gpu": torch.cuda.get_device_name() if cuda else None,
    "backend": getattr(ops, "name", type(ops).__name__),
}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` says what to do when the verdict is not ok."""

    what: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def doctor(
    data_dir: Annotated[Path, typer.Option(help="Where a server would keep its data.")] = Path(
        "loraplex-data"
    ),
    host: Annotated[str, typer.Option(help="Where it would listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="And on which port.")] = 8000,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also compare every GPU kernel with torch, here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has and what will be used. Exit status 1 when a server cannot run."""
    findings = list(examine(data_dir, host, port))
    if kernels:
        findings += check_kernels()
    healthy = all(f.verdict != "bad" for f in findings)
    if as_json:
        output.print_json({"healthy": healthy, "findings": [asdict(f) for f in findings]})
    else:
        rows = output.table("", "what", "found", "")
        for f in findings:
            rows.add_row(
                _MARKS[f.verdict],
                f.what,
                escape(f.value),
                f"[dim]{escape(f.advice)}[/]",
            )
        output.stdout().print(rows)
    if not healthy:
        raise CliError("a server cannot run here as things are; see the lines marked bad")


def examine(data_dir: Path, host: str, port: int) -> Iterator[Finding]:
    from loraplex.platform.bench.machine import compiler, machine

    here = machine()
    yield Finding("python", here.python)
    yield Finding("cpu", here.cpu)
    fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(here.features)
    yield Finding(
        "cpu features",
        ", ".join(here.features) or "none known",
        "ok" if fast else "note",
        "" if fast else "no bf16 arithmetic in hardware: --dtype float32 may be faster",
    )
    yield Finding("cores", str(here.cores))
    enough = here.ram_bytes >= ENOUGH_RAM_BYTES
    yield Finding(
        "memory",
        output.size(here.ram_bytes),
        "ok" if enough else "note",
        "" if enough else "little: choose a small model and --kv-cache-memory",
    )
    found = compiler()
    yield Finding(
        "C++ compiler",
        found or "none",
        "ok" if found else "note",
        "" if found else "install g++ for the compiled kernels; without it torch's are used",
    )
    yield Finding("gpu", here.gpu or "none")
    yield from _versions(here.versions)
    yield from _engine_side()
    yield _data_dir(data_dir)
    yield _port(host, port)


def _versions(versions: dict[str, str]) -> Iterator[Finding]:
    for package in ("torch", "transformers", "peft", "triton"):
        version = versions.get(package)
        needed = package in ("torch", "transformers")
        verdict: Verdict = "ok" if version else "bad" if needed else "note"
        advice = "" if version or not needed else f"pip install {package}"
        yield Finding(package, version or "not installed", verdict, advice)


def _engine_side() -> Iterator[Finding]:
    try:
        facts = probe()
    except CliError as error:
        yield Finding("engine", "does not load", "bad", error.message)
        return
    yield Finding("device", str(facts["gpu"] or facts["device"]))
    yield Finding("kernels", f"{facts['backend']} ({facts['isa']}, {facts['threads']} threads)")


def probe() -> dict[str, Any]:
    """Facts of the engine's side. Raises: CliError with the last line that the probe wrote."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise CliError(f"torch did not load within {_PROBE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise CliError((done.stderr.strip().splitlines() or ["torch does not load"])[-1])
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def check_kernels() -> Iterator[Finding]:
    """The start-up self-test, for the shape of a common model. Needs a GPU."""
    command = [sys.executable, "-m", "loraplex.kernels.gpu.self_test", "--batch-invariant"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_KERNELS_TIMEOUT_S)
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        why = f"not done within {_KERNELS_TIMEOUT_S} s"
        yield Finding("kernel self-test", "no result", "bad", why)
        return
    except (IndexError, json.JSONDecodeError):
        why = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        yield Finding("kernel self-test", "failed", "bad", why)
        return
    if "error" in report:
        yield Finding("kernel self-test", "not run", "note", report["error"])
        return
    for finding in report["findings"]:
        verdict: Verdict = "note" if finding["remedied"] else "bad"
        yield Finding(f"kernel {finding['operation']}", finding["dtype"], verdict, finding["text"])
    if not report["findings"]:
        shapes = ", ".join(report["shapes"])
        yield Finding("kernel self-test", f"right for {shapes} ({report['seconds']} s)")


def _data_dir(data_dir: Path) -> Finding:
    # The nearest folder that exists decides whether the rest can be made.
    existing = data_dir.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Finding(
        "data directory",
        str(data_dir),
        "ok" if writable else "bad",
        "" if writable else f"{existing} is not a folder you may write to; choose with --data-dir",
    )


def _port(host: str, port: int) -> Finding:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        why = error.strerror or str(error)
        return Finding("port", f"{host}:{port}", "bad", f"{why}; choose with --port")
    return Finding("port", f"{host}:{port} is free")

"""Everything a lease of a GPU is for, in one command: correctness first, then all benches.

Each part is a process of its own with a time limit, so that one that hangs or poisons the device
costs its own result only. Leaves a JSON and a log of each in a folder, and a summary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOTAL_SECONDS = 570.0  # of all parts
STARTING_SECONDS = 15.0  # of a process, before its own clock starts
LEAST_SECONDS = 25.0  # a part is not begun with less
DRY_PARTS = ("self-test", "kernels-decode", "engine-llama-3-8b")
SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """seconds: a limit, not a wish. json_flag: how it is told where to write; "" = last line."""

    name: str
    command: tuple[str, ...]
    seconds: float
    json_flag: str = ""


def parts(*, dry_run: bool, peers: Sequence[str], commit: str | None) -> list[Part]:
    """In the order of what one would least like to miss."""
    kernels = ("-m", "loraplex.kernels.bench")
    engine = ("-m", "loraplex.engine.bench")
    dry = ("--dry-run",) if dry_run else ()
    known = ("--commit", commit) if commit else ()
    beside = tuple(word for peer in peers for word in ("--peer", peer))
    self_test = ("-m", "loraplex.kernels.gpu.self_test")
    shapes = () if dry_run else ("--shape", "llama-3-8b", "--shape", "qwen2.5-0.5b")

    def kernel_cases(name: str, seconds: float, *cases: str) -> Part:
        command = (*kernels, *cases, "--seconds", str(seconds), *dry, *known, *beside)
        return Part(name, command, seconds + STARTING_SECONDS, "--out")

    def model(shape: str, seconds: float) -> Part:
        command = (*engine, "--shape", shape, "--seconds", str(seconds), *dry, *known)
        return Part(f"engine-{shape}", command, seconds + 2 * STARTING_SECONDS, "--out")

    every = [
        Part("self-test", (*self_test, *shapes), 100),
        *tests_on_gpu(SOURCE),
        kernel_cases("kernels-decode", 100, "machine", "decode"),
        model("llama-3-8b", 90),
        kernel_cases("kernels-layer", 60, "machine", "layer"),
        kernel_cases("kernels-attention", 40, "machine", "attention", "prefill"),
        model("qwen2.5-0.5b", 30),
        model("llama-3.2-1b", 30),
        kernel_cases("kernels-rest", 60, "popularity", "compositions", "sampler", "sweep"),
        Part("self-test-fp16", (*self_test, "--dtype", "float16", "--batch-invariant"), 60),
    ]
    if dry_run:
        return [part for part in every if part.name in DRY_PARTS]
    return every


def tests_on_gpu(source: Path) -> list[Part]:
    """The tests marked `gpu`, where the sources are at hand and pytest is installed."""
    config = source / "tests" / "gpu.ini"
    if not config.exists() or importlib.util.find_spec("pytest") is None:
        return []
    folders = [str(source / "tests" / layer) for layer in ("engine", "kernels")]
    options = ("-q", "-m", "gpu", "-c", str(config), "--rootdir", str(source))
    return [Part("tests", ("-m", "pytest", *options, *folders), 110)]


def run_all(
    folder: Path,
    *,
    dry_run: bool = False,
    peers: Sequence[str] = (),
    commit: str | None = None,
    total_seconds: float = TOTAL_SECONDS,
) -> int:
    """Returns 0 if every part ran and the self-tests found the kernels sound."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    summary: dict[str, Any] = {"parts": {}}
    for part in parts(dry_run=dry_run, peers=peers, commit=commit):
        left = total_seconds - (time.monotonic() - started)
        summary["parts"][part.name] = _run(part, folder, left, dry_run)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    summary["seconds"] = round(time.monotonic() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(json.dumps(summary))
    return 0 if all(done["status"] == 0 for done in summary["parts"].values()) else 1


def _run(part: Part, folder: Path, left: float, dry_run: bool) -> dict[str, Any]:
    """status: the process's, or why there is none."""
    if left < LEAST_SECONDS:
        return {"status": "not begun: the time is over"}
    out, log_file = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [sys.executable, "-u", *part.command]
    if part.json_flag:
        command += [part.json_flag, str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if dry_run else "0"}
    start = time.monotonic()
    print(f"--- {part.name}: {' '.join(part.command)}", flush=True)
    with log_file.open("wb") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                timeout=left if dry_run else min(part.seconds, left),
            )  # fmt: skip
            status: int | str = done.returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {min(part.seconds, left):.0f} s"
    said = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    if not part.json_flag and said and said[-1].startswith("{"):
        out.write_text(said[-1] + "\n", encoding="utf-8")
    for line in said[-8:]:
        print(f"    {line[:200]}", flush=True)
    return {"status": status, "seconds": round(time.monotonic() - start, 1)}

"""What adapters and attention cost on this machine, kernel by kernel.

    python -m loraplex.kernels.bench [case ...] [--quick] [--out FILE]

On a CPU the cases are those of `cpu_bench`, on a GPU those of `gpu.bench`; `--dry-run` runs the
GPU's cases once each on tiny shapes in Triton's interpreter. The last line is JSON for machines.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from loraplex.kernels import cpu_bench
from loraplex.kernels.versions import versions


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loraplex.kernels.bench", description=__doc__)
    parser.add_argument("cases", nargs="*", help="which cases (default: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, less repetition")
    parser.add_argument("--seconds", type=float, help="stop starting GPU cases after this long")
    parser.add_argument("--dry-run", action="store_true", help="GPU cases once, in the interpreter")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=FOLDER", type=_peer,
        help="time vllm's or sglang's kernels from an unpacked wheel beside ours",
    )  # fmt: skip
    parser.add_argument("--commit", help="of this source, where there is no git to ask")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    chosen = parser.parse_args(arguments)
    device = "cpu" if chosen.dry_run else chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    torch.manual_seed(0)
    on_gpu = device == "cuda" or chosen.dry_run
    known = _gpu_cases() if on_gpu else cpu_bench.CASES
    unknown = [name for name in chosen.cases if name not in known]
    if unknown:
        parser.error(f"no case {unknown[0]!r} here; known: {', '.join(known)}")
    if on_gpu:
        from loraplex.kernels.gpu.bench import run_gpu_bench

        results = run_gpu_bench(
            chosen.cases,
            dry_run=chosen.dry_run,
            quick=chosen.quick,
            seconds=chosen.seconds,
            peers=dict(chosen.peer),
            journal=chosen.out and chosen.out.with_suffix(".jsonl"),
        )
    else:
        results = cpu_bench.run_cpu_bench(chosen.cases)
    facts = versions(torch.device(device))
    if chosen.commit:
        facts["commit"] = chosen.commit
    report = {
        "bench": "kernels",
        "device": device,
        **facts,
        "seconds": round(time.perf_counter() - start, 1),
        **results,
    }
    write_report(report, chosen.out)
    return 0


def write_report(report: dict[str, Any], out: Path | None) -> None:
    """The JSON as the last line of the output and, if wanted, in a file."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _gpu_cases() -> tuple[str, ...]:
    # Only here: a CPU without Triton can still run its own cases.
    from loraplex.kernels.gpu.bench import CASES

    return tuple(CASES)


def _peer(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in ("vllm", "sglang") or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r}: give vllm=FOLDER or sglang=FOLDER, the folder of the unpacked wheel"
        )
    return name, Path(folder)


if __name__ == "__main__":
    sys.exit(main())

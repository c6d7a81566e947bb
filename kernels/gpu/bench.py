"""The GPU's kernels one by one: microseconds, the floor that memory sets, other servers' kernels.

    python -m loraplex.kernels.bench --device cuda [--quick] [--peer vllm=FOLDER] [case ...]

Question: does a decode step with adapters cost more than the bytes of those adapters? Each case
checks its result against torch in fp32, then times CUDA graphs over data that does not fit the
cache (`bench_timing`). A case that fails is reported and the others go on. `fraction` is floor /
measured: 1 is the machine's limit.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex.kernels.gpu.bench_attention import bench_attention
from loraplex.kernels.gpu.bench_context import Bench
from loraplex.kernels.gpu.bench_layer import bench_layer
from loraplex.kernels.gpu.bench_lora import (
    bench_compositions,
    bench_decode,
    bench_popularity,
    bench_prefill,
)
from loraplex.kernels.gpu.bench_machine import bench_machine
from loraplex.kernels.gpu.bench_sampler import bench_sampler
from loraplex.kernels.gpu.bench_sweep import bench_sweep
from loraplex.kernels.gpu.bench_timing import GraphTimer, WallTimer
from loraplex.kernels.gpu.peers import load_peer
from loraplex.kernels.model_shapes import LLAMA_3_8B, TINY

# In the order of what one would least like to miss if time runs out.
CASES: dict[str, Callable[[Bench], None]] = {
    "machine": bench_machine,
    "decode": bench_decode,
    "layer": bench_layer,
    "attention": bench_attention,
    "prefill": bench_prefill,
    "popularity": bench_popularity,
    "compositions": bench_compositions,
    "sampler": bench_sampler,
    "sweep": bench_sweep,
}
SECONDS = 300.0


@torch.inference_mode()
def run_gpu_bench(
    names: Sequence[str],
    *,
    dry_run: bool = False,
    quick: bool = False,
    seconds: float | None = None,
    peers: Mapping[str, Path] | None = None,
    journal: Path | None = None,
) -> dict[str, Any]:
    """names: of `CASES`, none for all. Prints tables, returns rows and errors.

    dry_run: tiny shapes on the CPU, every pass once. seconds: no size is begun after that long.
    journal: a file that gets every row as soon as it is known.
    """
    bench = Bench(
        shape=TINY if dry_run else LLAMA_3_8B,
        # The interpreter multiplies bf16 operands of `tl.dot` wrongly; peers know no way around.
        dtype=torch.float16 if dry_run else torch.bfloat16,
        device=torch.device("cpu" if dry_run else "cuda"),
        timer=WallTimer() if dry_run else GraphTimer(0.05 if quick else 0.15),
        quick=quick,
        dry_run=dry_run,
        deadline=time.monotonic() + (SECONDS if seconds is None else seconds),
        peers=[load_peer(name, folder) for name, folder in (peers or {}).items()],
        journal=journal,
    )
    errors: dict[str, str] = {}
    took: dict[str, float] = {}
    for name in names or CASES:
        start = time.monotonic()
        print(f"\n{name}", flush=True)
        try:
            CASES[name](bench)
        except Exception as error:  # a lease of a GPU is too rare to lose the other cases
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"
        took[name] = round(time.monotonic() - start, 1)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "shape": bench.shape.name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "machine": {
            "copy_gb_s": round(bench.machine.bytes_per_us / 1e3, 1),
            "matmul_tflop_s": round(bench.machine.flops_per_us / 1e6, 1),
        },
        "rows": bench.rows,
        "errors": errors,
        "not_reached": bench.not_reached,
        "case_seconds": took,
    }

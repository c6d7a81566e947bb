"""What the machine gives at best, and what a launch costs: the scale all other numbers stand on."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from loraplex.kernels.gpu.bench_context import Bench
from loraplex.kernels.gpu.bench_timing import num_passes
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.roofline import Machine
from loraplex.kernels.gpu.streams import SideStream

CHAIN = 200  # launches in a row
EXITING = 100_000  # programs that look something up and leave
COPY_BYTES = 1 << 30
MATMUL = 8192


@triton.jit
def _touch_kernel(x):
    """One program, one store: next to nothing but its launch."""
    tl.store(x, 1.0)


@triton.jit
def _exit_kernel(tiles, count, x):
    """A program past `count`: two dependent loads, then it leaves, as padding tiles do."""
    first = tl.load(tiles + tl.program_id(0) % 64)
    if first >= tl.load(count):
        return
    tl.store(x, 1.0)


def bench_machine(bench: Bench) -> None:
    """Copy bandwidth, matrix rate, the model's linears, and the cost of a launch."""
    device, dtype = bench.device, bench.dtype
    size = 1 << 16 if bench.dry_run else COPY_BYTES
    source = torch.empty(size // dtype.itemsize, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    us = bench.time([partial(target.copy_, source)] * 4).us
    copy = 2 * size / us
    bench.add("machine", what="copy", us=us, gb_s=copy / 1e3)
    del source, target
    n = 64 if bench.dry_run else MATMUL
    a = torch.empty(n, n, dtype=dtype, device=device).normal_()
    b = torch.empty(n, n, dtype=dtype, device=device).normal_()
    us = bench.time([partial(torch.mm, a, b)] * 2).us
    rate = 2 * n**3 / us
    bench.add("machine", what="matmul", us=us, tflop_s=rate / 1e6)
    if not bench.dry_run:
        bench.machine = Machine(bytes_per_us=copy, flops_per_us=rate)
    _launches(bench)
    _linears(bench)


def _launches(bench: Bench) -> None:
    x = torch.zeros(64, device=bench.device)
    chain = 4 if bench.dry_run else CHAIN
    touch = partial(launch, _touch_kernel, (1,), x, num_warps=1)
    bench.add("machine", what="launch", us=bench.time([touch] * chain).us)
    side = SideStream()

    def fork_join() -> None:
        with side.fork(bench.device):
            touch()
        touch()
        side.join()

    us = bench.time([fork_join] * chain).us
    bench.add("machine", what="fork, a launch on each branch, join", us=us)
    tiles = torch.full((64,), 9, dtype=torch.int32, device=bench.device)
    count = torch.zeros(1, dtype=torch.int32, device=bench.device)
    programs = 8 if bench.dry_run else EXITING
    leave = partial(launch, _exit_kernel, (programs,), tiles, count, x, num_warps=4)
    us = bench.time([leave] * 4).us
    bench.add("machine", what=f"{programs} programs that leave at once", us=us)


def _linears(bench: Bench) -> None:
    shape = bench.shape
    for name, (width, out) in shape.linears().items():
        nbytes = width * out * bench.dtype.itemsize
        count = 2 if bench.dry_run else min(8, num_passes(nbytes))
        weights = [
            torch.empty(out, width, dtype=bench.dtype, device=bench.device).normal_()
            for _ in range(count)
        ]
        for rows in bench.sizes("machine linears", (1, 8, 16, 64, 256), (1, 64), (2,)):
            x = torch.empty(rows, width, dtype=bench.dtype, device=bench.device).normal_()
            timing = bench.time([partial(torch.nn.functional.linear, x, w) for w in weights])
            floor = bench.machine.floor_us(nbytes, 2.0 * rows * width * out)
            bench.add("machine", floor, what=f"linear {name}", rows=rows, us=timing.us)

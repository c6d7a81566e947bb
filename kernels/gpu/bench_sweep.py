"""Other numbers of warps, stages and columns for the decode kernels than those they have.

A recorded launch is started again with one thing changed, so a sweep needs nothing of the
launchers. The result is a table to decide from, not a tuner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from loraplex.kernels.gpu.bench_context import Bench
from loraplex.kernels.gpu.bench_lora import make_steps
from loraplex.kernels.gpu.bench_timing import num_passes
from loraplex.kernels.gpu.configurations import kernel_name
from loraplex.kernels.gpu.expected import relative_error
from loraplex.kernels.gpu.launch import Launch, recording
from loraplex.kernels.gpu.roofline import lora_bytes

RANK = 16
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)
COLUMNS = (256, 512, 1024)
OUTPUTS = ("t", "out", "q_out")  # what a kernel writes without reading it


def bench_sweep(bench: Bench) -> None:
    for rows in bench.sizes("sweep", (1, 64, 256), (), (1,)):
        steps = make_steps(bench, [(1, (i,)) for i in range(rows)], [RANK] * rows)
        count = num_passes(lora_bytes(bench.shape, [RANK] * rows))
        recorded: list[list[Launch]] = []
        for step, layer in steps.places(2 if bench.dry_run else count):
            with recording() as notes:
                step.adapted(layer)
            recorded.append(notes)
        for place in range(len(recorded[0])):
            launches = [notes[place] for notes in recorded]
            _sweep_kernel(bench, launches, rows)


def _sweep_kernel(bench: Bench, launches: list[Launch], rows: int) -> None:
    first = launches[0]
    base = bench.time([partial(start, launch) for launch in launches]).us
    found: dict[str, float | str] = {}
    for label, change in variants(first):
        try:
            changed = [change(launch) for launch in launches]
            _compare(bench, first, changed[0])
            us = bench.time([partial(start, launch) for launch in changed]).us
            found[label] = float(f"{us / base:.3g}")
        except Exception as error:  # too many registers, say: that is an answer, too
            found[label] = type(error).__name__
        if bench.dry_run:
            break
    name = kernel_name(first.kernel)
    default = f"{first.num_warps} warps {first.num_stages} stages"
    bench.add("sweep", kernel=name, rows=rows, us=base, default=default, relative=found)


def variants(launch: Launch) -> Iterator[tuple[str, Any]]:
    """(what is changed, how to change a launch of the same kernel)."""
    for warps in WARPS:
        if warps != launch.num_warps:
            yield f"{warps} warps", partial(replace, num_warps=warps)
    for stages in STAGES:
        if stages != launch.num_stages:
            yield f"{stages} stages", partial(replace, num_stages=stages)
    if "COLUMNS" in launch.args and "WIDTH" in launch.args:
        for columns in COLUMNS:
            if columns != launch.args["COLUMNS"]:
                yield f"{columns} columns", partial(with_columns, columns=columns)


def with_columns(launch: Launch, columns: int) -> Launch:
    """For kernels whose grid is (columns of WIDTH, tiles)."""
    dot = min(columns, launch.args.get("DOT_COLUMNS", columns))
    args = {**launch.args, "COLUMNS": columns}
    if "DOT_COLUMNS" in args:
        args["DOT_COLUMNS"] = dot
    grid = (triton.cdiv(launch.args["WIDTH"], columns), *launch.grid[1:])
    return replace(launch, grid=grid, args=args)


def start(launch: Launch) -> None:
    launch.kernel[launch.grid](
        **launch.args, num_warps=launch.num_warps, num_stages=launch.num_stages
    )


def _compare(bench: Bench, default: Launch, changed: Launch) -> None:
    """Kernels that work in place, on a residual, are left to the tests: twice is not once."""
    names = [name for name in OUTPUTS if isinstance(default.args.get(name), Tensor)]
    if not names or "residual" in default.args:
        return
    start(default)
    want = {name: default.args[name].clone() for name in names}
    start(changed)
    for name in names:
        error = relative_error(torch.nan_to_num(default.args[name]), torch.nan_to_num(want[name]))
        if error > 1e-2:
            raise AssertionError(f"{name} differs by {error:.2g}")

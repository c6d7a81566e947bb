"""Steps with adapters for the tests of shrink, expand and gate: what goes in, and what must come.

`poison` makes fresh tensors NaN, so that an entry which no kernel writes, or one which a kernel
must not read, spoils the result. `replay` runs recorded launches again, as a captured graph would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_cases import Adapter, Shape, make_lora, make_pool, rand
from torch import Tensor
from work_cases import make_work

from loraplex.kernels import reference
from loraplex.kernels.gpu.launch import Launch
from loraplex.kernels.gpu.work import LoraWork
from loraplex.kernels.ops import LoraBatch, Module, PageTables

# fp32: the order of sums. 16 bits: one rounding of the result, and of T where the matrix units
# multiply.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
DTYPES = tuple(TOLERANCE)
SHAPES = {
    "even": Shape(hidden=64, intermediate=96),
    "odd": Shape(hidden=50, intermediate=77),
    "two planes": Shape(hidden=531, intermediate=531),
}
ADAPTERS = (
    Adapter(1, alpha=2.0),
    Adapter(8),
    Adapter(16, alpha=5.0),
    Adapter(40, alpha=20.0, ranks={Module.UP: 8}),
    Adapter(4, modules=(Module.Q, Module.UP)),
    Adapter(16, modules=(Module.GATE, Module.V), layers=(1,)),
)
Composition = Sequence[tuple[int, float]]
Rows = Sequence[tuple[int, Composition]]
ROWS: dict[str, Rows] = {
    "no row": [],
    "one base row": [(1, [])],
    "one row": [(1, [(2, 1.0)])],
    "rows apart": [(1, [(0, 1.0)]), (1, [(1, 0.5)]), (2, []), (1, [(3, 1.0)]), (1, [(4, -1.0)])],
    "rows shared": [(2, [(1, 1.0)]), (3, []), (16, [(3, 1.0)]), (9, [(5, 2.0)])],
    "composed": [(1, [(2, 0.5), (3, -1.5)]), (2, [(0, 0.25), (5, 3.0), (4, 1.0)])],
    "prefills": [(1, [(1, 1.0)]), (65, [(3, 1.0), (4, -0.5)]), (20, []), (17, [(5, 1.0)])],
}
DECODES = [name for name in ROWS if name != "prefills"]


@dataclass
class Step:
    """x and base are random; `delta` says what an adapter adds to base."""

    shape: Shape
    tables: PageTables
    pages: list[list[int]]
    lora: LoraBatch
    work: LoraWork
    num_rows: int
    dtype: torch.dtype

    def x(self, module: Module = Module.GATE) -> Tensor:
        return rand(self.num_rows, self.shape.widths(module)[0], dtype=self.dtype, scale=0.3)

    def base(self, *modules: Module) -> Tensor:
        width = sum(self.shape.widths(module)[1] for module in modules)
        return rand(self.num_rows, width, dtype=self.dtype)

    def delta(self, x: Tensor, layer: int, module: Module) -> Tensor:
        """`[T, out]` fp32."""
        return reference.lora_delta(x, self.lora, layer, module, self.shape.widths(module)[1])


def make_step(
    rows: str | Rows,
    dtype: torch.dtype = torch.float32,
    shape: str = "odd",
    *,
    small_only: bool = False,
    padding: int = 2,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> Step:
    wanted = ROWS[rows] if isinstance(rows, str) else rows
    tables, pages = make_pool(SHAPES[shape], adapters, dtype)
    num_rows = sum(count for count, _ in wanted)
    lora = make_lora(tables, pages, wanted)
    work = make_work(lora, num_rows, small_only=small_only, padding=padding)
    return Step(SHAPES[shape], tables, pages, lora, work, num_rows, dtype)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), **TOLERANCE[got.dtype])


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN (or a wild integer) from now on."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if made.device.type == "meta":
            return made
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 20)

    monkeypatch.setattr(torch, "empty", poisoned)


def replay(launches: Sequence[Launch]) -> None:
    """Run what was recorded: same grids, same tensors, whatever these hold by now."""
    for launch in launches:
        if 0 not in launch.grid:
            launch.kernel[launch.grid](
                **launch.args, num_warps=launch.num_warps, num_stages=launch.num_stages
            )

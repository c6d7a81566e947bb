"""The gate with the deltas of both inputs, alone on a T made slowly and after the real shrink."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import work_cases
from kernel_cases import make_lora
from lora_cases import DTYPES, ROWS, SHAPES, Step, close, make_step, poison, replay
from torch import Tensor
from work_cases import make_work

from loraplex.kernels import reference
from loraplex.kernels.gpu.launch import recording
from loraplex.kernels.gpu.shrink import shrink
from loraplex.kernels.gpu.swiglu import LARGE_STEPS, large_steps, swiglu
from loraplex.kernels.gpu.work import TILE_FIELDS, LoraWork, TileList, plan_rows
from loraplex.kernels.ops import GATE_UP, Module, PageTables


def expected(step: Step, x: Tensor, gate_up: Tensor, layer: int) -> Tensor:
    gate, up = gate_up.float().split(step.shape.intermediate, 1)
    gate = gate + step.delta(x, layer, Module.GATE)
    return reference.swiglu(gate, up + step.delta(x, layer, Module.UP))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_row(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: str) -> None:
    """T holds NaN where no shrink writes, the output where the kernel has not written."""
    step = make_step(rows, dtype)
    x, gate_up = step.x(), step.base(*GATE_UP)
    t = work_cases.shrink(x, step.lora, step.work, 1, GATE_UP)
    poison(monkeypatch)
    got = swiglu(gate_up, t, step.tables, step.work, 1)
    close(got, expected(step, x, gate_up, 1))
    assert got.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("small_only", [False, True])
def test_after_the_shrink(monkeypatch: pytest.MonkeyPatch, shape: str, small_only: bool) -> None:
    """small_only also takes the form whose rows do not depend on their mates."""
    rows = [(1, [(3, 1.0)]), (2, []), (17, [(2, 1.5), (4, 1.0)]), (1, [(5, -1.0)])]
    step = make_step(rows, torch.float16, shape, small_only=small_only)
    x, gate_up = step.x(), step.base(*GATE_UP)
    poison(monkeypatch)
    t = shrink(x, step.tables, step.work, 0, GATE_UP, batch_invariant=small_only)
    got = swiglu(gate_up, t, step.tables, step.work, 0, batch_invariant=small_only)
    close(got, expected(step, x, gate_up, 0))


@pytest.mark.parametrize("rows", ["rows apart", "prefills"])
def test_without_adapters_pages_are_not_looked_at(rows: str) -> None:
    step = make_step(rows)
    gate_up = step.base(*GATE_UP)
    got = swiglu(gate_up, None, None, step.work, 0)
    close(got, reference.swiglu(*gate_up.split(step.shape.intermediate, 1)))


def test_gelu_tanh() -> None:
    step = make_step("rows shared")
    x, gate_up = step.x(), step.base(*GATE_UP)
    gate, up = gate_up.split(step.shape.intermediate, 1)
    gate = gate + step.delta(x, 1, Module.GATE)
    wanted = F.gelu(gate, approximate="tanh")
    t = work_cases.shrink(x, step.lora, step.work, 1, GATE_UP)
    got = swiglu(gate_up, t, step.tables, step.work, 1, "gelu_tanh")
    close(got, wanted * (up + step.delta(x, 1, Module.UP)))


def test_saturated_gates() -> None:
    """No overflow on either side, which would be a warning here and could be a NaN on a device."""
    step = make_step("one base row")
    width = step.shape.intermediate
    gate = torch.linspace(-3e4, 3e4, width)[None]
    gate_up = torch.cat((gate, torch.ones(1, width)), 1)
    close(swiglu(gate_up, None, None, step.work, 0), F.silu(gate))
    got = swiglu(gate_up, None, None, step.work, 0, "gelu_tanh")
    close(got, F.gelu(gate, approximate="tanh"))


def test_a_captured_launch_serves_any_adapters() -> None:
    """Recorded with one adapter on one row; the device's lists change, grids and tensors do not."""
    room = 8
    step = make_step([(1, [(2, 1.0)]), (room - 1, [])])
    count = torch.zeros(1, dtype=torch.int32)
    tiles = TileList(torch.zeros((room, TILE_FIELDS), dtype=torch.int32), count, room)
    work = LoraWork(
        page_ids=torch.zeros(64, dtype=torch.int32),
        page_weights=torch.zeros(64),
        small=tiles,
        norm=tiles,
        large=None,
        small_entries=64,
        large_entries=0,
    )
    x, gate_up = step.x(), step.base(*GATE_UP)
    with recording() as launches:
        t = shrink(x, step.tables, work, 1, GATE_UP)
        got = swiglu(gate_up, t, step.tables, work, 1)
    assert t.small is not None
    for rows in (
        [(1, [(2, 1.0)]), (room - 1, [])],
        [(1, [(adapter, 0.5)]) for adapter in range(6)] + [(2, [])],
        [(2, [(3, 1.0), (4, -2.0)]), (1, []), (5, [(1, 1.0)])],
        [(room, [])],
        [(room, [(3, 1.0), (2, 1.0), (5, 1.0)])],
    ):
        step.lora = make_lora(step.tables, step.pages, rows)
        plan = plan_rows(step.lora.host_tiles, room, small_only=True)
        tiles.tiles[: len(plan.small)] = torch.from_numpy(plan.small)
        count.fill_(len(plan.small))
        work.page_ids[: len(step.lora.page_ids)] = step.lora.page_ids
        work.page_weights[: len(step.lora.page_weights)] = step.lora.page_weights
        t.small.fill_(float("nan"))
        got.fill_(float("nan"))
        x.copy_(step.x())
        replay(launches)
        close(got, expected(step, x, gate_up, 1))


def test_batch_invariant_rows_do_not_depend_on_their_mates() -> None:
    alone = make_step([(1, [(2, 1.0)])], torch.float16, small_only=True)
    x, gate_up = alone.x(), alone.base(*GATE_UP)

    def run(rows: int, place: int, batch_invariant: bool) -> Tensor:
        lora = make_lora(alone.tables, alone.pages, [(rows, [(2, 1.0)])])
        work = make_work(lora, rows, small_only=True)
        mates, bases = torch.randn(rows, x.shape[1]).half(), torch.randn(rows, gate_up.shape[1])
        bases = bases.half()
        mates[place], bases[place] = x[0], gate_up[0]
        t = shrink(mates, alone.tables, work, 0, GATE_UP, batch_invariant=batch_invariant)
        out = swiglu(bases, t, alone.tables, work, 0, batch_invariant=batch_invariant)
        return out[place]

    assert torch.equal(run(1, 0, True), run(5, 3, True))
    assert torch.equal(run(1, 0, True), run(40, 39, True))
    assert not torch.equal(run(1, 0, False), run(5, 3, False))  # what the switch is for


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["scaling", "adapter", "weight", "rows"])
def test_the_tolerances_catch_a_wrong_adapter(dtype: torch.dtype, wrong: str) -> None:
    step = make_step([(1, [(1, 1.0)]), (2, [(2, 1.0)])], dtype)
    x, gate_up = step.x(), step.base(*GATE_UP)
    right = expected(step, x, gate_up, 0)
    tables: PageTables = step.tables
    work = step.work
    if wrong == "scaling":
        tables = replace(tables, scaling=tables.scaling * 1.2)
    elif wrong == "adapter":
        work = replace(work, page_ids=work.page_ids.flip(0))
    elif wrong == "weight":
        work = replace(work, page_weights=work.page_weights * 0.8)
    t = shrink(x, tables, work, 0, GATE_UP)
    if wrong == "rows":
        assert t.small is not None
        t.small.copy_(t.small.flip(1))
    got = swiglu(gate_up, t, tables, work, 0)
    with pytest.raises(AssertionError):
        close(got, right)


def test_short_prefills_walk_one_block_and_long_ones_many() -> None:
    def steps(capacity: int) -> int:
        nothing = torch.empty(0)
        return large_steps(14336, 32, TileList(nothing, nothing, capacity))

    assert steps(1) == 1
    assert steps(8) == 3
    assert steps(512) == LARGE_STEPS


def test_refusals() -> None:
    step = make_step("one row")
    gate_up = step.base(*GATE_UP)
    with pytest.raises(ValueError, match="contiguous"):
        swiglu(gate_up.t(), None, None, step.work, 0)
    with pytest.raises(ValueError, match=r"2 \* I"):
        swiglu(gate_up[:, :-1].contiguous(), None, None, step.work, 0)
    with pytest.raises(ValueError, match="'relu' is unknown"):
        swiglu(gate_up, None, None, step.work, 0, "relu")  # type: ignore[arg-type]

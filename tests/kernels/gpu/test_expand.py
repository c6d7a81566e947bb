"""`y += scale * t B` in place, for one module of a shrunk group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import work_cases
from lora_cases import DTYPES, ROWS, SHAPES, close, make_step, poison

from loraplex.kernels.gpu.expand import expand
from loraplex.kernels.gpu.shrink import shrink
from loraplex.kernels.ops import GATE_UP, QKV, Module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_row(dtype: torch.dtype, rows: str) -> None:
    """T holds NaN where no shrink writes."""
    step = make_step(rows, dtype)
    x, y = step.x(), step.base(Module.UP)
    before = y.clone()
    t = work_cases.shrink(x, step.lora, step.work, 1, GATE_UP)
    expand(y, t, step.tables, step.work, 1, Module.UP, first_module=Module.GATE)
    close(y, before.float() + step.delta(x, 1, Module.UP))
    adapted = {
        row for first, count, *_ in step.lora.host_tiles for row in range(first, first + count)
    }
    base = [row for row in range(step.num_rows) if row not in adapted]
    assert torch.equal(y[base], before[base])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [QKV, (Module.O,), (Module.DOWN,)])
def test_every_module_after_the_shrink(
    monkeypatch: pytest.MonkeyPatch, shape: str, group: tuple[Module, ...]
) -> None:
    rows = [(1, [(3, 1.0)]), (1, []), (3, [(4, -2.0), (2, 1.0)]), (17, [(3, 0.5)])]
    step = make_step(rows, torch.float16, shape)
    poison(monkeypatch)
    x = step.x(group[0])
    t = shrink(x, step.tables, step.work, 0, group)
    for module in group:
        y = step.base(module)
        wanted = y.float() + step.delta(x, 0, module)
        expand(y, t, step.tables, step.work, 0, module, first_module=group[0])
        close(y, wanted)


def test_batch_invariant() -> None:
    step = make_step("rows shared", torch.float16, small_only=True)
    x, y = step.x(), step.base(Module.GATE)
    wanted = y.float() + step.delta(x, 1, Module.GATE)
    t = shrink(x, step.tables, step.work, 1, GATE_UP, batch_invariant=True)
    expand(
        y, t, step.tables, step.work, 1, Module.GATE, first_module=Module.GATE, batch_invariant=True
    )
    close(y, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["scaling", "adapter", "module", "layer"])
def test_the_tolerances_catch_a_wrong_adapter(dtype: torch.dtype, wrong: str) -> None:
    step = make_step([(1, [(1, 1.0)]), (2, [(2, 1.0)])], dtype)
    x, y = step.x(), step.base(Module.UP)
    wanted = y.float() + step.delta(x, 0, Module.UP)
    t = work_cases.shrink(x, step.lora, step.work, 0, GATE_UP)
    tables, work = step.tables, step.work
    if wrong == "scaling":
        tables = replace(tables, scaling=tables.scaling * 1.2)
    elif wrong == "adapter":
        work = replace(work, page_ids=work.page_ids.flip(0))
    module = Module.GATE if wrong == "module" else Module.UP
    expand(y, t, tables, work, int(wrong == "layer"), module, first_module=Module.GATE)
    with pytest.raises(AssertionError):
        close(y, wanted)


def test_refusals() -> None:
    step = make_step("rows shared")
    y = step.base(Module.UP)
    t = work_cases.shrink(step.x(), step.lora, step.work, 0, GATE_UP)
    with pytest.raises(ValueError, match="contiguous"):
        expand(y.t(), t, step.tables, step.work, 0, Module.UP, first_module=Module.GATE)
    with pytest.raises(ValueError, match=r"torch\.float16 but the adapter arena"):
        expand(y.half(), t, step.tables, step.work, 0, Module.UP, first_module=Module.GATE)
    with pytest.raises(ValueError, match="first module of the group"):
        expand(y, t, step.tables, step.work, 0, Module.UP, first_module=Module.V)

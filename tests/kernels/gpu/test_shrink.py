"""`t = x A^T` for every row, page and module, against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import work_cases
from kernel_cases import make_lora
from lora_cases import DECODES, DTYPES, ROWS, SHAPES, Step, make_step, poison
from torch import Tensor
from work_cases import make_work

from loraplex.kernels.gpu.shrink import Shrunk, large_chunk, shrink, small_chunk
from loraplex.kernels.ops import GATE_UP, QKV, Module

# Sums of fp32 products either way; 16-bit inputs are exact in fp32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def check(step: Step, x: Tensor, got: Shrunk, layer: int, modules: tuple[Module, ...]) -> None:
    """Each entry that must be written, planes summed."""
    expected = work_cases.shrink(x, step.lora, step.work, layer, modules, planes=1)
    for mine, theirs in ((got.small, expected.small), (got.large, expected.large)):
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None or not mine.shape[1]:
            continue
        total = mine.sum(0)
        written = ~theirs[0].isnan()
        assert written.any() == bool(step.lora.host_tiles)
        torch.testing.assert_close(total[written], theirs[0][written], **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_entry(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: str) -> None:
    step = make_step(rows, dtype)
    poison(monkeypatch)
    x = step.x()
    got = shrink(x, step.tables, step.work, 1, GATE_UP)
    assert got.num_modules == 2
    check(step, x, got, 1, GATE_UP)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modules", [QKV, (Module.DOWN,)])
@pytest.mark.parametrize("layer", [0, 1])
def test_every_width_and_group(
    monkeypatch: pytest.MonkeyPatch, shape: str, modules: tuple[Module, ...], layer: int
) -> None:
    step = make_step(
        [(1, [(3, 1.0)]), (1, [(5, 1.0)]), (2, [(2, 1.0), (4, 1.0)]), (18, [(3, 1.0)])], shape=shape
    )
    poison(monkeypatch)
    x = step.x(modules[0])
    check(step, x, shrink(x, step.tables, step.work, layer, modules), layer, modules)


def test_wide_inputs_are_cut_into_planes() -> None:
    step = make_step([(1, [(3, 1.0)]), (17, [(3, 1.0)])], shape="two planes")
    got = shrink(step.x(), step.tables, step.work, 0, GATE_UP)
    assert got.small is not None
    assert got.large is not None
    assert got.small.shape == (2, step.work.small_entries, 32)
    assert got.large.shape == (2, step.work.large_entries, 32)


@pytest.mark.parametrize("width", [8, 50, 512, 896, 4096, 5120, 8192, 14336, 28672])
def test_chunks_cover_the_width_in_few_planes(width: int) -> None:
    for chunk in (small_chunk(width), large_chunk(width)):
        planes = -(-width // chunk)
        assert (planes - 1) * chunk < width <= planes * chunk
        assert planes <= max(8, width // 1024)


@pytest.mark.parametrize("rows", DECODES)
def test_matrix_form_alone(monkeypatch: pytest.MonkeyPatch, rows: str) -> None:
    step = make_step(rows, torch.float16, small_only=True)
    poison(monkeypatch)
    x = step.x()
    check(step, x, shrink(x, step.tables, step.work, 0, GATE_UP, batch_invariant=True), 0, GATE_UP)


@pytest.mark.usefixtures("sums_rows_alike")
def test_batch_invariant_rows_do_not_depend_on_their_mates() -> None:
    """The same row alone, first of five and last of forty: the same bits."""
    alone = make_step([(1, [(2, 1.0)])], torch.float16, small_only=True)
    x = alone.x()
    expected = shrink(x, alone.tables, alone.work, 0, GATE_UP, batch_invariant=True).small
    assert expected is not None
    for rows, place in ((5, 0), (40, 39)):
        lora = make_lora(alone.tables, alone.pages, [(rows, [(2, 1.0)])])
        work = make_work(lora, rows, small_only=True)
        mates = torch.randn(rows, x.shape[1]).to(x.dtype)
        mates[place] = x[0]
        got = shrink(mates, alone.tables, work, 0, GATE_UP, batch_invariant=True).small
        assert got is not None
        assert torch.equal(got[:, place : place + 1], expected)


@pytest.mark.parametrize("wrong", ["adapter", "rows", "live ranks"])
def test_the_comparison_can_fail(wrong: str) -> None:
    step = make_step([(1, [(1, 1.0)]), (1, [(2, 1.0)])])
    x = step.x()
    if wrong == "adapter":
        step.work = replace(step.work, page_ids=step.work.page_ids.flip(0))
    elif wrong == "rows":
        x = x.flip(0)
    else:
        step.tables.live_ranks[step.pages[2]] = 15
    got = shrink(x, step.tables, step.work, 0, GATE_UP)
    x = x.flip(0) if wrong == "rows" else x
    with pytest.raises(AssertionError):
        check(step, x, got, 0, GATE_UP)


def test_refusals() -> None:
    step = make_step("prefills")
    x = step.x()
    with pytest.raises(ValueError, match="contiguous"):
        shrink(x.t(), step.tables, step.work, 0, GATE_UP)
    with pytest.raises(ValueError, match=r"torch\.float16 but the adapter arena torch\.float32"):
        shrink(x.half(), step.tables, step.work, 0, GATE_UP)
    with pytest.raises(ValueError, match="neighbours"):
        shrink(x, step.tables, step.work, 0, (Module.Q, Module.V))
    with pytest.raises(ValueError, match="small_only"):
        shrink(x, step.tables, step.work, 0, GATE_UP, batch_invariant=True)
    crowded = replace(step.work, large_entries=1 << 26)
    with pytest.raises(ValueError, match="fewer tokens per step"):
        shrink(x, step.tables, crowded, 0, GATE_UP)

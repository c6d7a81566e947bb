"""The launcher: recording instead of running, the configurations behind a list of launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from loraplex.kernels.gpu.configurations import configuration, distinct, kernel_name
from loraplex.kernels.gpu.launch import launch, limit_stages, recording


@triton.jit(do_not_specialize=["layer"])
def _double_kernel(x, y, n, layer, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * factor + layer, mask=at < n)


META = torch.device("meta")


def double(n: int, *, dtype: torch.dtype = torch.float32, layer: int = 0, **options: Any) -> Any:
    x = torch.ones(max(n, 1), dtype=dtype, device=options.pop("device", "cpu"))
    y = torch.zeros_like(x)
    launch(
        _double_kernel, (triton.cdiv(n, 16),), x, y, n, layer, 2.0, BLOCK=16,
        **{"num_warps": 1, "num_stages": 3, **options},
    )  # fmt: skip
    return y


@pytest.fixture(autouse=True)
def _unlimited() -> Iterator[None]:
    yield
    limit_stages(_double_kernel, None)


def test_runs_outside_of_a_recording() -> None:
    assert double(20, layer=3).tolist() == [5.0] * 20


def test_an_empty_grid_starts_nothing() -> None:
    assert double(0).tolist() == [0.0]


def test_a_recording_lists_and_does_not_run() -> None:
    with recording() as notes:
        y = double(20, layer=3)
        double(7, device=META)
    assert y.tolist() == [0.0] * 20
    first, second = notes
    assert first.kernel is _double_kernel
    assert (first.grid, second.grid) == ((2,), (1,))
    assert (first.num_warps, first.num_stages) == (1, 3)
    assert first.args["n"] == 20
    assert first.args["BLOCK"] == 16
    assert second.args["x"].device == META


def test_recordings_end_and_nest() -> None:
    with recording() as outer:
        with recording() as inner:
            double(4)
        double(5)
    double(6)
    assert [note.args["n"] for note in inner] == [4]
    assert [note.args["n"] for note in outer] == [5]


def test_limited_stages_hold_until_lifted() -> None:
    limit_stages(_double_kernel, 1)
    with recording() as notes:
        double(4)
        double(4, num_stages=1)
    limit_stages(_double_kernel, None)
    with recording() as later:
        double(4)
    assert [note.num_stages for note in notes + later] == [1, 1, 3]


def one(n: int, **options: Any) -> Any:
    with recording() as notes:
        double(n, **options)
    return configuration(notes[0])


def test_configurations_follow_tritons_specialisation() -> None:
    """Same compiled kernel or not, as Triton decides it."""
    assert one(17) == one(18)
    assert one(17) != one(32), "divisible by 16"
    assert one(17) != one(1), "equal to 1"
    assert one(17, layer=1) == one(17, layer=16) == one(17, layer=5), "not specialised"
    assert one(17) != one(17, dtype=torch.float16)
    assert one(17) != one(17, num_warps=2)
    assert one(17) != one(17, num_stages=2)
    assert one(17) == one(17, device=META), "meta tensors stand for aligned ones"


def test_an_unaligned_pointer_is_another_configuration() -> None:
    x = torch.ones(33)
    with recording() as notes:
        for start in (0, 1, 4):
            launch(_double_kernel, (1,), x[start:], x[start:], 16, 0, 2.0, BLOCK=16)
    aligned, odd, next_16_bytes = map(configuration, notes)
    assert aligned == next_16_bytes != odd


def test_distinct_keeps_the_first_of_each_and_no_empty_grid() -> None:
    with recording() as notes:
        for n in (17, 18, 32, 0, 48):
            double(n)
    found = distinct(notes)
    assert [note.args["n"] for note in found.values()] == [17, 32]


def test_a_configuration_reads_as_what_it_is() -> None:
    assert kernel_name(_double_kernel) == "double"
    assert str(one(17, dtype=torch.bfloat16)) == "double bfloat16 [BLOCK=16] 1 warps, 3 stages"


@triton.jit(do_not_specialize_on_alignment=["x"])
def _copy_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


def test_alignment_counts_only_where_the_kernel_is_specialised_on_it() -> None:
    x = torch.ones(33)
    with recording() as notes:
        for i, j in ((0, 0), (1, 0), (0, 1)):
            launch(_copy_kernel, (1,), x[i:], x[j:], BLOCK=16)
    first, odd_x, odd_y = map(configuration, notes)
    assert first == odd_x != odd_y

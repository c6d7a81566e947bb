"""RMSNorm and the embedding gather."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import rand
from torch import Tensor

from loraplex.kernels import reference
from loraplex.kernels.gpu.embed import embed
from loraplex.kernels.gpu.norm import rms_norm

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},  # one rounding
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 1), (3, 50), (2, 64), (5, 4097)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = rand(rows, width, dtype=dtype, scale=3.0), rand(width, dtype=dtype)
    got = rms_norm(x, weight, 1e-3)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), reference.rms_norm(x, weight, 1e-3), **TOLERANCE[dtype])


def test_small_rows_show_a_wrong_eps() -> None:
    x, weight = torch.full((2, 24), 1e-3), torch.ones(24)
    expected = reference.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8).t(), torch.zeros(2), "contiguous"),
        (torch.zeros(2, 8), torch.zeros(4), r"must be \[8\]"),
        (torch.zeros(8), torch.zeros(8), r"\[T, H\]"),
    ],
)
def test_misfit_norms_are_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-6)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 1), (7, 50), (3, 1030)])
def test_embed(ids_dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(0)
    weight = rand(11, width, dtype=torch.bfloat16)
    ids = torch.randint(0, 11, (rows,), dtype=ids_dtype)
    assert torch.equal(embed(ids, weight), weight[ids.long()])


def test_the_last_row_of_a_large_vocabulary_is_found() -> None:
    """Row times width passes 2^31 elements in large models: int64 offsets. Here only the end."""
    weight = torch.arange(3000 * 8.0).view(3000, 8)
    assert torch.equal(embed(torch.tensor([2999, 0]), weight), weight[[2999, 0]])


@pytest.mark.parametrize(
    ("ids", "weight", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 4), r"must be \[T\]"),
        (torch.zeros(2), torch.zeros(3, 4), r"torch\.float32"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4).t(), r"\[V, H\]"),
    ],
)
def test_misfit_gathers_are_refused(ids: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(ids, weight)

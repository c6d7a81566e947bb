"""The one-configuration matmul: right, and the same bits for a row whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import rand

from loraplex.kernels.gpu.matmul import InvariantLinear, matmul
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.ops import Linear

# Sums are in fp32; then one unit in the last place of the output (the interpreter cuts off bf16).
UNIT = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "depth", "with_bias"),
    [(1, 96, 80, True), (5, 33, 256, False), (70, 200, 100, True)],
)
def test_matches_torch(
    rows: int, width: int, depth: int, dtype: torch.dtype, with_bias: bool
) -> None:
    torch.manual_seed(rows)
    x, weight = rand(rows, depth, dtype=dtype), rand(width, depth, dtype=dtype)
    bias = rand(width, dtype=dtype, scale=4.0) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    got = matmul(x, weight, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=UNIT[dtype], atol=5e-5)


def test_no_rows() -> None:
    assert matmul(torch.zeros(0, 64), torch.zeros(48, 64)).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("sums_rows_alike")
def test_a_row_does_not_depend_on_its_mates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = rand(131, 320, dtype=dtype), rand(70, 320, dtype=dtype)
    whole = matmul(x, weight)
    for rows in (slice(0, 1), slice(17, 18), slice(3, 40), slice(60, 131)):
        assert torch.equal(matmul(x[rows].contiguous(), weight), whole[rows])


def test_the_invariant_backend_uses_it() -> None:
    weight, bias = rand(48, 64, dtype=torch.float16), rand(48, dtype=torch.float16)
    linear: Linear = TritonOps(batch_invariant=True).linear(weight, bias)
    assert isinstance(linear, InvariantLinear)
    assert (linear.in_features, linear.out_features, linear.nbytes) == (64, 48, 48 * 65 * 2)
    x = rand(3, 64, dtype=torch.float16)
    assert torch.equal(linear(x), matmul(x, weight, bias))


def test_more_column_tiles_than_a_group_of_row_tiles() -> None:
    """The grouped order of programs covers every tile: nine row tiles, the last group short."""
    x, weight = rand(32 * 9, 32, dtype=torch.float32), rand(80, 32, dtype=torch.float32)
    torch.testing.assert_close(matmul(x, weight), x @ weight.T, rtol=1e-5, atol=2e-5)


def test_refuses_what_it_would_misread() -> None:
    x, weight = torch.zeros(4, 64), torch.zeros(48, 64)
    with pytest.raises(ValueError, match=r"x has shape \(4, 32\)"):
        matmul(x[:, :32].contiguous(), weight)
    with pytest.raises(ValueError, match=r"weight has strides \(1, 48\): must be contiguous"):
        matmul(x, torch.zeros(64, 48).T)
    with pytest.raises(ValueError, match=r"weight is torch.float16, x torch.float32"):
        matmul(x, weight.half())
    with pytest.raises(ValueError, match=r"bias has shape \(4,\): must be \[48\]"):
        matmul(x, weight, torch.zeros(4))

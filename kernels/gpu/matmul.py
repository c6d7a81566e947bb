"""`x W^T + bias` in one fixed way, so that a row's result does not depend on the other rows.

cuBLAS chooses tiles and split-K by the number of rows, and with them the order of a sum. Here the
tile, the instruction and the order along K are the same for one row and for ten thousand: for
`batch_invariant` only, elsewhere cuBLAS is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.common import dot
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.packed_linear import row_squares

_GROUP_M = tl.constexpr(8)


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x, weight, bias, out, num_rows,
    N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]`.

    Grid: (row tiles * column tiles), eight row tiles of a column tile side by side, so that a
    prefill finds the weights in L2. One accumulator in fp32 over all of K in steps of BK: no split
    along K, hence no order to choose. Source: Triton's matmul tutorial (grouped order).
    """
    index = tl.program_id(0)
    num_m, num_n = tl.cdiv(num_rows, BM), tl.cdiv(N, BN)
    group = index // (_GROUP_M * num_n)
    in_group = index % (_GROUP_M * num_n)
    group_m = tl.minimum(num_m - group * _GROUP_M, _GROUP_M)
    m = (group * _GROUP_M + in_group % group_m) * BM + tl.arange(0, BM)
    n = in_group // group_m * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_rows = x + m[:, None].to(tl.int64) * K + k[None, :]
    w_rows = weight + n[:, None].to(tl.int64) * K + k[None, :]
    in_m, in_n = (m < num_rows)[:, None], (n < N)[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for at in range(0, K, BK):
        if K % BK == 0:
            a = tl.load(x_rows + at, mask=in_m, other=0.0)
            b = tl.load(w_rows + at, mask=in_n, other=0.0)
        else:
            in_k = (k < K - at)[None, :]
            a = tl.load(x_rows + at, mask=in_m & in_k, other=0.0)
            b = tl.load(w_rows + at, mask=in_n & in_k, other=0.0)
        acc = dot(a, tl.trans(b), acc)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    where = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=in_m & (n < N)[None, :])


class InvariantLinear:
    """`ops.Linear` on the weight as given. weight: `[out, in]`, bias: `[out]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)

    def row_squares(self) -> Tensor:
        return row_squares(self.weight)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[M, K] x [N, K] (+ [N]) -> [M, N]`, all of one dtype and contiguous.

    The tile is a compromise that one row and a prefill share: 64 rows are one warp group of wgmma,
    and still less work than the bytes of the weights take to arrive.

    Raises: ValueError for tensors the kernel would misread.
    """
    _check(x, weight, bias)
    (num_rows, depth), width = x.shape, weight.shape[0]
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    tensor_cores = x.dtype.itemsize == 2
    bm, bn, bk = (64, 64, 128) if tensor_cores else (32, 32, 32)
    launch(
        matmul_kernel,
        (triton.cdiv(num_rows, bm) * triton.cdiv(width, bn),),
        x,
        weight,
        bias,
        out,
        num_rows,
        N=width,
        K=depth,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=4,
        num_stages=4 if tensor_cores else 2,
    )
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: must be [rows, in] and "
            "[out, in]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: must be [{weight.shape[0]}]")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x {x.dtype}: must be the same")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}: must be contiguous; call .contiguous()"
            )

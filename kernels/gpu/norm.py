"""RMSNorm of whole rows. Memory-bound: a row is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight`, rounded once. x: `[T, H]`, contiguous. New.

    Raises: ValueError for tensors the kernel would misread.
    """
    check_norm(x, weight)
    out = torch.empty_like(x)
    rows, width = x.shape
    launch(
        _rms_norm_kernel,
        (rows,),
        x,
        weight,
        out,
        eps,
        WIDTH=width,
        WIDTH_POW2=triton.next_power_of_2(width),
        num_warps=norm_warps(width),
    )
    return out


def check_norm(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"rows to norm of shape {tuple(x.shape)} and strides {x.stride()} must be [T, H] and "
            "contiguous; call .contiguous()"
        )
    if weight.shape != x.shape[1:]:
        raise ValueError(f"norm weight of shape {tuple(weight.shape)} must be [{x.shape[1]}]")


def norm_warps(width: int) -> int:
    """16 to 32 columns a thread: enough loads under way, few registers."""
    return 4 if width <= 4096 else 8


@triton.jit
def norm_row(x, weight, eps, WIDTH: tl.constexpr):
    """x: one row in fp32, zero past WIDTH."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr):
    """`out = x / sqrt(mean(x^2) + eps) * weight`. Grid: (rows). fp32 (Zhang, Sennrich 2019)."""
    at = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, WIDTH_POW2)
    inside = column < WIDTH
    row = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    normed = norm_row(row, gain, eps, WIDTH)
    tl.store(out + at + column, normed.to(out.dtype.element_ty), mask=inside)

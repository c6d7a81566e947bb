"""The embedding's rows for a step's tokens: a gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch

COLUMNS = 1024


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """`weight[token_ids]`. token_ids: `[T]` int32 or int64; weight: `[V, H]`, contiguous.

    Ids are not checked, that would need a host read: one outside the vocabulary is our bug.

    Raises: ValueError for tensors the kernel would misread.
    """
    if token_ids.dim() != 1 or not token_ids.is_contiguous():
        raise ValueError(
            f"token_ids of shape {tuple(token_ids.shape)} and strides {token_ids.stride()} must be "
            "[T] and contiguous"
        )
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids is {token_ids.dtype}: must be torch.int32 or torch.int64")
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(
            f"embedding of shape {tuple(weight.shape)} and strides {weight.stride()} must be "
            "[V, H] and contiguous"
        )
    rows, width = token_ids.shape[0], weight.shape[1]
    out = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    launch(
        _embed_kernel,
        (rows, triton.cdiv(width, columns)),
        token_ids,
        weight,
        out,
        WIDTH=width,
        COLUMNS=columns,
    )
    return out


@triton.jit
def _embed_kernel(token_ids, weight, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """`out[t] = weight[token_ids[t]]`. Grid: (tokens, columns). Nothing is computed."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    token = tl.load(token_ids + row).to(tl.int64)
    value = tl.load(weight + token * WIDTH + column, mask=inside)
    tl.store(out + row * WIDTH + column, value, mask=inside)

"""What the operations of a layer should return: plain torch in fp32, on the device of the data.

The oracle of the self-test and of the benches, where `kernels.reference` with its loops over tokens
and heads would take minutes; a test holds the two against each other. Shares nothing with the
kernels but the description of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.ops import PAGE_RANKS, AttentionBatch, LoraBatch, Module

# |got - expected| <= tolerance * (|expected| + root mean square of expected), element by element.
# Outputs are rounded once to the model's type, and T where it meets the matrix units: 2^-9 in bf16.
# The worst is SwiGLU, a product of two such sums: with both factors six deviations out, an error of
# 2^-9 in each is 0.14 of a typical output, and 0.05 * (1 + 36 / 2) are tolerated.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}


def excess(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The worst element's error in units of what is tolerated: up to 1 is right. NaN is infinite.

    Waits for the device.
    """
    if expected.numel() == 0:
        return 0.0
    got, expected = got.float(), expected.float()
    scale = expected.abs() + expected.square().mean().sqrt()
    ratio = (got - expected).abs() / (TOLERANCE[dtype] * scale + 1e-30)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """`|got - expected| / |expected|` over all elements. Waits for the device."""
    got, expected = got.float(), expected.float()
    error = float((got - expected).norm() / (expected.norm() + 1e-30))
    return error if error == error else float("inf")


def _tile(lora: LoraBatch, side: Tensor, page: int, layer: int, module: int, width: int) -> Tensor:
    first = int(side[page, layer, module])
    return lora.tables.arena[first : first + PAGE_RANKS * width].view(PAGE_RANKS, width).float()


def shrink_result(x: Tensor, lora: LoraBatch, page: int, layer: int, module: int) -> Tensor | None:
    """`x A^T` of one page, `[rows, 16]`; None where the page does not adapt the module."""
    if int(lora.tables.offset_a[page, layer, module]) < 0:
        return None
    a = _tile(lora, lora.tables.offset_a, page, layer, module, x.shape[1])
    return x.float() @ a.T


def lora_delta(x: Tensor, lora: LoraBatch | None, layer: int, module: Module, width: int) -> Tensor:
    """`[T, width]`, as in `kernels.reference`."""
    delta = torch.zeros(x.shape[0], width, device=x.device)
    for row, rows, first, entries in [] if lora is None else lora.host_tiles:
        assert lora is not None
        for entry in range(first, first + entries):
            page, tables = lora.host_page_ids[entry], lora.tables
            t = shrink_result(x[row : row + rows], lora, page, layer, module)
            if t is not None:
                scale = lora.host_page_weights[entry] * tables.scaling[page, layer, module]
                bt = _tile(lora, tables.offset_b, page, layer, module, width)
                delta[row : row + rows] += scale * (t @ bt)
    return delta


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: `[T, heads, D]`; half-split rope."""
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), -1)
    return heads * cos.float()[:, None] + turned * sin.float()[:, None]


def attention(
    q: Tensor,
    kv: PagedKVCache,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """`[T, heads * D]`. Sequence after sequence, their keys and values gathered from the pages."""
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], device=q.device)
    for index, length in enumerate(batch.host_context_lens):
        first, last = batch.host_query_start[index : index + 2]
        keys, values = (
            _gather(pages[layer], batch.host_block_tables[index], length)
            for pages in (kv.keys, kv.values)
        )
        group = q.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = q[first:last].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        at = torch.arange(length - (last - first), length, device=q.device)[:, None]
        past = torch.arange(length, device=q.device)[None]
        hidden = (past > at) if window is None else (past > at) | (past <= at - window)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        out[first:last] = (weights @ values).transpose(0, 1).reshape(last - first, -1)
    return out


def _gather(pages: Tensor, table: list[int], length: int) -> Tensor:
    """`[blocks, heads, block_size, D] -> [heads, length, D]` fp32."""
    blocks = pages[torch.tensor(table, device=pages.device)].float()
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate.float()) * up.float()

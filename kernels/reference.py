"""The slow, obvious form of every operation in fp32: the oracle of the tests.

Loops over tokens, pages and heads, straight from the formulas, sharing no code with the backends.
Attention takes plain keys and values per sequence, so a test against it shows that paging is
invisible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraplex.kernels.ops import PAGE_RANKS, AttentionBatch, LoraBatch, Module


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = [row * weight.float() / math.sqrt(float((row * row).mean()) + eps) for row in x.float()]
    return torch.stack(rows) if rows else x.float()


def lora_delta(x: Tensor, lora: LoraBatch | None, layer: int, module: Module, out: int) -> Tensor:
    """`sum over pages of weight * scaling * (x A^T) B^T` for each token. Returns `[T, out]`."""
    x = x.float()
    delta = torch.zeros(x.shape[0], out)
    if lora is None:
        return delta
    tables, width = lora.tables, x.shape[1]
    for row, rows, first, entries in lora.tiles.tolist():
        for entry in range(first, first + entries):
            page = int(lora.page_ids[entry])
            offset_a = int(tables.offset_a[page, layer, module])
            offset_b = int(tables.offset_b[page, layer, module])
            if offset_a < 0:
                continue
            a = tables.arena[offset_a : offset_a + PAGE_RANKS * width].float().view(-1, width)
            b = tables.arena[offset_b : offset_b + PAGE_RANKS * out].float().view(-1, out)
            factor = float(lora.page_weights[entry]) * float(tables.scaling[page, layer, module])
            for token in range(row, row + rows):
                delta[token] += factor * ((a @ x[token]) @ b)
    return delta


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of one head of one token. x, cos, sin: `[D]`."""
    half = x.shape[0] // 2
    first, second = x[:half], x[half:]
    return torch.cat(
        (
            first * cos[:half] - second * sin[:half],
            second * cos[half:] + first * sin[half:],
        )
    )


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised and rotated q `[T, Hq, D]` and k `[T, Hk, D]`, and v `[T, Hk, D]`.

    The deltas are already in qkv.
    """
    heads = qkv.float().view(-1, num_heads + 2 * num_kv_heads, head_dim).clone()
    cos, sin = cos.float(), sin.float()
    for token in range(heads.shape[0]):
        for head in range(num_heads + num_kv_heads):
            norm = q_norm if head < num_heads else k_norm
            x = heads[token, head]
            if norm is not None:
                x = rms_norm(x[None], norm, eps)[0]
            heads[token, head] = rope(x, cos[token], sin[token])
    last_k = num_heads + num_kv_heads
    return heads[:, :num_heads], heads[:, num_heads:last_k], heads[:, last_k:]


def attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    batch: AttentionBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query at a time, returns `[T, Hq * D]`.

    keys, values: per sequence of the batch `[context, Hk, D]`.
    """
    out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2])
    starts = batch.query_start.tolist()
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        k, v = k.float(), v.float()
        group = q.shape[1] // k.shape[1]
        for token in range(starts[index], starts[index + 1]):
            position = int(batch.positions[token])
            low = 0 if window is None else max(0, position - window + 1)
            heads = []
            for head in range(q.shape[1]):
                past = slice(low, position + 1)
                scores = (k[past, head // group] @ q[token, head].float()) * scale
                heads.append(torch.softmax(scores, 0) @ v[past, head // group])
            out[token] = torch.cat(heads)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.float()
    return gate / (1 + torch.exp(-gate)) * up.float()

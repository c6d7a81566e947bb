"""Paged keys and values in plain torch, and attention over them: decodes in one padded call on
their mirror, prefills one call per sequence.

Pages are token-major, so a step's write is one `index_copy_` per tensor and a gathered block table
reads as a view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.kernels.decode_mirror import DecodeMirror, DecodeStep
from loraplex.kernels.ops import AttentionBatch, NewTensor, new_zeros

MIRROR_BYTES = 512 << 20


@dataclass(slots=True, eq=False)
class AttentionPlan:
    """One step's notes: the last written keys and values, and the masks, shared by all layers."""

    owner: TorchKVCache
    decodes: DecodeStep | None  # None: the mirror is full, gather instead
    k: Tensor | None = None  # [T, Hk, D] just written
    v: Tensor | None = None
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)


class TorchKVCache:
    """K and V: `[num_layers, num_blocks * block_size, num_kv_heads, head_dim]`.

    mirror_bytes: bound on the contiguous copy kept for decodes, beyond `nbytes`.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        mirror_bytes: int = MIRROR_BYTES,
        new: NewTensor = new_zeros,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        shape = (num_layers, num_blocks * block_size, num_kv_heads, head_dim)
        self.k = new(shape, dtype, device)
        self.v = new(shape, dtype, device)
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.planes = [layer.view(num_blocks, -1) for pages in (self.k, self.v) for layer in pages]
        self.mirror = DecodeMirror(self.k, self.v, block_size, mirror_bytes)

    def copy_block(self, source: int, target: int) -> None:
        size = self.block_size
        for pages in (self.k, self.v):
            blocks = pages.view(pages.shape[0], self.num_blocks, size, *pages.shape[2:])
            blocks[:, target].copy_(blocks[:, source])

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        plan = batch.plan
        if not isinstance(plan, AttentionPlan) or plan.owner is not self:
            batch.plan = plan = AttentionPlan(self, self.mirror.step(batch))
        return plan

    def write(self, layer: int, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
        """Store the step's keys and values, `[T, Hk, D]` each, at `batch.slot_mapping`."""
        plan = self.plan(batch)
        self.k[layer].index_copy_(0, batch.slot_mapping, k)
        self.v[layer].index_copy_(0, batch.slot_mapping, v)
        plan.k, plan.v = k, v
        if plan.decodes is not None:
            count = batch.num_decodes
            self.mirror.write(layer, plan.decodes, k[:count], v[:count])

    def gather(self, layer: int, block_table: list[int], length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens of a sequence, `[length, Hk, D]` each."""
        num_blocks = -(-length // self.block_size)
        table = torch.tensor(block_table[:num_blocks], device=self.k.device)
        shape = (self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        k = self.k[layer].view(shape)[table].flatten(0, 1)[:length]
        v = self.v[layer].view(shape)[table].flatten(0, 1)[:length]
        return k, v


def attend(
    q: Tensor,
    kv: TorchKVCache,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of the step. q: `[T, Hq, D]`. Returns `[T, Hq * D]`."""
    decodes, count = kv.plan(batch).decodes, batch.num_decodes
    if decodes is None:
        count = 0
    elif count == q.shape[0]:
        return kv.mirror.attend(layer, decodes, q, scale, window).flatten(1)
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    if decodes is not None:
        out[:count] = kv.mirror.attend(layer, decodes, q[:count], scale, window).flatten(1)
    for index in range(count, len(batch.seq_ids)):
        first, last = batch.host_query_start[index], batch.host_query_start[index + 1]
        if first == last:
            continue
        out[first:last] = _attend_one(q, kv, layer, batch, index, scale, window).flatten(1)
    return out


def _attend_one(
    q: Tensor,
    kv: TorchKVCache,
    layer: int,
    batch: AttentionBatch,
    index: int,
    scale: float,
    window: int | None,
) -> Tensor:
    first, last = batch.host_query_start[index], batch.host_query_start[index + 1]
    length, num_queries = batch.host_context_lens[index], last - first
    plan = kv.plan(batch)
    mask = None
    if length == num_queries and plan.k is not None and plan.v is not None:
        k, v = plan.k[first:last], plan.v[first:last]
    else:
        k, v = kv.gather(layer, batch.host_block_tables[index], length)
    causal = length == num_queries
    if not causal or (window is not None and length > window):
        mask = plan.masks.get((index, window))
        if mask is None:
            mask = plan.masks[index, window] = causal_mask(num_queries, length, window, q.device)
        causal = False
    return F.scaled_dot_product_attention(
        q[first:last].transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
    )[0].transpose(0, 1)


def causal_mask(num_queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """`[queries, length]` bool, the queries being the last positions."""
    query = torch.arange(length - num_queries, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)

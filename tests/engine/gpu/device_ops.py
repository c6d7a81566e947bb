"""Operations that believe only what lies in device memory: its tile lists, tables and lengths.

What the Triton kernels do with a step's metadata, in plain torch, so that tests of the runner are
quick. The host lists of a batch are never looked at, rows that no tile covers come out as NaN, and
so does everything computed from them: a wrong or stale field shows in the tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loraplex.kernels.gpu.attention_work import AttentionWork
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.work import LoraWork, TileList
from loraplex.kernels.ops import GATE_UP, PAGE_RANKS, QKV, AttentionBatch, LoraBatch, Module
from loraplex.kernels.torch_ops import TorchOps, _rotate


def tiles_of(tiles: TileList | None) -> list[list[int]]:
    if tiles is None:
        return []
    count = int(tiles.count)
    assert count <= tiles.capacity, "programs are started for `capacity` tiles only"
    return tiles.tiles[:count].tolist()


class DeviceOps(TorchOps):
    name = "triton"

    def kv_cache(self, *args: Any) -> PagedKVCache:
        return PagedKVCache(*args)

    def lora_shrink(self, x: Tensor, lora: Any, layer: int, modules: Any) -> Any:
        """The input itself: the expand does it all."""
        assert lora is not None, "the base rows of a step need tiles, too"
        return x if any((layer, int(m)) in lora.adapted for m in modules) else None

    def rope_kv_write(
        self, qkv: Tensor, t: Any, lora: Any, layer: int, cos: Tensor, sin: Tensor, q_norm: Any,
        k_norm: Any, norm_eps: float, num_heads: int, kv: Any, batch: AttentionBatch,
    ) -> Tensor:  # fmt: skip
        dim, num_kv = kv.head_dim, kv.num_kv_heads
        q, k, v = qkv.split([num_heads * dim, num_kv * dim, num_kv * dim], dim=1)
        q, k, v = (add_deltas(y, t, lora, layer, m) for y, m in zip((q, k, v), QKV, strict=True))
        q, k, v = q.view(-1, num_heads, dim), k.view(-1, num_kv, dim), v.view(-1, num_kv, dim)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, norm_eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, norm_eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        for row, slot in enumerate(batch.slot_mapping.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, kv.block_size)
                kv.keys[layer][block, :, offset] = k[row]
                kv.values[layer][block, :, offset] = v[row]
        return q

    def attention(
        self, q: Tensor, kv: Any, layer: int, batch: AttentionBatch, scale: float, window: Any
    ) -> Tensor:
        work = batch.plan
        assert isinstance(work, AttentionWork)
        out = torch.full_like(q, math.nan)
        lengths = batch.context_lens.tolist()
        rows = [(row, row, lengths[row] - 1) for row in range(work.num_decodes)]
        if work.prefill_tiles is not None:
            count = work.prefill_capacity
            if work.prefill_count is not None:
                count = min(count, int(work.prefill_count))
            for first, queries, position, seq in work.prefill_tiles[:count].tolist():
                assert queries <= work.tile_queries
                rows += [(first + i, seq, position + i) for i in range(queries)]
        for row, seq, position in rows:
            assert row < 0 or bool(out[row].isnan().all()), "a row in two tiles"
            if position < 0:  # padding
                continue
            assert int(batch.positions[row]) == position
            assert batch.query_start[seq] <= row < batch.query_start[seq + 1]
            first = 0 if window is None else max(0, position + 1 - window)
            at = torch.arange(first, position + 1)
            blocks = batch.block_tables[seq][at // kv.block_size].long()
            k = kv.keys[layer][blocks, :, at % kv.block_size]  # [n, Hk, D]
            v = kv.values[layer][blocks, :, at % kv.block_size]
            group = q.shape[1] // kv.num_kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            weights = torch.softmax(torch.einsum("hd,nhd->hn", q[row], k) * scale, -1)
            out[row] = torch.einsum("hn,nhd->hd", weights, v)
        return out.flatten(1)

    def add_rms_norm(
        self, y: Tensor, t: Any, lora: Any, layer: int, module: Module, residual: Tensor,
        weight: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        residual.add_(add_deltas(y, t, lora, layer, module, norm=True))
        return self.rms_norm(residual, weight, eps)

    def swiglu(self, gate_up: Tensor, t: Any, lora: Any, layer: int) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        gate, up = (
            add_deltas(y, t, lora, layer, m) for y, m in zip((gate, up), GATE_UP, strict=True)
        )
        return torch.nn.functional.silu(gate) * up


def add_deltas(
    y: Tensor, x: Tensor | None, lora: LoraBatch, layer: int, module: Module, norm: bool = False
) -> Tensor:
    """y plus the delta on rows in tiles, NaN on others. norm: by the smaller tiles."""
    work, tables = lora.plan, lora.tables
    assert isinstance(work, LoraWork)
    out = torch.full_like(y, math.nan)
    entries = 0
    for tile in tiles_of(work.norm if norm else work.small) + tiles_of(work.large):
        first, rows, page, num_pages, entry, *_ = tile
        mine = slice(first, first + rows)
        assert bool(out[mine].isnan().all()), "a row in two tiles"
        out[mine] = y[mine]
        entries += rows * num_pages
        assert entry + rows * num_pages <= max(work.small_entries, work.large_entries)
        for index in range(page, page + num_pages):
            place = (int(work.page_ids[index]), layer, int(module))
            offset_a, offset_b = int(tables.offset_a[place]), int(tables.offset_b[place])
            if offset_b < 0:
                continue
            assert x is not None, "nothing was shrunk for rows that have a delta"
            a = tables.arena[offset_a : offset_a + PAGE_RANKS * x.shape[1]].view(PAGE_RANKS, -1)
            b = tables.arena[offset_b : offset_b + PAGE_RANKS * y.shape[1]].view(PAGE_RANKS, -1)
            scale = tables.scaling[place] * work.page_weights[index]
            out[mine] += scale * (x[mine] @ a.T @ b)
    assert entries <= work.small_entries + work.large_entries
    return out

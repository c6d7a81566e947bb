"""A small step through two backends, compared: run once before compiled kernels are trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.ops import (
    GATE_UP,
    NUM_MODULES,
    PAGE_RANKS,
    QKV,
    AttentionBatch,
    LoraBatch,
    Module,
    Ops,
    PageTables,
)

HIDDEN, HEADS, KV_HEADS, DIM, WIDTH = 96, 4, 2, 24, 80
TILES = [(0, 1, 0, 2), (1, 3, 1, 1), (4, 12, 0, 2)]  # the first four rows decode
ROWS = 18
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2}


def backends_agree(ops: Ops, expected: Ops, dtype: torch.dtype) -> bool:
    """True if both compute the same layer on random data with adapters, to dtype's precision."""
    tolerance = TOLERANCE[dtype]
    pairs = zip(_layer(ops, dtype), _layer(expected, dtype), strict=True)
    return all(
        torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance) for a, b in pairs
    )


def _layer(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    tables = _tables(rand)
    ids, weights = [0, 1], [1.0, 0.5]
    lora = LoraBatch(
        tables=tables,
        tiles=torch.tensor(TILES, dtype=torch.int32),
        page_ids=torch.tensor(ids, dtype=torch.int32),
        page_weights=torch.tensor(weights),
        max_pages=2,
        host_tiles=list(TILES),
        host_page_ids=ids,
        host_page_weights=weights,
        adapted=frozenset((0, module) for module in range(NUM_MODULES)),
    )
    kv = ops.kv_cache(1, 8, 16, KV_HEADS, DIM, dtype, torch.device("cpu"))
    x, residual = rand(ROWS, HIDDEN), rand(ROWS, HIDDEN)
    norm, angles = rand(HIDDEN), torch.rand(ROWS, DIM // 2, generator=generator).repeat(1, 2)
    out = [ops.rms_norm(x, norm, 1e-6)]
    qkv = rand(ROWS, (HEADS + 2 * KV_HEADS) * DIM)
    t = ops.lora_shrink(x, lora, 0, QKV)
    batch = _batch()
    q = ops.rope_kv_write(
        qkv, t, lora, 0, angles.cos(), angles.sin(), None, None, 1e-6, HEADS, kv, batch
    )
    attended = ops.attention(q, kv, 0, batch, DIM**-0.5, None)
    out += [q, attended]
    t = ops.lora_shrink(attended, lora, 0, (Module.O,))
    normed = ops.add_rms_norm(rand(ROWS, HIDDEN), t, lora, 0, Module.O, residual, norm, 1e-6)
    t = ops.lora_shrink(normed, lora, 0, GATE_UP)
    out += [normed, residual, ops.swiglu(rand(ROWS, 2 * WIDTH), t, lora, 0)]
    return out


def _tables(rand: object) -> PageTables:
    assert callable(rand)
    q, kv = HEADS * DIM, KV_HEADS * DIM
    outs = (q, kv, kv, HIDDEN, WIDTH, WIDTH, HIDDEN)
    ins = (HIDDEN, HIDDEN, HIDDEN, q, HIDDEN, HIDDEN, WIDTH)
    tiles, offsets = [], torch.zeros(2, 2, 1, NUM_MODULES, dtype=torch.int64)
    used = 0
    for page in range(2):
        for module in range(NUM_MODULES):
            for side, width in enumerate((ins[module], outs[module])):
                tiles.append(rand(PAGE_RANKS * width, scale=0.05))
                offsets[side, page, 0, module] = used
                used += PAGE_RANKS * width
    return PageTables(
        arena=torch.cat(tiles),
        offset_a=offsets[0],
        offset_b=offsets[1],
        live_ranks=torch.full((2, 1, NUM_MODULES), PAGE_RANKS, dtype=torch.int32),
        scaling=torch.full((2, 1, NUM_MODULES), 2.0),
    )


def _batch() -> AttentionBatch:
    """Four sequences of one token and one of fourteen, all fresh."""
    starts = [0, 1, 2, 3, 4, ROWS]
    lengths = [1, 1, 1, 1, ROWS - 4]
    blocks = [3, 1, 4, 2, 6]
    slots = [block * 16 for block in blocks[:4]] + [6 * 16 + i for i in range(ROWS - 4)]
    return AttentionBatch(
        positions=torch.tensor([0, 0, 0, 0, *range(ROWS - 4)]),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor(blocks, dtype=torch.int32)[:, None].contiguous(),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        num_decodes=4,
        seq_ids=[0, 1, 2, 3, 4],
        host_query_start=starts,
        host_context_lens=lengths,
        host_block_tables=[[block] for block in blocks],
    )

"""Causal attention of runs of new tokens over their pages: compute-bound, on the matrix units.

A run's own keys and values lie in its pages already, so a first chunk, a later chunk and a prefix
hit are the same thing. Knows nothing of how runs were cut into tiles (`attention_work`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.attention_work import NARROW_ROWS, TILE_FIELDS, AttentionWork
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.online_softmax import (
    NO_WINDOW,
    NOTHING_SEEN,
    accumulate,
    load_blocks,
    load_pages,
    page_offsets,
    score_units,
    scores,
)

_TILE_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit(
    do_not_specialize=["window", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "tiles", "count"],
)
def prefill_attention_kernel(
    q, keys, values, block_tables, tiles, count, out,
    unit, gain, window, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """`out[i, h] = softmax(scale * q[i, h] K^T) V` over positions `p - window < j <= p` of i's p.

    Grid: (kv heads, tiles), heads fastest, so that the longest tiles of all heads start first. A
    tile is up to QUERIES neighbouring tokens times the GROUP heads that share a kv head, as rows of
    one matrix: keys are read once for all of them, and the triangle wasted at the diagonal is only
    QUERIES wide. Key blocks start at multiples of BN from position 0 and every row sits at a place
    fixed by its position, so a row's result is the same however its prompt was cut. Blocks that
    every row sees whole skip the masks. Accumulation in fp32.
    Sources: FlashAttention-2 (Dao 2023); packing a GQA group into rows as in FlashAttention's
    decode (`pack_gqa`).
    """
    head, index = tl.program_id(0), tl.program_id(1)
    if count is not None:
        if index >= tl.load(count):
            return
    tile = tiles + index * _TILE_FIELDS
    first_row, num_queries = tl.load(tile), tl.load(tile + 1)
    position, seq = tl.load(tile + 2), tl.load(tile + 3)

    low = position // QUERIES * QUERIES
    end = position + num_queries  # keys that any row sees
    row = tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    at = low + row // GROUP  # position of each row's query
    real = (at >= position) & (at < end)
    used = real[:, None]
    if DIM != HEAD_DIM:
        used = used & (d < HEAD_DIM)[None, :]
    token = (first_row + at - position).to(tl.int64)
    head_row = (token * NUM_KV_HEADS + head) * GROUP + row % GROUP
    where = head_row[:, None] * HEAD_DIM + d[None, :]
    queries = tl.load(q + where, mask=used, other=0.0)

    table = block_tables + seq.to(tl.int64) * table_stride
    begin = tl.maximum(low - window + 1, 0) // BN * BN
    n = tl.arange(0, BN)
    fixed = page_offsets(head, n, d, HEAD_DIM, BLOCK_SIZE)
    blocks = load_blocks(table, begin, end, n, BLOCK_SIZE)
    m = tl.full([ROWS], NOTHING_SEEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(begin, end, BN):
        k = load_pages(
            keys, fixed, blocks, start, end, n, d, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE
        )  # fmt: skip
        v = load_pages(
            values, fixed, blocks, start, end, n, d, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE
        )  # fmt: skip
        s = scores(queries, k, gain, SOFT_CAP)
        if (start + BN > position + 1) | (start < end - window):
            tokens = start + n
            seen = (tokens[None, :] <= at[:, None]) & (tokens[None, :] > at[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        m, total, acc = accumulate(s, v, unit, m, total, acc)
        # Carried, not loaded where it is used: so keys are requested stages ahead, not addresses.
        blocks = load_blocks(table, start + BN, end, n, BLOCK_SIZE)

    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=used)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    block_n: int
    num_warps: int
    num_stages: int


def prefill_config(rows: int, dim: int, dtype: torch.dtype) -> PrefillConfig:
    """rows: of a tile; dim: head dimension rounded up to a power of two.

    One warp group per 64 rows, so that scores and accumulator stay in registers and a row's maximum
    needs no shared memory. Three stages: two blocks on their way while one is computed with. Keys
    per step are what leaves no register spilled on sm_90 and sm_80; up to head_dim 64 two programs
    share a Hopper multiprocessor, and one's softmax runs beside the other's products.
    """
    if dtype.itemsize == 4:  # no tensor cores: only tests run this
        return PrefillConfig(block_n=32, num_warps=4, num_stages=2)
    wide = rows > NARROW_ROWS
    return PrefillConfig(
        block_n=64 if wide or dim <= 64 else 32,
        num_warps=8 if wide or dim > 128 else 4,
        num_stages=3,
    )


def prefill_attention(
    q: Tensor,
    kv: PagedKVCache,
    layer: int,
    block_tables: Tensor,
    work: AttentionWork,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
) -> None:
    """The rows of `work.prefill_tiles` of `out` `[T, HQ * D]`, from q `[T, HQ, D]`."""
    assert work.prefill_tiles is not None, "no tiles"
    _, num_heads, head_dim = q.shape
    group = num_heads // kv.num_kv_heads
    rows = max(16, triton.next_power_of_2(work.tile_queries * group))
    dim = max(16, triton.next_power_of_2(head_dim))
    unit, gain = score_units(scale, softcap)
    config = prefill_config(rows, dim, q.dtype)
    launch(
        prefill_attention_kernel,
        (kv.num_kv_heads, work.prefill_capacity),
        q,
        kv.keys[layer],
        kv.values[layer],
        block_tables,
        work.prefill_tiles,
        work.prefill_count,
        out,
        unit,
        gain,
        NO_WINDOW if window is None else window,
        block_tables.stride(0),
        NUM_KV_HEADS=kv.num_kv_heads,
        GROUP=group,
        QUERIES=work.tile_queries,
        ROWS=rows,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=kv.block_size,
        BN=config.block_n,
        SOFT_CAP=softcap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

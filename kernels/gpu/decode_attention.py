"""Attention of sequences with one new token over their pages: memory-bound, split over the keys.

Knows nothing of how the pages were filled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.attention_work import SPLIT_TOKENS
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

_MERGED_AT_ONCE = tl.constexpr(8)  # splits whose partial results are in flight together
_SPLIT_TOKENS = tl.constexpr(SPLIT_TOKENS)


@triton.jit(
    do_not_specialize=["window", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "context_lens"],
)
def decode_attention_kernel(
    q, keys, values, block_tables, context_lens, partial, stats, arrivals, out,
    unit, gain, window, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """`out[b, h] = softmax(scale * q[b, h] K^T) V` over the last `window` tokens of sequence b.

    Grid: (sequences, kv heads, splits). The GROUP query heads of a kv head are rows of one
    tensor-core tile, so keys are read once. Splits take equal runs of whole key blocks; a short
    context uses fewer. Each leaves its unnormalised sum, and the last to arrive merges all of them
    in split order, so the result does not depend on who was last. Accumulation in fp32. A sequence
    of context 0 (padding) gets zeros.
    Sources: FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et al. 2023) for the splits, and the
    last-arriver pattern of CUDA's threadFenceReduction sample.
    """
    seq, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    context = tl.load(context_lens + seq)
    first = tl.maximum(context - window, 0) // BN * BN
    length = tl.maximum(tl.cdiv(context - first, num_splits), _SPLIT_TOKENS)
    length = tl.cdiv(length, BN) * BN
    begin = first + split * length
    end = tl.minimum(begin + length, context)
    if (begin >= end) & (split > 0):
        return

    row = tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    used = (row < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    in_group = row[:, None] * HEAD_DIM + d[None, :]  # elements from the group's first
    group = (seq.to(tl.int64) * NUM_KV_HEADS + head) * GROUP
    queries = tl.load(q + group * HEAD_DIM + in_group, mask=used, other=0.0)

    table = block_tables + seq.to(tl.int64) * table_stride
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
        tokens = start + n
        visible = (tokens < end) & (tokens >= context - window)
        s = tl.where(visible[None, :], scores(queries, k, gain, SOFT_CAP), float("-inf"))
        m, total, acc = accumulate(s, v, unit, m, total, acc)
        # Carried, not loaded where it is used: so keys are requested stages ahead, not addresses.
        blocks = load_blocks(table, start + BN, end, n, BLOCK_SIZE)

    target = out + group * HEAD_DIM + in_group
    num_active = tl.cdiv(context - first, length)
    if num_active <= 1:
        acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(target, acc.to(out.dtype.element_ty), mask=used)
        return

    pair = seq * NUM_KV_HEADS + head
    mine = (pair.to(tl.int64) * num_splits + split) * GROUP
    tl.store(partial + mine * HEAD_DIM + in_group, acc, mask=used)
    tl.store(stats + (mine + row) * 2, m, mask=row < GROUP)
    tl.store(stats + (mine + row) * 2 + 1, total, mask=row < GROUP)
    tl.debug_barrier()  # every thread has stored before one of them announces it
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == num_active - 1:
        tl.store(arrivals + pair, 0)
        m = tl.full([ROWS], NOTHING_SEEN, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for at in range(0, num_active, _MERGED_AT_ONCE):
            for i in tl.static_range(_MERGED_AT_ONCE):
                there = row < tl.where(at + i < num_active, GROUP, 0)
                other = (pair.to(tl.int64) * num_splits + at + i) * GROUP
                other_m = tl.load(stats + (other + row) * 2, mask=there, other=NOTHING_SEEN)
                other_total = tl.load(stats + (other + row) * 2 + 1, mask=there, other=0.0)
                part = tl.load(
                    partial + other * HEAD_DIM + in_group, mask=used & there[:, None], other=0.0
                )
                new_m = tl.maximum(m, other_m)
                old, new = tl.exp2(m - new_m), tl.exp2(other_m - new_m)
                total = total * old + other_total * new
                acc = acc * old[:, None] + part * new[:, None]
                m = new_m
        acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(target, acc.to(out.dtype.element_ty), mask=used)


def decode_attention(
    q: Tensor,
    kv: PagedKVCache,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    num_splits: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Rows `0 .. B` of `out` `[T, HQ * D]` from q `[B, HQ, D]`; row i is sequence i.

    block_tables: `[S, max_blocks]` int32; context_lens: `[S]` int32, S >= B, 0 = padding.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = kv.num_kv_heads
    if num_splits > 1 and num_seqs * num_kv_heads > kv.split_arrivals.numel():
        raise ValueError(
            f"num_splits={num_splits} for {num_seqs} sequences of {num_kv_heads} kv heads: at most "
            f"{kv.split_arrivals.numel()} (sequence, head) pairs can be split; pass num_splits=1"
        )
    group = num_heads // num_kv_heads
    dim = max(16, triton.next_power_of_2(head_dim))
    unit, gain = score_units(scale, softcap)
    parts = (num_seqs, num_heads, num_splits) if num_splits > 1 else (1, 1, 1)
    launch(
        decode_attention_kernel,
        (num_seqs, num_kv_heads, num_splits),
        q,
        kv.keys[layer],
        kv.values[layer],
        block_tables,
        context_lens,
        torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device),
        torch.empty((*parts, 2), dtype=torch.float32, device=q.device),
        kv.split_arrivals,
        out,
        unit,
        gain,
        NO_WINDOW if window is None else window,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=kv.block_size,
        BN=block_tokens(dim, q.dtype),
        SOFT_CAP=softcap is not None,
        num_warps=4,
        num_stages=3,
    )


def block_tokens(dim: int, dtype: torch.dtype) -> int:
    """Keys per step: 16 KiB of them, and as much of values. With two such pairs in flight three
    programs fit the shared memory of a Hopper multiprocessor, twice what hides its latency.
    """
    return max(16, min(128, (16 << 10) // (dim * dtype.itemsize)))

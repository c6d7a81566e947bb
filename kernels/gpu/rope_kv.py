"""From the qkv projection to the cache in one launch: LoRA deltas, head norms, rope, KV write.

Knows the paged cache's layout and the work list; nothing of attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.common import (
    RANKS,
    dot,
    load_ranks,
    load_t_planes,
    load_t_rows,
    load_tile,
)
from loraplex.kernels.gpu.delta import find_page
from loraplex.kernels.gpu.expand import page_operands
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LARGE_ROWS, SMALL_ROWS, LoraWork, TileList
from loraplex.kernels.ops import Module, PageTables

SMALL_PAIRS = 256  # pairs of columns of a decode program: four heads of 128
LARGE_HEADS = 2  # heads of a prefill program, which finds T, cos and sin in cache for the second
_T_ENTRY = tl.constexpr(3 * 16)  # fp32 values of a T entry: q, k, v
_Q = tl.constexpr(int(Module.Q))


def rope_kv(
    qkv: Tensor,
    shrunk: Shrunk | None,
    tables: PageTables | None,
    work: LoraWork,
    layer: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    num_heads: int,
    kv: PagedKVCache,
    slots: Tensor,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`Ops.rope_kv_write`; qkv is left as it was.

    qkv: `[T, (num_heads + 2 * kv heads) * head_dim]`, contiguous, of the cache's dtype. shrunk: of
    (Q, K, V), None where no page of the step adapts them. slots: `[T]` int32 or int64, -1 = write
    nothing. batch_invariant: a row's result does not depend on how many rows share its tile.
    Returns q `[T, num_heads, head_dim]`; rows that no tile covers are not written.

    Raises: ValueError for tensors the kernel would misread.
    """
    num_rows, dim = qkv.shape[0], kv.head_dim
    _check(qkv, cos, sin, slots, num_heads, kv)
    q = torch.empty((num_rows, num_heads, dim), dtype=qkv.dtype, device=qkv.device)

    def start(tiles: TileList | None, t: Tensor | None, block_rows: int, block_heads: int) -> None:
        if tiles is None:
            return
        small = block_rows == SMALL_ROWS
        groups = triton.cdiv(num_heads, block_heads) + 2 * triton.cdiv(kv.num_kv_heads, block_heads)
        planes = 0 if t is None else t.shape[0]
        launch(
            _rope_kv_kernel,
            (groups, tiles.capacity),
            qkv, q, kv.keys[layer], kv.values[layer], slots, cos, sin, q_norm, k_norm,
            tiles.tiles, tiles.count, *page_operands(tables, work, t), layer, norm_eps,
            Q_HEADS=num_heads,
            KV_HEADS=kv.num_kv_heads,
            HALF=dim // 2,
            HALF_BLOCK=max(16, triton.next_power_of_2(dim // 2)),
            SLOTS=kv.block_size,
            PLANES=planes,
            PLANES_POW2=triton.next_power_of_2(max(1, planes)),
            ROWS=block_rows,
            HEADS=block_heads,
            MATRIX_ONLY=batch_invariant or not small,
            num_warps=4 if small else 8,
        )  # fmt: skip

    small_heads = power_of_2_within(min(kv.num_kv_heads, 2 * SMALL_PAIRS // dim))
    large_heads = power_of_2_within(min(kv.num_kv_heads, LARGE_HEADS))
    start(work.small, None if shrunk is None else shrunk.small, SMALL_ROWS, small_heads)
    start(work.large, None if shrunk is None else shrunk.large, LARGE_ROWS, large_heads)
    return q


def power_of_2_within(limit: int) -> int:
    """The largest power of two up to `limit`, at least 1."""
    return 1 << max(limit, 1).bit_length() - 1


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, num_heads: int, kv: PagedKVCache
) -> None:
    rows, dim = qkv.shape[0], kv.head_dim
    if dim % 2:
        raise ValueError(f"head_dim {dim} is odd: half-split rope turns pairs of columns")
    for name, tensor, shape in (
        ("qkv", qkv, (rows, (num_heads + 2 * kv.num_kv_heads) * dim)),
        ("cos", cos, (rows, dim)),
        ("sin", sin, (rows, dim)),
        ("slots", slots, (rows,)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} must be "
                f"{shape} and contiguous"
            )
    if qkv.dtype != kv.dtype:
        raise ValueError(f"qkv is {qkv.dtype}, the KV cache {kv.dtype}: both must be the model's")


@triton.jit(do_not_specialize=["layer"])
def _rope_kv_kernel(
    qkv, q_out, keys, values, slots, cos, sin, q_norm, k_norm,
    tiles, count,
    page_ids, page_weights, offset_b, live_ranks, scaling, arena, t, plane_stride, num_layers,
    layer, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, PLANES: tl.constexpr, PLANES_POW2: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, MATRIX_ONLY: tl.constexpr,
):  # fmt: skip
    """`x = qkv + sum over pages of scale (t B)`; q, k: `x = rope(norm(x))`; q out, k and v cached.

    Grid: (group of HEADS heads of q, then k, then v; tile), so that programs past `count` come
    last. A head's halves are two loads, so the rotation moves nothing between lanes. Sums, norms
    and rotation in fp32, one rounding at the end. One row multiplies on the vector units; more
    rows on the matrix units, t rounded to the model's type. PLANES 0: no page adapts q, k or v.
    Sources: RoPE (2104.09864), paged cache (2309.06180), multi-LoRA decode (Punica, 2310.18547).
    """
    index = tl.program_id(1)
    row0, rows, first_entry, entries, t_start = load_tile(tiles, index)
    # One condition, so that the tile and the count are asked for together.
    if (index >= tl.load(count)) | (rows == 0):
        return
    DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = (Q_HEADS + 2 * KV_HEADS) * DIM
    Q_GROUPS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    WHOLE: tl.constexpr = HALF == HALF_BLOCK and Q_HEADS % HEADS == 0 and KV_HEADS % HEADS == 0
    group = tl.program_id(0)
    part = (group >= Q_GROUPS).to(tl.int32) + (group >= Q_GROUPS + KV_GROUPS).to(tl.int32)
    part_group = tl.where(part == 0, 0, Q_GROUPS + (part - 1) * KV_GROUPS)
    part_head = tl.where(part == 0, 0, Q_HEADS + (part - 1) * KV_HEADS)  # among all heads
    part_heads = tl.where(part == 0, Q_HEADS, KV_HEADS)
    head0 = (group - part_group) * HEADS  # among the part's

    if (rows == 1) & (not MATRIX_ONLY):
        flat = tl.arange(0, HEADS * HALF_BLOCK)
        heads = head0 + flat // HALF_BLOCK
        pairs = flat % HALF_BLOCK
        columns = heads * DIM + pairs
        if WHOLE:
            mask = tl.full([HEADS * HALF_BLOCK], True, tl.int1)
        else:
            mask = (pairs < HALF) & (heads < part_heads)
        row = row0.to(tl.int64)
        source = qkv + row * WIDTH + part_head * DIM + columns
        a_base = tl.load(source, mask=mask, other=0.0)
        b_base = tl.load(source + HALF, mask=mask, other=0.0)
        a = tl.zeros([HEADS * HALF_BLOCK], dtype=tl.float32)
        b = tl.zeros([HEADS * HALF_BLOCK], dtype=tl.float32)
        if PLANES > 0:
            if entries > 0:
                offset, live, scale = find_page(
                    page_ids, page_weights, offset_b, live_ranks, scaling, num_layers,
                    first_entry, layer, _Q + part,
                )  # fmt: skip
                for i in range(entries):
                    # All that this page needs is asked for, and where the next one lies, before
                    # anything is waited for.
                    at = (t_start + i) * _T_ENTRY + part * RANKS
                    planes = load_t_planes(t, plane_stride, at, PLANES, PLANES_POW2)
                    width = part_heads * DIM
                    b_a = load_ranks(arena, offset, live, width, columns, mask)
                    b_b = load_ranks(arena, offset, live, width, columns + HALF, mask)
                    t_scale, used = scale, tl.arange(0, RANKS) < live
                    offset, live, scale = find_page(
                        page_ids, page_weights, offset_b, live_ranks, scaling, num_layers,
                        first_entry + tl.minimum(i + 1, entries - 1), layer, _Q + part,
                    )  # fmt: skip
                    # T of a module that the page does not adapt is not written: never use it.
                    t_row = tl.where(used, tl.sum(planes, 0), 0.0) * t_scale
                    a += tl.sum(b_a.to(tl.float32) * t_row[:, None], 0)
                    b += tl.sum(b_b.to(tl.float32) * t_row[:, None], 0)
        a += a_base.to(tl.float32)
        b += b_base.to(tl.float32)
        if part == 0:
            if q_norm is not None:
                a, b = _norm_row(a, b, q_norm, pairs, mask, eps, HALF, HALF_BLOCK, HEADS)
        elif part == 1:
            if k_norm is not None:
                a, b = _norm_row(a, b, k_norm, pairs, mask, eps, HALF, HALF_BLOCK, HEADS)
        if part < 2:
            a, b = _rotate(a, b, cos, sin, row * DIM + pairs, mask)
        if part == 0:
            _store(q_out + row * (Q_HEADS * DIM) + columns, a, b, mask, HALF)
        else:
            slot = tl.load(slots + row).to(tl.int64)
            if slot >= 0:
                target = _cache_row(slot, KV_HEADS, SLOTS, DIM) + heads * (SLOTS * DIM) + pairs
                if part == 1:
                    _store(keys + target, a, b, mask, HALF)
                else:
                    _store(values + target, a, b, mask, HALF)
    else:
        index_in_tile = tl.arange(0, ROWS)
        real = index_in_tile < rows
        row_at = (row0 + index_in_tile).to(tl.int64)[:, None]
        slot_at = tl.load(slots + row0 + index_in_tile, mask=real, other=-1).to(tl.int64)
        cache_at = _cache_row(slot_at, KV_HEADS, SLOTS, DIM)[:, None]
        pair = tl.arange(0, HALF_BLOCK)
        fits = pair < HALF
        inside = real[:, None] & fits[None, :]
        for head in range(head0, tl.minimum(head0 + HEADS, part_heads)):
            column = head * DIM + pair
            source_at = qkv + row_at * WIDTH + part_head * DIM + column[None, :]
            c_base = tl.load(source_at, mask=inside, other=0.0)
            d_base = tl.load(source_at + HALF, mask=inside, other=0.0)
            c = tl.zeros([ROWS, HALF_BLOCK], dtype=tl.float32)
            d = tl.zeros([ROWS, HALF_BLOCK], dtype=tl.float32)
            if PLANES > 0:
                for j in range(entries):
                    b_at, ranks, factor = find_page(
                        page_ids, page_weights, offset_b, live_ranks, scaling, num_layers,
                        first_entry + j, layer, _Q + part,
                    )  # fmt: skip
                    if b_at >= 0:
                        part_width = part_heads * DIM
                        b_c = load_ranks(arena, b_at, ranks, part_width, column, fits)
                        b_d = load_ranks(arena, b_at, ranks, part_width, column + HALF, fits)
                        t_at = (t_start + index_in_tile * entries + j) * _T_ENTRY + part * RANKS
                        t_rows = load_t_rows(t, plane_stride, t_at, real, PLANES) * factor
                        c = dot(t_rows.to(b_c.dtype), b_c, c)
                        d = dot(t_rows.to(b_d.dtype), b_d, d)
            c += c_base.to(tl.float32)
            d += d_base.to(tl.float32)
            if part == 0:
                if q_norm is not None:
                    c, d = _norm_rows(c, d, q_norm, pair, fits, eps, HALF)
            elif part == 1:
                if k_norm is not None:
                    c, d = _norm_rows(c, d, k_norm, pair, fits, eps, HALF)
            if part < 2:
                c, d = _rotate(c, d, cos, sin, row_at * DIM + pair[None, :], inside)
            if part == 0:
                _store(q_out + row_at * (Q_HEADS * DIM) + column[None, :], c, d, inside, HALF)
            else:
                target_at = cache_at + head * (SLOTS * DIM) + pair[None, :]
                cached = inside & (slot_at >= 0)[:, None]
                if part == 1:
                    _store(keys + target_at, c, d, cached, HALF)
                else:
                    _store(values + target_at, c, d, cached, HALF)


@triton.jit
def _cache_row(slot, KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr):
    """Where the first head of a slot starts in `[blocks, kv heads, slots, dim]`. int64."""
    return (slot // SLOTS) * (KV_HEADS * SLOTS * DIM) + (slot % SLOTS) * DIM


@triton.jit
def _rotate(a, b, cos, sin, at, mask):
    c = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def _store(target, a, b, mask, HALF: tl.constexpr):
    tl.store(target, a.to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, b.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rows(a, b, weight, pair, fits, eps, HALF: tl.constexpr):
    """RMSNorm over each row's head. a, b: `[rows, pairs]`, zero where no pair is."""
    scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)
    w_a = tl.load(weight + pair, mask=fits, other=0.0).to(tl.float32)
    w_b = tl.load(weight + HALF + pair, mask=fits, other=0.0).to(tl.float32)
    return a * scale[:, None] * w_a[None, :], b * scale[:, None] * w_b[None, :]


@triton.jit
def _norm_row(
    a, b, weight, pair, mask, eps,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The same for several heads of one row, laid out one after another: `[heads * pairs]`."""
    squares = tl.reshape(a * a + b * b, [HEADS, HALF_BLOCK])
    scale = tl.rsqrt(tl.sum(squares, 1) / (2 * HALF) + eps)
    scale = tl.broadcast_to(scale[:, None], [HEADS, HALF_BLOCK])
    scale = tl.reshape(scale, [HEADS * HALF_BLOCK])
    w_a = tl.load(weight + pair, mask=mask, other=0.0).to(tl.float32)
    w_b = tl.load(weight + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    return a * scale * w_a, b * scale * w_b

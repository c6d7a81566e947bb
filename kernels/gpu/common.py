"""What several kernels share: reading a tile of the work list, T rows, and our `tl.dot`."""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex.kernels.gpu.launch import is_interpreted

RANKS = tl.constexpr(16)  # ranks per page, kernels.ops.PAGE_RANKS
TILE_FIELDS = tl.constexpr(8)  # int32 fields of a work-list tile, kernels.gpu.work.TILE_FIELDS
# The interpreter multiplies the raw 16-bit payloads of bfloat16 operands (Triton 3.6 and 3.7).
_UPCAST = tl.constexpr(is_interpreted())


@triton.jit
def load_tile(tiles, index):
    """(first row, rows, first page entry, page entries, first T entry) of a tile."""
    tile = tiles + index * TILE_FIELDS
    return (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
    )


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in fp32; fp32 operands are not rounded to tf32."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_ranks(arena, offset, live, width, columns, mask):
    """Some columns of a page's A or B tile, `[16, columns]`.

    Rows from `live` on are zeros and not read: rank 8 moves 8 rows. Nothing is read at offset -1.
    """
    ranks = tl.arange(0, RANKS)
    used = ranks < tl.where(offset < 0, 0, live)
    # tl.maximum, not tl.where: Triton 3.6 crashes on a multiple_of a where for sm_90.
    tile = arena + tl.multiple_of(tl.maximum(offset, 0), 16)
    return tl.load(
        tile + ranks[:, None] * width + columns[None, :],
        mask=used[:, None] & mask[None, :],
        other=0.0,
    )


@triton.jit
def load_t_planes(t, plane_stride, at, PLANES: tl.constexpr, PLANES_POW2: tl.constexpr):
    """The 16 shrink results at element `at` of every plane, `[PLANES_POW2, 16]` fp32.

    To be summed over axis 0 where they are needed, so that other loads can be asked for before.
    """
    plane = tl.arange(0, PLANES_POW2)
    return tl.load(
        t + plane[:, None] * plane_stride + at + tl.arange(0, RANKS)[None, :],
        mask=(plane < PLANES)[:, None],
        other=0.0,
    )


@triton.jit
def load_t_row(t, plane_stride, at, PLANES: tl.constexpr, PLANES_POW2: tl.constexpr):
    """The 16 shrink results at element `at`, planes summed in order. `[16]` fp32."""
    return tl.sum(load_t_planes(t, plane_stride, at, PLANES, PLANES_POW2), 0)


@triton.jit
def load_t_rows(t, plane_stride, at, mask, PLANES: tl.constexpr):
    """The same for several rows. at, mask: `[ROWS]` -> `[ROWS, 16]` fp32."""
    where = t + at[:, None] + tl.arange(0, RANKS)[None, :]
    total = tl.load(where, mask=mask[:, None], other=0.0)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(where + plane * plane_stride, mask=mask[:, None], other=0.0)
    return total

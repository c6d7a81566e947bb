"""The expand half of LoRA, `t B`, in pieces that fused kernels add to what they do anyway.

Knows where a page's B tile lies and how to multiply it; nothing of what becomes of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex.kernels.gpu.common import dot, load_ranks
from loraplex.kernels.ops import NUM_MODULES

_MODULES = tl.constexpr(NUM_MODULES)


@triton.jit
def find_page(
    page_ids, page_weights, offset_b, live_ranks, scaling, num_layers, entry, layer, module
):  # fmt: skip
    """(first element of B's tile or -1, live ranks, scale) of a page entry for a module."""
    page = tl.load(page_ids + entry).to(tl.int64)
    at = (page * num_layers + layer) * _MODULES + module
    scale = tl.load(scaling + at) * tl.load(page_weights + entry)
    return tl.load(offset_b + at), tl.load(live_ranks + at), scale


@triton.jit
def row_times_page(t_row, arena, offset, live, width, columns, mask):
    """`t_row B[:, columns]` on the vector units: `[16] fp32 -> [columns] fp32`. width: B's."""
    tile = load_ranks(arena, offset, live, width, columns, mask)
    return tl.sum(tile.to(tl.float32) * t_row[:, None], 0)


@triton.jit
def rows_times_page(acc, t_rows, arena, offset, live, width, columns, mask):
    """`acc + t_rows B[:, columns]` on the matrix units. t_rows: `[rows, 16]`, rounded to B's
    type.
    """
    tile = load_ranks(arena, offset, live, width, columns, mask)
    return dot(t_rows.to(tile.dtype), tile, acc)

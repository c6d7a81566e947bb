"""Where an expand finds a page's B tile. Knows the page tables, nothing of what is multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

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

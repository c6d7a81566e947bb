"""The end of a block in one launch: LoRA delta, residual sum, and the RMSNorm the next block reads.

Decode: the programs of a tile each add some columns; the last to arrive finds the whole rows in
cache and norms them, so no second launch waits for the first. Prefill moves far more than a launch
costs: there the norm is a kernel of its own.
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
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.norm import check_norm, norm_row, norm_warps, rms_norm
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LARGE_ROWS, SMALL_ROWS, LoraWork, TileList
from loraplex.kernels.ops import Module, PageTables


def add_rms_norm(
    y: Tensor,
    shrunk: Shrunk | None,
    tables: PageTables | None,
    work: LoraWork,
    layer: int,
    module: Module,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    arrivals: Tensor,
    *,
    one_launch: bool = True,
    batch_invariant: bool = False,
) -> Tensor:
    """`residual += y + delta` in place, rounded once, and the RMSNorm of it, new.

    y, residual: `[T, H]`, contiguous, alike. shrunk: of (module,), None where no page of the step
    adapts it. arrivals: int32, zero, one per tile of `work.norm`; zero again when the kernel ends,
    so all launches of a stream may share it. one_launch: False norms in a second launch, always so
    with prefill rows. batch_invariant: a row's result does not depend on how many share its tile.

    Raises: ValueError for tensors the kernels would misread.
    """
    check_norm(residual, weight)
    if y.shape != residual.shape or y.dtype != residual.dtype or not y.is_contiguous():
        raise ValueError(
            f"y is {y.dtype} {tuple(y.shape)} with strides {y.stride()}: must be like the "
            f"residual, {residual.dtype} {tuple(residual.shape)}, contiguous"
        )
    norm_tiles = work.norm if one_launch and work.large is None else None
    fused = norm_tiles is not None
    if norm_tiles is not None and norm_tiles.capacity > arrivals.numel():
        raise ValueError(
            f"{norm_tiles.capacity} tiles need as many arrival counters, not {arrivals.numel()}"
        )
    out = torch.empty_like(residual) if fused else residual
    width = residual.shape[1]

    def start(tiles: TileList | None, t: Tensor | None, tile_rows: int) -> None:
        if tiles is None:
            return
        small = tile_rows == SMALL_ROWS
        columns = min(512 if small else 128, max(16, triton.next_power_of_2(width)))
        planes = 0 if t is None else t.shape[0]
        launch(
            _add_norm_kernel,
            (triton.cdiv(width, columns), tiles.capacity),
            y, residual, weight, out, arrivals,
            tiles.tiles, tiles.count, *page_operands(tables, work, t), layer, int(module), eps,
            WIDTH=width,
            WIDTH_POW2=triton.next_power_of_2(width),
            PLANES=planes,
            PLANES_POW2=triton.next_power_of_2(max(1, planes)),
            COLUMNS=columns,
            DOT_COLUMNS=min(columns, 128),
            ROWS=tile_rows,
            MATRIX_ONLY=batch_invariant or not small,
            NORM=fused,
            num_warps=norm_warps(width) if fused else (4 if small else 8),
        )  # fmt: skip

    t_small = None if shrunk is None else shrunk.small
    t_large = None if shrunk is None else shrunk.large
    if fused:
        start(norm_tiles, t_small, SMALL_ROWS)
        return out
    start(work.small, t_small, SMALL_ROWS)
    start(work.large, t_large, LARGE_ROWS)
    return rms_norm(residual, weight, eps)


@triton.jit(do_not_specialize=["layer", "module"])
def _add_norm_kernel(
    y, residual, weight, out, arrivals,
    tiles, count,
    page_ids, page_weights, offset_b, live_ranks, scaling, arena, t, plane_stride, num_layers,
    layer, module, eps,
    WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr, PLANES: tl.constexpr, PLANES_POW2: tl.constexpr,
    COLUMNS: tl.constexpr, DOT_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    MATRIX_ONLY: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """`residual += y + sum over pages of scale (t B)`; NORM: `out = rms_norm(residual) * weight`.

    Grid: (columns, tile), so that programs past `count` come last. fp32, the sum rounded once and
    normed as rounded. One row multiplies on the vector units; more rows on the matrix units, t
    rounded to the model's type. PLANES 0: no page adapts the module. The tile's last program to
    arrive norms its rows: every program's stores are ordered before its count (barrier, then
    release), the rows are read past the L1 cache, and the counter is left at zero.
    Source of the pattern: CUDA's threadFenceReduction sample.
    """
    index = tl.program_id(1)
    first_row, rows, first_entry, entries, t_start = load_tile(tiles, index)
    # One condition, so that the tile and the count are asked for together.
    if (index >= tl.load(count)) | (rows == 0):
        return
    first_column = tl.program_id(0) * COLUMNS
    if (rows == 1) & (not MATRIX_ONLY):
        columns = first_column + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        at = first_row.to(tl.int64) * WIDTH + columns
        added = tl.load(y + at, mask=inside, other=0.0)
        base = tl.load(residual + at, mask=inside, other=0.0)
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        if PLANES > 0:
            if entries > 0:
                offset, live, scale = find_page(
                    page_ids, page_weights, offset_b, live_ranks, scaling, num_layers,
                    first_entry, layer, module,
                )  # fmt: skip
                for i in range(entries):
                    # All that this page needs is asked for, and where the next one lies, before
                    # anything is waited for.
                    t_at = (t_start + i) * RANKS
                    planes = load_t_planes(t, plane_stride, t_at, PLANES, PLANES_POW2)
                    b = load_ranks(arena, offset, live, WIDTH, columns, inside)
                    t_scale, used = scale, tl.arange(0, RANKS) < live
                    offset, live, scale = find_page(
                        page_ids, page_weights, offset_b, live_ranks, scaling, num_layers,
                        first_entry + tl.minimum(i + 1, entries - 1), layer, module,
                    )  # fmt: skip
                    # T of a module that the page does not adapt is not written: never use it.
                    t_row = tl.where(used, tl.sum(planes, 0), 0.0) * t_scale
                    total += tl.sum(b.to(tl.float32) * t_row[:, None], 0)
        total += added.to(tl.float32) + base.to(tl.float32)
        tl.store(residual + at, total.to(residual.dtype.element_ty), mask=inside)
    else:
        row = tl.arange(0, ROWS)
        real = row < rows
        row_at = (first_row + row).to(tl.int64)[:, None] * WIDTH
        for step in range(0, COLUMNS, DOT_COLUMNS):
            some = first_column + step + tl.arange(0, DOT_COLUMNS)
            fits = some < WIDTH
            mask = real[:, None] & fits[None, :]
            acc = tl.load(y + row_at + some[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += tl.load(residual + row_at + some[None, :], mask=mask, other=0.0).to(tl.float32)
            if PLANES > 0:
                for j in range(entries):
                    b_at, ranks, factor = find_page(
                        page_ids, page_weights, offset_b, live_ranks, scaling, num_layers,
                        first_entry + j, layer, module,
                    )  # fmt: skip
                    if b_at >= 0:
                        b_tile = load_ranks(arena, b_at, ranks, WIDTH, some, fits)
                        t_rows_at = (t_start + row * entries + j) * RANKS
                        t_rows = load_t_rows(t, plane_stride, t_rows_at, real, PLANES) * factor
                        acc = dot(t_rows.to(b_tile.dtype), b_tile, acc)
            tl.store(
                residual + row_at + some[None, :], acc.to(residual.dtype.element_ty), mask=mask
            )
    if NORM:
        tl.debug_barrier()
        before = tl.atomic_add(arrivals + index, 1, sem="acq_rel", scope="gpu")
        if before == tl.num_programs(0) - 1:
            column = tl.arange(0, WIDTH_POW2)
            whole = column < WIDTH
            gain = tl.load(weight + column, mask=whole, other=0.0)
            source = residual + first_row.to(tl.int64) * WIDTH + column
            target = out + first_row.to(tl.int64) * WIDTH + column
            following = tl.load(source, mask=whole, other=0.0, cache_modifier=".cg")
            for i in range(rows):
                this = following.to(tl.float32)
                # The next row is on its way while this one is summed; the last is read twice.
                ahead = tl.minimum(i + 1, rows - 1) * WIDTH
                following = tl.load(source + ahead, mask=whole, other=0.0, cache_modifier=".cg")
                normed = norm_row(this, gain, eps, WIDTH)
                tl.store(target + i * WIDTH, normed.to(out.dtype.element_ty), mask=whole)
            tl.store(arrivals + index, 0)

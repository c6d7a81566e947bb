"""The expand half of LoRA on its own: `y += scale * t B` in place, for one module.

The fused kernels fold it into what they do anyway; this one serves what nobody fused (other models'
layers, lm_head) and comparisons.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.common import RANKS, dot, load_ranks, load_t_row, load_t_rows, load_tile
from loraplex.kernels.gpu.delta import find_page
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LARGE_ROWS, SMALL_ROWS, LoraWork, TileList
from loraplex.kernels.ops import PAGE_RANKS, Module, PageTables


def expand(
    y: Tensor,
    shrunk: Shrunk,
    tables: PageTables,
    work: LoraWork,
    layer: int,
    module: Module,
    *,
    first_module: Module | None = None,
    batch_invariant: bool = False,
) -> None:
    """`y += sum over pages of weight * scaling * t B`, rounded once; rows without pages stay.

    y: `[T, N]`, contiguous, of the arena's dtype. shrunk: of a group of modules that starts with
    first_module (by default `module` alone) and has `module` in it.

    Raises ValueError for tensors the kernels would misread.
    """
    if y.dim() != 2 or not y.is_contiguous():
        raise ValueError(
            f"y of shape {tuple(y.shape)} and strides {y.stride()} must be [T, N] and contiguous; "
            "expand into a contiguous tensor and copy it back"
        )
    if y.dtype != tables.arena.dtype:
        raise ValueError(
            f"y is {y.dtype} but the adapter arena {tables.arena.dtype}; make both the model's"
        )
    place = 0 if first_module is None else module - first_module
    if not 0 <= place < shrunk.num_modules:
        raise ValueError(
            f"module {module!r} is place {place} of a shrink of {shrunk.num_modules} modules; give "
            "the first module of the group that was shrunk"
        )
    width = y.shape[1]

    def start(tiles: TileList | None, t: Tensor | None, tile_rows: int) -> None:
        if tiles is None or t is None:
            return
        small = tile_rows == SMALL_ROWS
        columns = min(512 if small else 128, max(16, triton.next_power_of_2(width)))
        launch(
            _expand_kernel,
            (triton.cdiv(width, columns), tiles.capacity),
            y,
            tiles.tiles,
            tiles.count,
            *page_operands(tables, work, t),
            layer,
            int(module),
            place * PAGE_RANKS,
            WIDTH=width,
            MODULES=shrunk.num_modules,
            PLANES=t.shape[0],
            PLANES_POW2=triton.next_power_of_2(t.shape[0]),
            COLUMNS=columns,
            DOT_COLUMNS=min(columns, 128),
            ROWS=tile_rows,
            MATRIX_ONLY=batch_invariant or not small,
            num_warps=4 if small else 8,
            num_stages=1,
        )

    start(work.small, shrunk.small, SMALL_ROWS)
    start(work.large, shrunk.large, LARGE_ROWS)


def page_operands(tables: PageTables | None, work: LoraWork, t: Tensor | None) -> tuple[Any, ...]:
    """What every expand takes, in its order: page_ids, page_weights, offset_b, live_ranks, scaling,
    arena, t, plane_stride, num_layers. None throughout when there is nothing to add.
    """
    if tables is None or t is None:
        return (None, None, None, None, None, None, None, 0, 0)
    return (
        work.page_ids,
        work.page_weights,
        tables.offset_b,
        tables.live_ranks,
        tables.scaling,
        tables.arena,
        t,
        t.stride(0),
        tables.offset_b.shape[1],
    )


@triton.jit(do_not_specialize=["layer", "module", "t_column"])
def _expand_kernel(
    y,
    tiles,
    count,
    page_ids,
    page_weights,
    offset_b,
    live_ranks,
    scaling,
    arena,
    t,
    plane_stride,
    num_layers,
    layer,
    module,
    t_column,
    WIDTH: tl.constexpr,
    MODULES: tl.constexpr,
    PLANES: tl.constexpr,
    PLANES_POW2: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    MATRIX_ONLY: tl.constexpr,
):
    """`y[row] += sum over pages of scale * t[row, page] B[page]`, fp32, one rounding.

    Grid: (columns, tile), so that programs past `count` come last. One row is a sum over 16 rows of
    B on the vector units; more rows are `[ROWS, 16] x [16, DOT_COLUMNS]` on the matrix units, t
    rounded to the model's type.
    """
    index = tl.program_id(1)
    first_row, rows, first_page, pages, t_start = load_tile(tiles, index)
    # One condition, so that the tile and the count are asked for together.
    if (index >= tl.load(count)) | (pages == 0):
        return
    first_column = tl.program_id(0) * COLUMNS
    if (rows == 1) & (not MATRIX_ONLY):
        columns = first_column + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        target = y + first_row.to(tl.int64) * WIDTH + columns
        base = tl.load(target, mask=inside, other=0.0)
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        for page in range(pages):
            offset, live, scale = find_page(
                page_ids,
                page_weights,
                offset_b,
                live_ranks,
                scaling,
                num_layers,
                first_page + page,
                layer,
                module,
            )
            if offset >= 0:
                b = load_ranks(arena, offset, live, WIDTH, columns, inside)
                at = (t_start + page) * (MODULES * RANKS) + t_column
                t_row = load_t_row(t, plane_stride, at, PLANES, PLANES_POW2) * scale
                total += tl.sum(b.to(tl.float32) * t_row[:, None], 0)
        total += base.to(tl.float32)
        tl.store(target, total.to(y.dtype.element_ty), mask=inside)
    else:
        row = tl.arange(0, ROWS)
        real = row < rows
        y_rows = y + (first_row + row).to(tl.int64)[:, None] * WIDTH
        for step in range(0, COLUMNS, DOT_COLUMNS):
            columns = first_column + step + tl.arange(0, DOT_COLUMNS)
            inside = columns < WIDTH
            mask = real[:, None] & inside[None, :]
            target = y_rows + columns[None, :]
            base = tl.load(target, mask=mask, other=0.0)
            total = tl.zeros([ROWS, DOT_COLUMNS], dtype=tl.float32)
            for page in range(pages):
                offset, live, scale = find_page(
                    page_ids,
                    page_weights,
                    offset_b,
                    live_ranks,
                    scaling,
                    num_layers,
                    first_page + page,
                    layer,
                    module,
                )
                if offset >= 0:
                    b = load_ranks(arena, offset, live, WIDTH, columns, inside)
                    at = (t_start + row * pages + page) * (MODULES * RANKS) + t_column
                    t_rows = load_t_rows(t, plane_stride, at, real, PLANES) * scale
                    total = dot(t_rows.to(b.dtype), b, total)
            total += base.to(tl.float32)
            tl.store(target, total.to(y.dtype.element_ty), mask=mask)

"""The shrink half of LoRA, `t = x A^T`, for every row, page and module of a fused group.

One launch per family of the work list and group of modules (q, k, v of a layer, say). The result is
raw: scaling and composition weights are the expand's. Sources: LoRA (2106.09685), Punica's SGMV and
BGMV (2310.18547), S-LoRA (2311.03285); pages of 16 ranks and planes instead of atomics are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.common import RANKS, dot, load_tile
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.work import LARGE_ROWS, SMALL_ROWS, LoraWork, TileList
from loraplex.kernels.ops import NUM_MODULES, PAGE_RANKS, Module, PageTables

_MODULES = tl.constexpr(NUM_MODULES)
LARGE_BLOCK_K = 64
_GATHERED = 4  # (page, module) blocks side by side in the large form: 64 columns


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """T of both families: `[planes, entries, num_modules * 16]` fp32, None without such tiles.

    The result of an entry is the sum of its planes. Entries of a module that the page does not
    adapt may hold anything.
    """

    small: Tensor | None
    large: Tensor | None
    num_modules: int


def shrink(
    x: Tensor,
    tables: PageTables,
    work: LoraWork,
    layer: int,
    modules: tuple[Module, ...],
    *,
    batch_invariant: bool = False,
) -> Shrunk:
    """`x A^T` for all rows that have pages.

    x: `[T, K]`, contiguous, of the arena's dtype. modules: neighbours in `Module`, all of input
    width K. batch_invariant: a row's result does not depend on how many rows share its tile.

    Raises ValueError for tensors the kernels would misread.
    """
    _check(x, tables, work, modules, batch_invariant)
    width, count = x.shape[1], len(modules)

    def room(planes: int, entries: int) -> Tensor:
        shape = (planes, entries, count * PAGE_RANKS)
        if math.prod(shape) >= 1 << 31:
            raise ValueError(
                f"{entries} (row, page) pairs need {math.prod(shape)} values of T, more than the "
                "kernels can address (2**31); take fewer tokens per step or fewer adapters per row"
            )
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    small = large = None
    if work.small is not None:
        chunk = small_chunk(width)
        small = room(triton.cdiv(width, chunk), work.small_entries)
        launch(
            _shrink_small_kernel,
            (small.shape[0], count, work.small.capacity),
            *_arguments(x, tables, work, work.small, small, layer, modules),
            WIDTH=width,
            CHUNK=chunk,
            SPAN=min(chunk, 256),
            BLOCK_K=min(chunk, 128),
            ROWS=SMALL_ROWS,
            MATRIX_ONLY=batch_invariant,
            num_warps=4,
            num_stages=3,
        )
    if work.large is not None:
        chunk = large_chunk(width)
        large = room(triton.cdiv(width, chunk), work.large_entries)
        launch(
            _shrink_large_kernel,
            (large.shape[0], work.large.capacity),
            *_arguments(x, tables, work, work.large, large, layer, modules),
            WIDTH=width,
            CHUNK=chunk,
            BLOCK_K=LARGE_BLOCK_K,
            ROWS=LARGE_ROWS,
            MODULES=count,
            GATHERED=_GATHERED,
            num_warps=4,
            num_stages=4,
        )
    return Shrunk(small, large, count)


def small_chunk(width: int) -> int:
    """Columns of x per program: 16 or 32 KB of weights, asked for at once.

    Longer chunks for wide inputs, because every program of the expand sums all planes.
    """
    whole: int = triton.next_power_of_2(max(16, width))
    return min(512 if width < 4096 else 1024, whole)


def large_chunk(width: int) -> int:
    """The same for prefill, where a few thousand rows are only some 32 tiles for 132 SMs.

    Four planes fill the machine from 2048 tokens on; eight for widths whose walk is long.
    """
    planes = 4 if width <= 8192 else 8
    blocks = triton.cdiv(width, LARGE_BLOCK_K)
    chunk: int = LARGE_BLOCK_K * min(blocks, max(8, triton.cdiv(blocks, planes)))
    return chunk


def _arguments(
    x: Tensor,
    tables: PageTables,
    work: LoraWork,
    tiles: TileList,
    t: Tensor,
    layer: int,
    modules: tuple[Module, ...],
) -> tuple[object, ...]:
    return (
        x,
        tables.arena,
        tables.offset_a,
        tables.live_ranks,
        work.page_ids,
        tiles.tiles,
        tiles.count,
        t,
        t.stride(0),
        tables.offset_a.shape[1],
        layer,
        int(modules[0]),
    )


def _check(
    x: Tensor,
    tables: PageTables,
    work: LoraWork,
    modules: tuple[Module, ...],
    batch_invariant: bool,
) -> None:
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and strides {x.stride()} must be [T, K] and contiguous; "
            "call x.contiguous()"
        )
    if x.dtype != tables.arena.dtype:
        raise ValueError(
            f"x is {x.dtype} but the adapter arena {tables.arena.dtype}; make both the model's"
        )
    if modules != tuple(range(modules[0], modules[0] + len(modules))):
        raise ValueError(f"modules {modules} must be neighbours in Module; shrink them one by one")
    if batch_invariant and work.large is not None:
        raise ValueError(
            "a batch-invariant shrink takes small tiles only; plan the rows with small_only=True"
        )


@triton.jit
def _find_a(page_ids, offset_a, live_ranks, num_layers, entry, layer, module):
    """(first element of A's tile or -1, live ranks) of a page entry for a module."""
    page = tl.load(page_ids + entry).to(tl.int64)
    at = (page * num_layers + layer) * _MODULES + module
    return tl.load(offset_a + at), tl.load(live_ranks + at)


@triton.jit(do_not_specialize=["layer", "first_module"])
def _shrink_small_kernel(
    x,
    arena,
    offset_a,
    live_ranks,
    page_ids,
    tiles,
    count,
    t,
    plane_stride,
    num_layers,
    layer,
    first_module,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    MATRIX_ONLY: tl.constexpr,
):
    """`t[plane, entry, module] = x[row, chunk] A[page, module][:, chunk]^T`, fp32.

    Grid: (chunk of the input = plane, module, tile), so that programs past `count` come last. A
    tile of one row is 16 dot products on the vector units; one of 2..16 rows uses the matrix units.
    Each program reads its weights once, for all rows of the tile.
    """
    plane = tl.program_id(0)
    module = tl.program_id(1)
    index = tl.program_id(2)
    num_modules = tl.num_programs(1)
    first_row, rows, first_page, pages, t_start = load_tile(tiles, index)
    # One condition, so that the tile and the count are asked for together.
    if (index >= tl.load(count)) | (pages == 0):
        return
    ranks = tl.arange(0, RANKS)
    out = t + plane * plane_stride + (t_start * num_modules + module) * RANKS
    if (rows == 1) & (not MATRIX_ONLY):
        # Chunks are summed part on part in registers and across lanes only once.
        part = tl.arange(0, CHUNK // SPAN)[:, None, None]
        k = plane * CHUNK + part * SPAN + tl.arange(0, SPAN)[None, None, :]
        inside = k < WIDTH
        x_row = tl.load(x + first_row.to(tl.int64) * WIDTH + k, mask=inside, other=0.0)
        x_row = x_row.to(tl.float32)
        for page in range(pages):
            offset, live = _find_a(
                page_ids,
                offset_a,
                live_ranks,
                num_layers,
                first_page + page,
                layer,
                first_module + module,
            )
            if offset >= 0:
                a = arena + tl.multiple_of(tl.maximum(offset, 0), 16)
                tile = tl.load(
                    a + ranks[None, :, None] * WIDTH + k,
                    mask=(ranks < live)[None, :, None] & inside,
                    other=0.0,
                )
                result = tl.sum(tl.sum(tile.to(tl.float32) * x_row, 0), 1)
                tl.store(out + page * num_modules * RANKS + ranks, result)
    else:
        row = tl.arange(0, ROWS)
        x_rows = x + (first_row + row).to(tl.int64)[:, None] * WIDTH
        out_rows = out + (row * pages * num_modules * RANKS)[:, None] + ranks[None, :]
        for page in range(pages):
            offset, _ = _find_a(
                page_ids,
                offset_a,
                live_ranks,
                num_layers,
                first_page + page,
                layer,
                first_module + module,
            )
            if offset >= 0:
                a = arena + tl.multiple_of(tl.maximum(offset, 0), 16) + ranks[None, :] * WIDTH
                acc = tl.zeros([ROWS, RANKS], dtype=tl.float32)
                for at in range(0, CHUNK, BLOCK_K):
                    k = plane * CHUNK + at + tl.arange(0, BLOCK_K)
                    inside = k < WIDTH
                    x_tile = tl.load(
                        x_rows + k[None, :],
                        mask=(row < rows)[:, None] & inside[None, :],
                        other=0.0,
                    )
                    a_tile = tl.load(a + k[:, None], mask=inside[:, None], other=0.0)
                    acc = dot(x_tile, a_tile, acc)
                tl.store(
                    out_rows + page * num_modules * RANKS,
                    acc,
                    mask=(row < rows)[:, None],
                )


@triton.jit(do_not_specialize=["layer", "first_module"])
def _shrink_large_kernel(
    x,
    arena,
    offset_a,
    live_ranks,
    page_ids,
    tiles,
    count,
    t,
    plane_stride,
    num_layers,
    layer,
    first_module,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    MODULES: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """The same for tiles of up to 64 rows: `[64, K] x [K, 64]` on the matrix units, fp32.

    Grid: (chunk of the input = plane, tile). The 64 columns are the rows of GATHERED A tiles, drawn
    from the tile's list of (page, module) wherever they lie: q, k and v of rank 16, or one module
    of rank 64, read x once.
    """
    plane = tl.program_id(0)
    index = tl.program_id(1)
    first_row, rows, first_page, pages, t_start = load_tile(tiles, index)
    if (index >= tl.load(count)) | (pages == 0):
        return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, GATHERED * RANKS)
    x_rows = x + (first_row + row).to(tl.int64)[:, None] * WIDTH
    blocks = pages * MODULES
    out = t + plane * plane_stride + t_start * MODULES * RANKS
    out_rows = out + (row * blocks * RANKS)[:, None]
    for first in range(0, blocks, GATHERED):
        block = first + column // RANKS
        listed = block < blocks
        page = tl.load(page_ids + first_page + block // MODULES, mask=listed, other=0)
        at = (page.to(tl.int64) * num_layers + layer) * _MODULES + first_module + block % MODULES
        offset = tl.load(offset_a + at, mask=listed, other=-1)
        adapted = offset >= 0
        # tl.maximum, not tl.where: Triton 3.6 crashes on a multiple_of a where for sm_90.
        a = arena + tl.multiple_of(tl.maximum(offset, 0), 16) + (column % RANKS) * WIDTH
        acc = tl.zeros([ROWS, GATHERED * RANKS], dtype=tl.float32)
        for step in range(0, CHUNK, BLOCK_K):
            k = plane * CHUNK + step + tl.arange(0, BLOCK_K)
            inside = k < WIDTH
            x_tile = tl.load(
                x_rows + k[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
            )
            a_tile = tl.load(
                a[None, :] + k[:, None], mask=adapted[None, :] & inside[:, None], other=0.0
            )
            acc = dot(x_tile, a_tile, acc)
        tl.store(
            out_rows + (column + first * RANKS)[None, :],
            acc,
            mask=(row < rows)[:, None] & listed[None, :],
        )

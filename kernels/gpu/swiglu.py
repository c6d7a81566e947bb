"""The gated activation with the LoRA deltas of both its inputs: one pass over gate and up.

The expand's separate read and write of `[T, 2 * I]` disappears: the activation reads gate and up
anyway. Rows without pages are the same kernel, which then is the plain activation.
"""

from __future__ import annotations

from typing import Literal

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
from loraplex.kernels.gpu.expand import page_operands
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LARGE_ROWS, SMALL_ROWS, LoraWork, TileList
from loraplex.kernels.ops import NUM_MODULES, Module, PageTables

Activation = Literal["silu", "gelu_tanh"]

# Columns of a decode program: 32 KB of weights at rank 16, asked for at once (16 loads of 16 bytes
# in each of 128 threads), so the four programs that an SM holds keep 128 KB under way.
SMALL_COLUMNS = 512
SMALL_DOT_COLUMNS = 128
# Four programs of 128 threads or two of 256 per SM. Left alone, ptxas takes up to 172 for loads
# that it moves together and half the programs no longer fit. Nothing is spilled, on sm_90 or sm_80;
# wider prefill blocks would be.
MAX_REGISTERS = 128
LARGE_DOT_COLUMNS = 32
LARGE_PROGRAMS = 1024  # four waves of two programs on 132 SMs
LARGE_STEPS = 16

_MODULES = tl.constexpr(NUM_MODULES)
_GATE = tl.constexpr(int(Module.GATE))


def swiglu(
    gate_up: Tensor,
    shrunk: Shrunk | None,
    tables: PageTables | None,
    work: LoraWork,
    layer: int,
    activation: Activation = "silu",
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`act(gate + delta_gate) * (up + delta_up)`, new.

    gate_up: `[T, 2 * I]`, contiguous, gate first; all T rows must be in `work`. shrunk: of
    (GATE, UP), None where no page of the step adapts them. Returns `[T, I]` of gate_up's dtype,
    rounded once from fp32.

    Raises ValueError for tensors the kernels would misread.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up of shape {tuple(gate_up.shape)} and strides {gate_up.stride()} must be "
            "[T, 2 * I] and contiguous; call gate_up.contiguous()"
        )
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation {activation!r} is unknown; use 'silu' or 'gelu_tanh'")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)

    def start(tiles: TileList | None, t: Tensor | None, tile_rows: int) -> None:
        if tiles is None:
            return
        small = tile_rows == SMALL_ROWS
        columns = min(SMALL_COLUMNS, max(16, triton.next_power_of_2(width)))
        dot_columns = min(columns, SMALL_DOT_COLUMNS if small else LARGE_DOT_COLUMNS)
        if t is None:
            dot_columns = min(columns, 64)  # base rows alone: fewest registers
        steps = columns // dot_columns if small else large_steps(width, dot_columns, tiles)
        limited = t is not None and gate_up.element_size() == 2  # fp32 is for tests
        limit = {"maxnreg": MAX_REGISTERS} if limited else {}
        launch(
            _swiglu_kernel,
            (triton.cdiv(width, steps * dot_columns), tiles.capacity),
            gate_up,
            out,
            tiles.tiles,
            tiles.count,
            *page_operands(tables, work, t),
            layer,
            steps,
            WIDTH=width,
            PLANES=0 if t is None else t.shape[0],
            PLANES_POW2=1 if t is None else triton.next_power_of_2(t.shape[0]),
            COLUMNS=columns,
            DOT_COLUMNS=dot_columns,
            ROWS=tile_rows,
            MATRIX_ONLY=batch_invariant or not small,
            ACTIVATION=activation,
            num_warps=4 if small else 8,
            num_stages=1,  # the dots of a page are single: nothing to pipeline
            **limit,
        )

    start(work.small, None if shrunk is None else shrunk.small, SMALL_ROWS)
    start(work.large, None if shrunk is None else shrunk.large, LARGE_ROWS)
    return out


def large_steps(width: int, columns: int, tiles: TileList) -> int:
    """Column blocks that a prefill program walks: one finds its pages and T in cache after the
    first and loads a block ahead, but short prefills need every program they can get.
    """
    blocks: int = triton.cdiv(width, columns) * tiles.capacity
    return max(1, min(LARGE_STEPS, blocks // LARGE_PROGRAMS))


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """Both activations are `gate * sigmoid(z)`: tanh(z) = 2 * sigmoid(2 * z) - 1.

    Below -80 the sigmoid is nothing to any gate, and its exponential must not overflow.
    """
    if ACTIVATION == "silu":
        z = gate
    else:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    return gate / (1.0 + tl.exp(-tl.maximum(z, -80.0))) * up


@triton.jit
def _find_gate_up(
    page_ids, page_weights, offset_b, live_ranks, scaling, num_layers, entry, layer, wanted
):  # fmt: skip
    """Of both modules: (first element of B's tile or -1, live ranks or 0, scale)."""
    page = tl.load(page_ids + entry, mask=wanted, other=0).to(tl.int64)
    weight = tl.load(page_weights + entry, mask=wanted, other=0.0)
    gate = (page * num_layers + layer) * _MODULES + _GATE
    gate_at = tl.load(offset_b + gate)
    up_at = tl.load(offset_b + gate + 1)
    gate_live = tl.where(gate_at < 0, 0, tl.load(live_ranks + gate))
    up_live = tl.where(up_at < 0, 0, tl.load(live_ranks + gate + 1))
    gate_scale = weight * tl.load(scaling + gate)
    up_scale = weight * tl.load(scaling + gate + 1)
    return gate_at, gate_live, gate_scale, up_at, up_live, up_scale


@triton.jit
def _load_gate_up(source, columns, real, end, WIDTH: tl.constexpr):
    mask = real[:, None] & (columns < end)[None, :]
    gate = tl.load(source + columns[None, :], mask=mask, other=0.0)
    return gate, tl.load(source + WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_operands(
    page_ids, page_weights, offset_b, live_ranks, scaling, arena, t, plane_stride, num_layers,
    layer, entry, t_entries, real, wanted, PLANES: tl.constexpr,
):  # fmt: skip
    """Of both modules: where the page's B tile is, its live ranks, and T for the matrix units.

    T: `[rows, 16]`, scaled, rounded to the model's type. Without `wanted` nothing is read at entry.
    """
    ranks = tl.arange(0, RANKS)
    gate_at, gate_live, gate_scale, up_at, up_live, up_scale = _find_gate_up(
        page_ids, page_weights, offset_b, live_ranks, scaling, num_layers, entry, layer, wanted
    )
    at = t_entries * (2 * RANKS)
    t_gate = load_t_rows(t, plane_stride, at, real & wanted, PLANES)
    t_up = load_t_rows(t, plane_stride, at + RANKS, real & wanted, PLANES)
    # T of a module that the page does not adapt is not written: never use it.
    t_gate = tl.where((ranks < gate_live)[None, :], t_gate, 0.0) * gate_scale
    t_up = tl.where((ranks < up_live)[None, :], t_up, 0.0) * up_scale
    to = arena.dtype.element_ty
    return gate_at, gate_live, t_gate.to(to), up_at, up_live, t_up.to(to)


@triton.jit(do_not_specialize=["layer", "steps"])
def _swiglu_kernel(
    gate_up,
    out,
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
    steps,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    PLANES_POW2: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    MATRIX_ONLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`out = act(gate + sum over pages of s t B_gate) * (up + sum of s t B_up)`, fp32.

    Grid: (columns, tile), so that programs past `count` come last. One row, or a base row: sums
    over 16 rows of B on the vector units; more rows: `[ROWS, 16] x [16, DOT_COLUMNS]` on the matrix
    units, t rounded to the model's type. PLANES 0: no page adapts these modules.
    """
    index = tl.program_id(1)
    first_row, rows, first_page, pages, t_start = load_tile(tiles, index)
    # No tile is empty: one condition, so that the tile and the count are asked for together.
    if (index >= tl.load(count)) | (rows == 0):
        return
    ranks = tl.arange(0, RANKS)
    first_column = tl.program_id(0) * (steps * DOT_COLUMNS)
    if (rows == 1) & ((not MATRIX_ONLY) | (pages == 0)):
        columns = first_column + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        source = gate_up + first_row.to(tl.int64) * (2 * WIDTH) + columns
        # Not used before the loop's end: nothing in it waits for them.
        gate_base = tl.load(source, mask=inside, other=0.0)
        up_base = tl.load(source + WIDTH, mask=inside, other=0.0)
        gate = tl.zeros([COLUMNS], dtype=tl.float32)
        up = tl.zeros([COLUMNS], dtype=tl.float32)
        if PLANES > 0:
            for page in range(pages):
                gate_at, gate_live, gate_scale, up_at, up_live, up_scale = _find_gate_up(
                    page_ids,
                    page_weights,
                    offset_b,
                    live_ranks,
                    scaling,
                    num_layers,
                    first_page + page,
                    layer,
                    True,
                )
                # All of this is asked for before any of it is waited for.
                at = (t_start + page) * (2 * RANKS)
                t_gate = load_t_planes(t, plane_stride, at, PLANES, PLANES_POW2)
                t_up = load_t_planes(t, plane_stride, at + RANKS, PLANES, PLANES_POW2)
                gate_b = load_ranks(arena, gate_at, gate_live, WIDTH, columns, inside)
                up_b = load_ranks(arena, up_at, up_live, WIDTH, columns, inside)
                # T of a module that the page does not adapt is not written: never use it.
                t_gate = tl.where(ranks < gate_live, tl.sum(t_gate, 0), 0.0) * gate_scale
                t_up = tl.where(ranks < up_live, tl.sum(t_up, 0), 0.0) * up_scale
                gate += tl.sum(gate_b.to(tl.float32) * t_gate[:, None], 0)
                up += tl.sum(up_b.to(tl.float32) * t_up[:, None], 0)
        gate += gate_base.to(tl.float32)
        up += up_base.to(tl.float32)
        result = _activate(gate, up, ACTIVATION)
        tl.store(
            out + first_row.to(tl.int64) * WIDTH + columns,
            result.to(out.dtype.element_ty),
            mask=inside,
        )
    else:
        row = tl.arange(0, ROWS)
        real = row < rows
        token = (first_row + row).to(tl.int64)[:, None]
        row_starts = gate_up + token * (2 * WIDTH)
        end = tl.minimum(first_column + steps * DOT_COLUMNS, WIDTH)
        first = first_column + tl.arange(0, DOT_COLUMNS)
        gate_next, up_next = _load_gate_up(row_starts, first, real, end, WIDTH)
        if PLANES > 0:
            # The first page's, and mostly the only one's, for all steps.
            first_gate_at, first_gate_live, first_t_gate, first_up_at, first_up_live, first_t_up = (
                _load_operands(
                    page_ids, page_weights, offset_b, live_ranks, scaling, arena, t, plane_stride,
                    num_layers, layer, first_page, t_start + row * pages, real, pages > 0, PLANES,
                )
            )  # fmt: skip
        for step in range(steps):
            columns = first + step * DOT_COLUMNS
            inside = columns < WIDTH
            gate_base, up_base = gate_next, up_next
            gate_next, up_next = _load_gate_up(row_starts, columns + DOT_COLUMNS, real, end, WIDTH)
            gate = tl.zeros([ROWS, DOT_COLUMNS], dtype=tl.float32)
            up = tl.zeros([ROWS, DOT_COLUMNS], dtype=tl.float32)
            if PLANES > 0:
                gate_at, gate_live, t_gate = first_gate_at, first_gate_live, first_t_gate
                up_at, up_live, t_up = first_up_at, first_up_live, first_t_up
                for page in range(pages):
                    if page > 0:
                        gate_at, gate_live, t_gate, up_at, up_live, t_up = _load_operands(
                            page_ids, page_weights, offset_b, live_ranks, scaling, arena, t,
                            plane_stride, num_layers, layer, first_page + page,
                            t_start + row * pages + page, real, True, PLANES,
                        )  # fmt: skip
                    gate_b = load_ranks(arena, gate_at, gate_live, WIDTH, columns, inside)
                    up_b = load_ranks(arena, up_at, up_live, WIDTH, columns, inside)
                    gate = dot(t_gate, gate_b, gate)
                    up = dot(t_up, up_b, up)
            gate += gate_base.to(tl.float32)
            up += up_base.to(tl.float32)
            result = _activate(gate, up, ACTIVATION)
            tl.store(
                out + token * WIDTH + columns[None, :],
                result.to(out.dtype.element_ty),
                mask=real[:, None] & inside[None, :],
            )

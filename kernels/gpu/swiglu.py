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

from loraplex.kernels.gpu.common import RANKS, dot, load_ranks, load_t_row, load_t_rows, load_tile
from loraplex.kernels.gpu.expand import page_operands
from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.shrink import Shrunk
from loraplex.kernels.gpu.work import LARGE_ROWS, SMALL_ROWS, LoraWork, TileList
from loraplex.kernels.ops import NUM_MODULES, Module, PageTables

Activation = Literal["silu", "gelu_tanh"]

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
        columns = min(512 if small else 128, max(16, triton.next_power_of_2(width)))
        launch(
            _swiglu_kernel,
            (triton.cdiv(width, columns), tiles.capacity),
            gate_up,
            out,
            tiles.tiles,
            tiles.count,
            *page_operands(tables, work, t),
            layer,
            WIDTH=width,
            PLANES=0 if t is None else t.shape[0],
            PLANES_POW2=1 if t is None else triton.next_power_of_2(t.shape[0]),
            COLUMNS=columns,
            DOT_COLUMNS=min(columns, 128),
            ROWS=tile_rows,
            MATRIX_ONLY=batch_invariant or not small,
            ACTIVATION=activation,
            num_warps=4 if small else 8,
            num_stages=2,
        )

    start(work.small, None if shrunk is None else shrunk.small, SMALL_ROWS)
    start(work.large, None if shrunk is None else shrunk.large, LARGE_ROWS)
    return out


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """Both activations are `gate * sigmoid(z)`: tanh(z) = 2 * sigmoid(2 * z) - 1."""
    if ACTIVATION == "silu":
        z = gate
    else:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    return gate / (1.0 + tl.exp(-z)) * up


@triton.jit
def _find_gate_up(page_ids, page_weights, offset_b, live_ranks, scaling, num_layers, entry, layer):
    """Of both modules: (first element of B's tile or -1, live ranks or 0, scale)."""
    page = tl.load(page_ids + entry).to(tl.int64)
    weight = tl.load(page_weights + entry)
    gate = (page * num_layers + layer) * _MODULES + _GATE
    gate_at = tl.load(offset_b + gate)
    up_at = tl.load(offset_b + gate + 1)
    gate_live = tl.where(gate_at < 0, 0, tl.load(live_ranks + gate))
    up_live = tl.where(up_at < 0, 0, tl.load(live_ranks + gate + 1))
    gate_scale = weight * tl.load(scaling + gate)
    up_scale = weight * tl.load(scaling + gate + 1)
    return gate_at, gate_live, gate_scale, up_at, up_live, up_scale


@triton.jit(do_not_specialize=["layer"])
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
    if index >= tl.load(count):
        return
    ranks = tl.arange(0, RANKS)
    first_column = tl.program_id(0) * COLUMNS
    if (rows == 1) & ((not MATRIX_ONLY) | (pages == 0)):
        columns = first_column + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        source = gate_up + first_row.to(tl.int64) * (2 * WIDTH) + columns
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
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
                )
                # Both tiles and T are asked for before the first is waited for.
                gate_b = load_ranks(arena, gate_at, gate_live, WIDTH, columns, inside)
                up_b = load_ranks(arena, up_at, up_live, WIDTH, columns, inside)
                at = (t_start + page) * (2 * RANKS)
                t_gate = load_t_row(t, plane_stride, at, PLANES, PLANES_POW2) * gate_scale
                t_up = load_t_row(t, plane_stride, at + RANKS, PLANES, PLANES_POW2) * up_scale
                t_gate = tl.where(ranks < gate_live, t_gate, 0.0)  # T is not written elsewhere
                t_up = tl.where(ranks < up_live, t_up, 0.0)
                gate += tl.sum(gate_b.to(tl.float32) * t_gate[:, None], 0)
                up += tl.sum(up_b.to(tl.float32) * t_up[:, None], 0)
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
        for step in range(0, COLUMNS, DOT_COLUMNS):
            columns = first_column + step + tl.arange(0, DOT_COLUMNS)
            inside = columns < WIDTH
            mask = real[:, None] & inside[None, :]
            source = gate_up + token * (2 * WIDTH) + columns[None, :]
            gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
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
                    )
                    gate_b = load_ranks(arena, gate_at, gate_live, WIDTH, columns, inside)
                    up_b = load_ranks(arena, up_at, up_live, WIDTH, columns, inside)
                    at = (t_start + row * pages + page) * (2 * RANKS)
                    t_gate = load_t_rows(t, plane_stride, at, real, PLANES) * gate_scale
                    t_up = load_t_rows(t, plane_stride, at + RANKS, real, PLANES) * up_scale
                    t_gate = tl.where((ranks < gate_live)[None, :], t_gate, 0.0)
                    t_up = tl.where((ranks < up_live)[None, :], t_up, 0.0)
                    gate = dot(t_gate.to(gate_b.dtype), gate_b, gate)
                    up = dot(t_up.to(up_b.dtype), up_b, up)
            result = _activate(gate, up, ACTIVATION)
            tl.store(
                out + token * WIDTH + columns[None, :], result.to(out.dtype.element_ty), mask=mask
            )

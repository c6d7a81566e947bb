"""A step of a decoder on random data: adapters, batches, activations, and one layer's operations.

What the benches time, the self-test checks and the offline compile records is made here, on any
device: on `meta` nothing is allocated and only shapes remain. Knows nothing of who computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.model_shapes import ALL_MODULES, ModelShape
from loraplex.kernels.ops import (
    GATE_UP,
    NUM_MODULES,
    PAGE_RANKS,
    QKV,
    AttentionBatch,
    KVCache,
    LoraBatch,
    Module,
    Ops,
    PageTables,
)

ALIGNMENT = 64  # elements between the starts of tiles, as in the adapter pool
PATTERN = 1 << 20  # random numbers made on a CPU before they repeat: fresh gigabytes take too long

Run = tuple[int, tuple[int, ...]]  # rows, the adapters applied to each of them (none: base rows)


def random_tensor(*size: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Tensor:
    """Normally distributed; on a CPU it repeats after `PATTERN` numbers."""
    out = torch.empty(size, dtype=dtype, device=device)
    if device.type == "meta":
        return out
    if device.type != "cpu" or out.numel() <= PATTERN:
        return out.normal_(std=std)
    pattern = torch.empty(PATTERN, dtype=dtype).normal_(std=std)
    flat = out.view(-1)
    for start in range(0, flat.numel(), PATTERN):
        part = flat[start : start + PATTERN]
        part.copy_(pattern[: part.numel()])
    return out


@dataclass(frozen=True, slots=True, eq=False)
class RandomAdapters:
    """pages: of each adapter, in order. live_bytes: of one pass over all live rows."""

    tables: PageTables
    pages: list[list[int]]
    live_bytes: int


def make_adapters(
    shape: ModelShape,
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_layers: int | None = None,
    modules: Sequence[Sequence[Module]] | None = None,
    shuffled: bool = False,
) -> RandomAdapters:
    """Adapters laid out as the pool does: one frame per page and layer, all modules inside.

    The deltas are as large as the base values: A of standard deviation 1 / sqrt(in), B of 1/4.
    modules: per adapter, those it adapts. shuffled: frames in random places, not one after another.
    """
    num_layers = shape.num_layers if num_layers is None else num_layers
    lives, owners, pages = _pages_of(ranks)
    starts, frame = _frame(shape)
    size = (len(lives), num_layers, NUM_MODULES)
    order = np.arange(len(lives) * num_layers, dtype=np.int64)
    if shuffled:
        np.random.default_rng(0).shuffle(order)
    base = order.reshape(len(lives), num_layers, 1) * frame
    adapted = np.zeros(size, dtype=bool)
    for page, owner in enumerate(owners):
        adapted[page][:, list(ALL_MODULES if modules is None else modules[owner])] = True
    live = np.where(adapted, np.array(lives, dtype=np.int32)[:, None, None], 0).astype(np.int32)

    def table(side: int) -> Tensor:
        return torch.from_numpy(np.where(adapted, base + starts[side], -1)).to(device)

    scaling = [1.0 + 0.5 * (owner % 3) for owner in owners]
    arena = random_tensor(len(order) * frame, dtype=dtype, device=device)
    _shape_tiles(arena.view(-1, frame), starts, shape, order.reshape(len(lives), -1), lives)
    tables = PageTables(
        arena=arena,
        offset_a=table(0),
        offset_b=table(1),
        live_ranks=torch.from_numpy(live).to(device),
        scaling=torch.tensor(scaling, device=device)[:, None, None].expand(size).contiguous(),
    )
    widths = np.array([sum(shape.widths(module)) for module in range(NUM_MODULES)])
    return RandomAdapters(tables, pages, int((live * widths).sum()) * dtype.itemsize)


def _pages_of(ranks: Sequence[int]) -> tuple[list[int], list[int], list[list[int]]]:
    """Live ranks and owner of every page, and the pages of every adapter."""
    lives: list[int] = []
    owners: list[int] = []
    pages: list[list[int]] = []
    for adapter, rank in enumerate(ranks):
        pages.append([])
        for first in range(0, rank, PAGE_RANKS):
            pages[-1].append(len(lives))
            lives.append(min(PAGE_RANKS, rank - first))
            owners.append(adapter)
    return lives, owners, pages


def _frame(shape: ModelShape) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], int]:
    """First element of each tile A and B in a frame, and the elements of a frame."""
    starts = np.zeros((2, NUM_MODULES), dtype=np.int64)
    used = 0
    for module in range(NUM_MODULES):
        for side, width in enumerate(shape.widths(module)):
            starts[side, module] = used
            used += -(-PAGE_RANKS * width // ALIGNMENT) * ALIGNMENT
    return starts, used


def _shape_tiles(
    frames: Tensor,
    starts: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    shape: ModelShape,
    order: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    lives: list[int],
) -> None:
    """Scale the tiles in place and zero the rows that no rank uses."""
    if frames.device.type == "meta":
        return
    for module in range(NUM_MODULES):
        width_in, width_out = shape.widths(module)
        for side, width, std in ((0, width_in, 1 / math.sqrt(width_in)), (1, width_out, 0.25)):
            first = int(starts[side, module])
            frames[:, first : first + PAGE_RANKS * width].mul_(std)
            for page, live in enumerate(lives):
                if live < PAGE_RANKS:
                    for at in order[page].tolist():
                        frames[at, first + live * width : first + PAGE_RANKS * width] = 0


def make_lora(
    adapters: RandomAdapters,
    runs: Sequence[Run],
    weights: Sequence[float] = (1.0, 0.5, -0.75),
) -> LoraBatch:
    """weights: of the first, second, ... adapter of a composition, in turn."""
    tables, device = adapters.tables, adapters.tables.arena.device
    tiles: list[tuple[int, int, int, int]] = []
    ids: list[int] = []
    page_weights: list[float] = []
    row = 0
    for rows, composition in runs:
        first = len(ids)
        for place, adapter in enumerate(composition):
            ids += adapters.pages[adapter]
            page_weights += [weights[place % len(weights)]] * len(adapters.pages[adapter])
        if rows and len(ids) > first:
            tiles.append((row, rows, first, len(ids) - first))
        row += rows
    num_layers = tables.offset_a.shape[1]
    return LoraBatch(
        tables=tables,
        tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 4).to(device),
        page_ids=torch.tensor(ids, dtype=torch.int32).to(device),
        page_weights=torch.tensor(page_weights, dtype=torch.float32).to(device),
        max_pages=max((tile[3] for tile in tiles), default=0),
        host_tiles=tiles,
        host_page_ids=ids,
        host_page_weights=page_weights,
        adapted=frozenset(
            (layer, module)
            for layer in range(num_layers if tiles else 0)
            for module in range(NUM_MODULES)
        ),
    )


def make_attention(
    contexts: Sequence[int],
    queries: Sequence[int],
    block_size: int,
    device: torch.device,
    seed: int = 0,
) -> tuple[AttentionBatch, int]:
    """Sequences of `contexts` tokens, the last `queries` of them new, in shuffled blocks.

    The ones with one query come first. Returns the batch and the number of blocks it uses.
    """
    counts = [-(-length // block_size) for length in contexts]
    order = np.random.default_rng(seed).permutation(sum(counts)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    starts = [0]
    positions: list[int] = []
    slots: list[int] = []
    for table, length, count in zip(tables, contexts, queries, strict=True):
        starts.append(starts[-1] + count)
        for position in range(length - count, length):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    width = max(counts, default=1)
    padded = [table + [0] * (width - len(table)) for table in tables]
    batch = AttentionBatch(
        positions=torch.tensor(positions, dtype=torch.int64).to(device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64).to(device),
        block_tables=torch.tensor(padded, dtype=torch.int32).view(-1, width).to(device),
        query_start=torch.tensor(starts, dtype=torch.int32).to(device),
        context_lens=torch.tensor(list(contexts), dtype=torch.int32).to(device),
        num_decodes=sum(1 for count in queries if count == 1),
        seq_ids=list(range(len(tables))),
        host_query_start=starts,
        host_context_lens=list(contexts),
        host_block_tables=tables,
    )
    return batch, sum(counts)


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What each operation of a layer is given, T rows. Every tensor is random and its own."""

    x: Tensor  # [T, hidden]
    qkv: Tensor  # [T, qkv_width]
    attended: Tensor  # [T, q_width]
    y: Tensor  # [T, hidden], what the o and down linears return
    residual: Tensor  # [T, hidden]
    gate_up: Tensor  # [T, 2 * intermediate]
    inner: Tensor  # [T, intermediate]
    norm: Tensor  # [hidden]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    cos: Tensor  # [T, head_dim] fp32
    sin: Tensor


def make_activations(
    shape: ModelShape, rows: int, dtype: torch.dtype, device: torch.device
) -> Activations:
    def rand(*size: int) -> Tensor:
        return random_tensor(*size, dtype=dtype, device=device)

    half = torch.rand(rows, shape.head_dim // 2, device=device) * 6
    angles = torch.cat((half, half), -1)
    return Activations(
        x=rand(rows, shape.hidden),
        qkv=rand(rows, shape.qkv_width),
        attended=rand(rows, shape.q_width),
        y=rand(rows, shape.hidden),
        residual=rand(rows, shape.hidden),
        gate_up=rand(rows, 2 * shape.intermediate),
        inner=rand(rows, shape.intermediate),
        norm=rand(shape.hidden),
        q_norm=rand(shape.head_dim) if shape.qk_norm else None,
        k_norm=rand(shape.head_dim) if shape.qk_norm else None,
        cos=angles.cos(),
        sin=angles.sin(),
    )


RMS_EPS = 1e-5


@dataclass(slots=True, eq=False)
class LayerStep:
    """The operations of one layer on given activations; each can be run alone, again and again.

    `rope_kv_write` and `add_rms_norm` work in place, so running one twice rotates or adds twice.
    """

    shape: ModelShape
    ops: Ops
    given: Activations
    lora: LoraBatch | None
    attention_batch: AttentionBatch
    kv: KVCache

    def input_of(self, modules: tuple[Module, ...]) -> Tensor:
        given = self.given
        if modules in (QKV, GATE_UP):
            return given.x
        return given.attended if modules == (Module.O,) else given.inner

    def shrink(self, modules: tuple[Module, ...], layer: int = 0) -> Tensor | None:
        return self.ops.lora_shrink(self.input_of(modules), self.lora, layer, modules)

    def rope_kv_write(self, t: Tensor | None, layer: int = 0) -> Tensor:
        given = self.given
        return self.ops.rope_kv_write(
            given.qkv, t, self.lora, layer, given.cos, given.sin, given.q_norm, given.k_norm,
            RMS_EPS, self.shape.num_heads, self.kv, self.attention_batch,
        )  # fmt: skip

    def attention(self, q: Tensor | None = None, layer: int = 0) -> Tensor:
        shape = self.shape
        if q is None:
            q = self.given.attended.view(-1, shape.num_heads, shape.head_dim)
        scale = shape.head_dim**-0.5
        return self.ops.attention(
            q, self.kv, layer, self.attention_batch, scale, shape.sliding_window
        )

    def add_rms_norm(self, module: Module, t: Tensor | None, layer: int = 0) -> Tensor:
        given = self.given
        return self.ops.add_rms_norm(
            given.y, t, self.lora, layer, module, given.residual, given.norm, RMS_EPS
        )

    def swiglu(self, t: Tensor | None, layer: int = 0) -> Tensor:
        return self.ops.swiglu(self.given.gate_up, t, self.lora, layer)

    def linear_operands(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias of one of `ModelShape.linears`, the latter two made here."""
        width, out = self.shape.linears()[name]
        x = {"o": self.given.attended, "down": self.given.inner}.get(name, self.given.x)
        weight = random_tensor(out, width, dtype=x.dtype, device=x.device, std=width**-0.5)
        if name != "qkv" or not self.shape.qkv_bias:
            return x, weight, None
        return x, weight, random_tensor(out, dtype=x.dtype, device=x.device)

    def adapted(self, layer: int = 0) -> None:
        """All that adapters touch: four shrinks and the four operations their expands are in."""
        self.rope_kv_write(self.shrink(QKV, layer), layer)
        self.add_rms_norm(Module.O, self.shrink((Module.O,), layer), layer)
        self.swiglu(self.shrink(GATE_UP, layer), layer)
        self.add_rms_norm(Module.DOWN, self.shrink((Module.DOWN,), layer), layer)

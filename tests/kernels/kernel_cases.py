"""Random adapter pools, LoRA batches and attention batches for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from loraplex.kernels import reference
from loraplex.kernels.ops import (
    NUM_MODULES,
    PAGE_RANKS,
    AttentionBatch,
    KVCache,
    LoraBatch,
    Module,
    Ops,
    PageTables,
)

ALL = tuple(Module)
# fp32: accumulation order only. bf16: inputs and outputs are rounded; torch rounds the delta too.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), expected.float(), **TOLERANCE[dtype])


def rand(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@dataclass
class Shape:
    hidden: int = 48
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 80
    layers: int = 2

    def widths(self, module: Module) -> tuple[int, int]:
        """(in, out) of a module."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            Module.Q: (self.hidden, q),
            Module.K: (self.hidden, kv),
            Module.V: (self.hidden, kv),
            Module.O: (q, self.hidden),
            Module.GATE: (self.hidden, self.intermediate),
            Module.UP: (self.hidden, self.intermediate),
            Module.DOWN: (self.intermediate, self.hidden),
        }[module]


@dataclass
class Adapter:
    rank: int
    modules: Sequence[Module] = ALL
    alpha: float = 16.0
    ranks: dict[Module, int] = field(default_factory=dict)  # per-module exceptions
    layers: Sequence[int] | None = None


def make_pool(
    shape: Shape, adapters: Sequence[Adapter], dtype: torch.dtype, scale: float = 0.2
) -> tuple[PageTables, list[list[int]]]:
    """A pool with the pages in shuffled places. Returns the tables and each adapter's pages."""

    def rank_of(adapter: Adapter, module: Module, layer: int) -> int:
        if module not in adapter.modules:
            return 0
        if adapter.layers is not None and layer not in adapter.layers:
            return 0
        return adapter.ranks.get(module, adapter.rank)

    def pages_of(adapter: Adapter) -> int:
        return -(-max([adapter.rank, *adapter.ranks.values()]) // PAGE_RANKS)

    num_pages = sum(pages_of(a) for a in adapters) + 2
    free = torch.randperm(num_pages).tolist()
    size = (num_pages, shape.layers, NUM_MODULES)
    offset_a = torch.full(size, -1, dtype=torch.int64)
    offset_b = torch.full(size, -1, dtype=torch.int64)
    live = torch.zeros(size, dtype=torch.int32)
    scaling = torch.zeros(size)
    chunks: list[Tensor] = []
    used = 0

    def tile(rank: int, width: int) -> int:
        nonlocal used
        start = used
        data = torch.zeros(PAGE_RANKS, width)
        data[:rank] = torch.randn(rank, width) * scale
        padding = -(PAGE_RANKS * width) % 64
        chunks.extend((data.flatten(), torch.full((padding,), float("nan"))))
        used += PAGE_RANKS * width + padding
        return start

    pages: list[list[int]] = []
    for adapter in adapters:
        mine = [free.pop() for _ in range(pages_of(adapter))]
        for i, page in enumerate(mine):
            for layer in range(shape.layers):
                for module in Module:
                    total = rank_of(adapter, module, layer)
                    rank = min(PAGE_RANKS, total - i * PAGE_RANKS)
                    if rank <= 0:
                        continue
                    width_in, width_out = shape.widths(module)
                    offset_a[page, layer, module] = tile(rank, width_in)
                    offset_b[page, layer, module] = tile(rank, width_out)
                    live[page, layer, module] = rank
                    scaling[page, layer, module] = adapter.alpha / total
        pages.append(mine)
    arena = torch.cat(chunks).to(dtype) if chunks else torch.zeros(1, dtype=dtype)
    return PageTables(arena, offset_a, offset_b, live, scaling), pages


def make_lora(
    tables: PageTables,
    pages: list[list[int]],
    rows: Sequence[tuple[int, Sequence[tuple[int, float]]]],
) -> LoraBatch:
    """rows: runs of (number of rows, composition), a composition being (adapter, weight) pairs."""
    tiles: list[tuple[int, int, int, int]] = []
    ids: list[int] = []
    weights: list[float] = []
    row = 0
    for count, composition in rows:
        first = len(ids)
        for adapter, weight in composition:
            ids += pages[adapter]
            weights += [weight] * len(pages[adapter])
        if composition and count:
            tiles.append((row, count, first, len(ids) - first))
        row += count
    adapted = {
        (layer, module)
        for layer in range(tables.live_ranks.shape[1])
        for module in range(NUM_MODULES)
        if any(int(tables.live_ranks[page, layer, module]) for page in ids)
    }
    return LoraBatch(
        tables=tables,
        tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 4),
        page_ids=torch.tensor(ids, dtype=torch.int32),
        page_weights=torch.tensor(weights, dtype=torch.float32),
        max_pages=max((tile[3] for tile in tiles), default=0),
        host_tiles=tiles,
        host_page_ids=ids,
        host_page_weights=weights,
        adapted=frozenset(adapted),
    )


class Sequences:
    """The paged state of some sequences, and the same keys and values as plain lists."""

    def __init__(self, shape: Shape, num_blocks: int = 64, block_size: int = 16) -> None:
        self.shape = shape
        self.block_size = block_size
        self.free = torch.randperm(num_blocks).tolist()
        self.lengths: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.keys: dict[tuple[int, int], Tensor] = {}  # (layer, seq) -> [context, Hk, D]
        self.values: dict[tuple[int, int], Tensor] = {}

    def drop(self, seq: int, keep: int = 0) -> None:
        """Preempt: the first `keep` tokens stay (as a prefix hit), the rest is computed again."""
        kept = -(-keep // self.block_size)
        self.free = self.tables[seq][kept:] + self.free
        self.tables[seq] = self.tables[seq][:kept]
        self.lengths[seq] = keep
        for store in (self.keys, self.values):
            for layer in range(self.shape.layers):
                if (layer, seq) in store:
                    store[layer, seq] = store[layer, seq][:keep]

    def step(self, work: Sequence[tuple[int, int]]) -> AttentionBatch:
        """work: (seq, new tokens), the ones with one token first."""
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for seq, count in work:
            table = self.tables.setdefault(seq, [])
            first = self.lengths.setdefault(seq, 0)
            while len(table) * self.block_size < first + count:
                table.append(self.free.pop())
            for position in range(first, first + count):
                positions.append(position)
                block = table[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            self.lengths[seq] = first + count
            starts.append(starts[-1] + count)
        tables = [list(self.tables[seq]) for seq, _ in work]
        lengths = [self.lengths[seq] for seq, _ in work]
        width = max((len(table) for table in tables), default=1)
        padded = [table + [0] * (width - len(table)) for table in tables]
        return AttentionBatch(
            positions=torch.tensor(positions, dtype=torch.int64),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            block_tables=torch.tensor(padded, dtype=torch.int32).view(len(work), width),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            num_decodes=sum(1 for _, count in work if count == 1),
            seq_ids=[seq for seq, _ in work],
            host_query_start=starts,
            host_context_lens=lengths,
            host_block_tables=tables,
        )

    def remember(self, layer: int, batch: AttentionBatch, k: Tensor, v: Tensor) -> None:
        """Append the step's reference keys and values."""
        for i, seq in enumerate(batch.seq_ids):
            rows = slice(batch.host_query_start[i], batch.host_query_start[i + 1])
            for store, new in ((self.keys, k), (self.values, v)):
                old = store.get((layer, seq))
                store[layer, seq] = new[rows] if old is None else torch.cat((old, new[rows]))

    def attention(
        self, layer: int, batch: AttentionBatch, q: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys = [self.keys[layer, seq] for seq in batch.seq_ids]
        values = [self.values[layer, seq] for seq in batch.seq_ids]
        return reference.attention(q, keys, values, batch, scale, window)


def cos_sin(batch: AttentionBatch, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = batch.positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def new_cache(
    ops: Ops, shape: Shape, dtype: torch.dtype, num_blocks: int = 64, size: int = 16
) -> KVCache:
    return ops.kv_cache(
        shape.layers,
        num_blocks,
        size,
        shape.num_kv_heads,
        shape.head_dim,
        dtype,
        torch.device("cpu"),
    )


def interpreted_ops() -> Ops:
    """`TritonOps` on a CPU. Kernels compiled for a GPU, where there is one, take no CPU tensors."""
    from loraplex.kernels.gpu.launch import is_interpreted
    from loraplex.kernels.gpu.ops import TritonOps

    if not is_interpreted():
        pytest.skip("Triton compiles for the GPU here; TRITON_INTERPRET=1 runs this on the CPU")
    return TritonOps()

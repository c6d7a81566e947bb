"""A schedule as tensors: where each token stands, and which adapter pages apply to which rows.

All of it is made on the host in a few numpy arrays; what did not change since the last step (block
tables, the LoRA tiles of a batch that only decodes on) is taken over. Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.engine.api import AdapterUse
from loraplex.engine.lane import Run
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.kernels.ops import AttentionBatch, LoraBatch, PageTables

BlockTables = np.ndarray[tuple[int, int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class StepBatch:
    token_ids: Tensor  # [T] int64
    attention: AttentionBatch
    lora: LoraBatch | None  # None = no row uses an adapter's pages
    runs: list[Run]  # of the rows that use adapters


class BatchBuilder:
    """max_blocks: blocks of the longest sequence the engine accepts."""

    def __init__(
        self,
        pool: PagePool,
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self.pool = pool
        self._block_size = block_size
        self._device = device
        self._lora = _LoraBatchBuilder(pool, device)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._held: list[list[int]] = [[] for _ in range(max_num_seqs)]  # the same as lists

    def build(self, schedule: Schedule) -> StepBatch:
        scheduled = schedule.scheduled
        counts = [s.num_tokens for s in scheduled]
        query_start = [0, *accumulate(counts)]
        context_lens = [s.start + s.num_tokens for s in scheduled]
        tables = [s.seq.block_table for s in scheduled]
        block_tables = self._sync_block_tables(tables)

        flat = np.empty((3, query_start[-1]), dtype=np.int64)
        token_ids, positions, slots = flat
        size = self._block_size
        for i, s in enumerate(scheduled):
            row, start, count = query_start[i], s.start, s.num_tokens
            if count == 1:
                token_ids[row] = s.seq.token_ids[start]
                positions[row] = start
                slots[row] = tables[i][start // size] * size + start % size
                continue
            rows, end = slice(row, row + count), start + count
            token_ids[rows] = s.seq.token_ids[start:end]
            positions[rows] = here = np.arange(start, end)
            slots[rows] = block_tables[i, here // size].astype(np.int64) * size + here % size

        runs = adapter_runs(schedule, query_start)
        on_device = torch.from_numpy(flat).to(self._device)
        return StepBatch(
            token_ids=on_device[0],
            attention=AttentionBatch(
                positions=on_device[1],
                slot_mapping=on_device[2],
                block_tables=torch.from_numpy(block_tables).to(self._device),
                query_start=torch.tensor(query_start, dtype=torch.int32, device=self._device),
                context_lens=torch.tensor(context_lens, dtype=torch.int32, device=self._device),
                num_decodes=schedule.num_decodes,
                seq_ids=[s.seq.seq_id for s in scheduled],
                host_query_start=query_start,
                host_context_lens=context_lens,
                host_block_tables=tables,
            ),
            lora=self._lora.build(runs, query_start[-1]),
            runs=runs,
        )

    def _sync_block_tables(self, tables: list[list[int]]) -> BlockTables:
        """Bring the rows up to date, writing only those that changed; returns a tight copy."""
        width = 1
        for i, table in enumerate(tables):
            held, length = self._held[i], len(table)
            width = max(width, length)
            if held == table:
                continue
            self._block_tables[i, :length] = table
            self._block_tables[i, length : len(held)] = 0
            self._held[i] = table.copy()
        return self._block_tables[: len(tables), :width].copy()


def adapter_runs(schedule: Schedule, query_start: list[int]) -> list[Run]:
    """Neighbouring rows of one composition together; rows of the base model left out."""
    runs: list[Run] = []
    for s, first_row in zip(schedule.scheduled, query_start, strict=False):
        for row, num_rows, adapters in _runs_of(s, first_row):
            if not adapters:
                continue
            if runs:
                first, count, last = runs[-1]
                if first + count == row and (last is adapters or last == adapters):
                    runs[-1] = (first, count + num_rows, last)
                    continue
            runs.append((row, num_rows, adapters))
    return runs


def _runs_of(s: ScheduledSequence, row: int) -> Iterable[Run]:
    """Cut where an activated LoRA begins: its sequence's rows before that are the base model's."""
    spans = s.seq.spans
    if s.start >= spans[-1][0]:  # nearly always
        return ((row, s.num_tokens, spans[-1][1]),)
    end = s.start + s.num_tokens
    firsts = [max(s.start, min(first, end)) for first, _ in spans] + [end]
    return [
        (row + first - s.start, next_first - first, adapters)
        for first, next_first, (_, adapters) in zip(firsts, firsts[1:], spans, strict=False)
        if first < next_first
    ]


@dataclass(frozen=True, slots=True)
class RowPages:
    """Which adapter pages apply to which rows of a step; see `kernels.ops.LoraBatch`."""

    tiles: list[tuple[int, int, int, int]]  # first row, rows, first page entry, page entries
    page_ids: list[int]
    page_weights: list[float]
    adapted: frozenset[tuple[int, int]]

    @classmethod
    def find(cls, pool: PagePool, runs: list[Run]) -> RowPages:
        tiles: list[tuple[int, int, int, int]] = []
        page_ids: list[int] = []
        weights: list[float] = []
        adapted: set[tuple[int, int]] = set()
        spans: dict[tuple[AdapterUse, ...], tuple[int, int]] = {}  # of `page_ids`
        for row, count, adapters in runs:
            if adapters not in spans:
                first = len(page_ids)
                for use in adapters:
                    pages = pool.pages(use.digest)
                    page_ids += pages
                    weights += [use.weight] * len(pages)
                    adapted |= pool.adapted(use.digest)
                spans[adapters] = (first, len(page_ids) - first)
            if spans[adapters][1]:  # an adapter may have no pages, see `lane.py`
                tiles.append((row, count, *spans[adapters]))
        return cls(tiles, page_ids, weights, frozenset(adapted))


def page_tables(pool: PagePool) -> PageTables:
    return PageTables(
        arena=pool.arena,
        offset_a=pool.offset_a,
        offset_b=pool.offset_b,
        live_ranks=pool.live_ranks,
        scaling=pool.scaling,
        version=pool.version,
    )


class _LoraBatchBuilder:
    """While the same rows decode on, the last batch is used again, with a backend's notes."""

    def __init__(self, pool: PagePool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._tables = page_tables(pool)
        self._key: tuple[list[Run], int, int] | None = None
        self._batch: LoraBatch | None = None

    def build(self, runs: list[Run], num_rows: int) -> LoraBatch | None:
        if not runs:
            return None
        key = (runs, num_rows, self._pool.version)
        if key != self._key:
            self._tables.version = self._pool.version
            self._batch = self._assemble(RowPages.find(self._pool, runs))
            self._key = key
        return self._batch

    def _assemble(self, pages: RowPages) -> LoraBatch | None:
        if not pages.tiles:
            return None
        device = self._device
        return LoraBatch(
            tables=self._tables,
            tiles=torch.tensor(pages.tiles, dtype=torch.int32, device=device),
            page_ids=torch.tensor(pages.page_ids, dtype=torch.int32, device=device),
            page_weights=torch.tensor(pages.page_weights, dtype=torch.float32, device=device),
            max_pages=max(count for _, _, _, count in pages.tiles),
            host_tiles=pages.tiles,
            host_page_ids=pages.page_ids,
            host_page_weights=pages.page_weights,
            adapted=pages.adapted,
        )

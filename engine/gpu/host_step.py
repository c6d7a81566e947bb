"""A schedule as numbers on the host: what changed since the last step, ready to be copied.

What did not change is taken over: the LoRA tiles of a batch that only decodes on are cut once, and
of a block table only the appended blocks are sent. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from loraplex.adapters.pool import PagePool
from loraplex.engine.batch import RowPages, adapter_runs
from loraplex.engine.gpu.attention_plan import AttentionPlan, AttentionPlanner
from loraplex.engine.gpu.state_rows import StateRows
from loraplex.engine.gpu.step_layout import COUNT_STRIDE, Ints, StepSizes
from loraplex.engine.lane import Run
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.step_inputs import RUN_FIELDS
from loraplex.kernels.gpu.work import plan_rows

FEEDS_BACK = -1  # instead of a token id: the device knows it


@dataclass(frozen=True, slots=True, eq=False)
class HostLora:
    """The LoRA part of a step; shared by the steps that have the same rows and pages."""

    values: dict[str, Ints]
    counts: tuple[int, int, int]  # tiles of the small, norm and large family
    small_entries: int
    large_entries: int
    adapted: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class HostStep:
    """values: by field of `step_layout`. sizes: what the step uses of each."""

    schedule: Schedule
    values: dict[str, Ints]
    sizes: StepSizes
    adapted: frozenset[tuple[int, int]]
    attention: AttentionPlan
    decodes_only: bool
    query_start: list[int]
    context_lens: list[int]
    block_runs: Ints  # blocks appended to tables, see `kernels.gpu.step_inputs`
    block_values: Ints
    sampling: list[tuple[Sequence, int, int]]  # sequence, state row, position of the new token
    runs: list[Run]  # of the rows that use adapters
    sample_rows: list[int]  # that the sequences of `sampling` end with


class HostSteps:
    """small_only: every row goes to the small family of kernels, whatever the step (batch
    invariance).
    """

    def __init__(
        self,
        pool: PagePool,
        states: StateRows,
        attention: AttentionPlanner,
        block_size: int,
        *,
        small_only: bool,
    ) -> None:
        self._states = states
        self._attention = attention
        self._block_size = block_size
        self._num_blocks = [0] * states.num_rows  # of each row's table: what the device has
        self._lora = _HostLoras(pool, small_only)

    def build(self, schedule: Schedule) -> HostStep:
        scheduled = schedule.scheduled
        decodes_only = schedule.num_decodes == len(scheduled)
        query_start = [0, *accumulate(s.num_tokens for s in scheduled)]
        context_lens = [s.start + s.num_tokens for s in scheduled]
        num_tokens = query_start[-1]
        rows, block_runs, block_values = self._sync(scheduled)
        token_ids, positions, slots = self._tokens(scheduled, query_start, schedule.num_decodes)
        runs = adapter_runs(schedule, query_start)
        lora = self._lora.build(runs, num_tokens, decodes_only)
        attention = self._attention.plan(query_start, context_lens, schedule.num_decodes)
        values = {
            "counts": np.array([*lora.counts, attention.num_tiles], dtype=np.int32).repeat(
                COUNT_STRIDE
            ),
            "token_ids": token_ids,
            "positions": positions,
            "slots": slots,
            "query_start": np.array(query_start, dtype=np.int32),
            "context_lens": np.array(context_lens, dtype=np.int32),
            "state_rows": np.array(rows, dtype=np.int32),
            "attention_tiles": attention.tiles,
            **lora.values,
        }
        places = [i for i, s in enumerate(scheduled) if s.samples]
        sample_rows = [query_start[i + 1] - 1 for i in places]
        if not decodes_only:
            values["sample_rows"] = np.array(sample_rows, dtype=np.int32)
        return HostStep(
            schedule=schedule,
            values=values,
            sizes=StepSizes(
                tokens=num_tokens,
                seqs=len(scheduled),
                samples=0 if decodes_only else len(places),
                small=lora.counts[0],
                norm=lora.counts[1],
                large=lora.counts[2],
                pages=len(lora.values["page_ids"]),
                small_entries=lora.small_entries,
                large_entries=lora.large_entries,
                attention_tiles=attention.num_tiles,
            ),
            adapted=lora.adapted,
            attention=attention,
            decodes_only=decodes_only,
            query_start=query_start,
            context_lens=context_lens,
            block_runs=block_runs,
            block_values=block_values,
            sampling=[(scheduled[i].seq, rows[i], scheduled[i].seq.num_tokens) for i in places],
            runs=runs,
            sample_rows=sample_rows,
        )

    def _tokens(
        self, scheduled: list[ScheduledSequence], query_start: list[int], num_decodes: int
    ) -> tuple[Ints, Ints, Ints]:
        """Ids (or the mark that the device knows them), positions and cache slots of all rows."""
        token_ids, positions, slots = np.empty((3, query_start[-1]), dtype=np.int32)
        size = self._block_size
        first = scheduled[:num_decodes]
        starts = [s.start for s in first]
        token_ids[:num_decodes] = [
            FEEDS_BACK if s.feeds_back else s.seq.token_ids[s.start] for s in first
        ]
        positions[:num_decodes] = starts
        slots[:num_decodes] = [
            s.seq.block_table[at // size] * size + at % size
            for s, at in zip(first, starts, strict=True)
        ]
        for s, row in zip(scheduled[num_decodes:], query_start[num_decodes:], strict=False):
            rows, end = slice(row, row + s.num_tokens), s.start + s.num_tokens
            here = np.arange(s.start, end, dtype=np.int32)
            blocks = np.array(s.seq.block_table[s.start // size : -(-end // size)], dtype=np.int32)
            token_ids[rows] = s.seq.token_ids[s.start : end]
            positions[rows] = here
            slots[rows] = blocks[here // size - s.start // size] * size + here % size
        return token_ids, positions, slots

    def _sync(self, scheduled: Iterable[ScheduledSequence]) -> tuple[list[int], Ints, Ints]:
        """The state row of each sequence, and what its table got since it was last sent.

        The tables of running sequences only grow at their ends (`block_manager`).
        """
        rows: list[int] = []
        runs: list[int] = []
        values: list[int] = []
        for s in scheduled:
            row, is_new = self._states.take(s.seq.seq_id)
            rows.append(row)
            table = s.seq.block_table
            known = 0 if is_new else self._num_blocks[row]
            if known == len(table):
                continue
            runs += (row, known, len(values), len(table) - known)
            values += table[known:]
            self._num_blocks[row] = len(table)
        assert RUN_FIELDS * len(rows) >= len(runs)
        return rows, np.array(runs, dtype=np.int32), np.array(values, dtype=np.int32)


class _HostLoras:
    def __init__(self, pool: PagePool, small_only: bool) -> None:
        self._pool = pool
        self._small_only = small_only
        self._key: tuple[list[Run], int, bool, int] | None = None
        self._last: HostLora | None = None

    def build(self, runs: list[Run], num_rows: int, decodes_only: bool) -> HostLora:
        key = (runs, num_rows, decodes_only, self._pool.version)
        if self._last is None or key != self._key:
            self._last = self._cut(runs, num_rows, decodes_only or self._small_only)
            self._key = key
        return self._last

    def _cut(self, runs: list[Run], num_rows: int, small_only: bool) -> HostLora:
        pages = RowPages.find(self._pool, runs)
        plan = plan_rows(pages.tiles, num_rows, small_only=small_only)
        return HostLora(
            values={
                "small": plan.small.reshape(-1),
                "norm": plan.norm.reshape(-1),
                "large": plan.large.reshape(-1),
                "page_ids": np.array(pages.page_ids, dtype=np.int32),
                "page_weights": np.array(pages.page_weights, dtype=np.float32).view(np.int32),
            },
            counts=(len(plan.small), len(plan.norm), len(plan.large)),
            small_entries=plan.small_entries,
            large_entries=plan.large_entries,
            adapted=pages.adapted,
        )

"""Brings a step's numbers to the device in one copy, and shows them to the kernels as tensors.

What stays on the device between steps is here, too: of every running sequence its block table and
its last token. Knows nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.engine.batch import page_tables
from loraplex.engine.gpu.attention_plan import AttentionPlan
from loraplex.engine.gpu.events import mark, wait
from loraplex.engine.gpu.host_step import HostStep
from loraplex.engine.gpu.step_layout import Ints, Layout
from loraplex.kernels.gpu.attention_work import TILE_FIELDS as ATTENTION_TILE_FIELDS
from loraplex.kernels.gpu.attention_work import AttentionWork
from loraplex.kernels.gpu.step_inputs import RUN_FIELDS, append_blocks, take_inputs
from loraplex.kernels.gpu.work import TILE_FIELDS, LoraWork, TileList
from loraplex.kernels.ops import NUM_MODULES, AttentionBatch, LoraBatch

RING = 2  # a step is collected before the next but one is launched


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """A step as the model sees it: views of device memory of one layout."""

    layout: Layout
    memory: Tensor  # int32, where the layout begins
    token_ids: Tensor  # [T] int64, filled by `Metadata.take`
    state_rows: Tensor  # [S] int32
    sample_rows: Tensor | None  # [R] int32; None: every row samples
    attention: AttentionBatch
    lora: LoraBatch


class Metadata:
    """max_blocks: blocks of the longest sequence the engine accepts."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._block_size = block_size
        self._trash = max_num_seqs
        self._lora_tables = page_tables(pool)
        self._pool = pool
        self._all_pairs = frozenset(
            (layer, module) for layer in range(pool.num_layers) for module in range(NUM_MODULES)
        )
        self._ring = _PinnedRing(device)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tables = ints(max_num_seqs + 1, max_blocks)
        self.last_tokens = ints(max_num_seqs + 1, dtype=torch.int64)
        self._token_ids = ints(max_num_tokens, dtype=torch.int64)
        self._block_tables = ints(max_num_seqs, max_blocks)
        # Room behind a captured layout for the blocks its steps append, at the very most.
        self.room_for_blocks = max_num_seqs * (max_blocks + RUN_FIELDS)

    # --- layouts

    def static(self, layout: Layout, memory: Tensor, attention: AttentionPlan) -> StepInputs:
        """For decode steps of up to `layout.sizes.seqs` rows with any adapters: to be captured.

        memory: int32, `layout.size + room_for_blocks`, kept as long as the capture is used.
        """
        rows = layout.sizes.seqs
        return self._inputs(
            layout,
            memory,
            attention,
            num_decodes=rows,
            host_query_start=list(range(rows + 1)),
            host_context_lens=[0] * rows,
            host_block_tables=[[] for _ in range(rows)],
            seq_ids=[-1] * rows,
            adapted=self._all_pairs,
        )

    def fresh(self, step: HostStep) -> StepInputs:
        """For this step alone, in memory of its own."""
        scheduled = step.schedule.scheduled
        layout = Layout(step.sizes)
        size = layout.size + len(step.block_runs) + len(step.block_values)
        return self._inputs(
            layout,
            torch.empty(size, dtype=torch.int32, device=self._device),
            step.attention,
            num_decodes=step.schedule.num_decodes,
            host_query_start=step.query_start,
            host_context_lens=step.context_lens,
            host_block_tables=[s.seq.block_table for s in scheduled],
            seq_ids=[s.seq.seq_id for s in scheduled],
            adapted=step.adapted,
        )

    def _inputs(
        self,
        layout: Layout,
        memory: Tensor,
        plan: AttentionPlan,
        *,
        num_decodes: int,
        host_query_start: list[int],
        host_context_lens: list[int],
        host_block_tables: list[list[int]],
        seq_ids: list[int],
        adapted: frozenset[tuple[int, int]],
    ) -> StepInputs:
        sizes = layout.sizes

        def view(name: str, columns: int | None = None) -> Tensor:
            return layout.view(memory, name, columns)

        state_rows = view("state_rows")
        attention = AttentionBatch(
            positions=view("positions"),
            slot_mapping=view("slots"),
            block_tables=self._block_tables[: sizes.seqs],
            query_start=view("query_start"),
            context_lens=view("context_lens"),
            num_decodes=num_decodes,
            seq_ids=seq_ids,
            host_query_start=host_query_start,
            host_context_lens=host_context_lens,
            host_block_tables=host_block_tables,
            plan=AttentionWork(
                plan.num_decodes,
                plan.num_splits,
                plan.tile_queries,
                view("attention_tiles", ATTENTION_TILE_FIELDS) if sizes.attention_tiles else None,
                layout.count(memory, 3),
                sizes.attention_tiles,
            ),
        )
        return StepInputs(
            layout=layout,
            memory=memory,
            token_ids=self._token_ids[: sizes.tokens],
            state_rows=state_rows,
            sample_rows=view("sample_rows") if sizes.samples else None,
            attention=attention,
            lora=self._lora(layout, memory, adapted),
        )

    def _lora(
        self, layout: Layout, memory: Tensor, adapted: frozenset[tuple[int, int]]
    ) -> LoraBatch:
        sizes = layout.sizes

        def family(index: int, name: str, capacity: int) -> TileList | None:
            if capacity == 0:
                return None
            tiles = layout.view(memory, name, TILE_FIELDS)
            return TileList(tiles, layout.count(memory, index), capacity)

        page_ids = layout.view(memory, "page_ids")
        page_weights = layout.floats(memory, "page_weights")
        small = family(0, "small", sizes.small)
        large = family(2, "large", sizes.large)
        some = small or large
        assert some is not None, "a step without rows"
        return LoraBatch(
            tables=self._lora_tables,
            tiles=some.tiles,
            page_ids=page_ids,
            page_weights=page_weights,
            max_pages=0,
            adapted=adapted,
            plan=LoraWork(
                page_ids=page_ids,
                page_weights=page_weights,
                small=small,
                norm=family(1, "norm", sizes.norm),
                large=large,
                small_entries=sizes.small_entries,
                large_entries=sizes.large_entries,
            ),
        )

    # --- a step

    def send(self, step: HostStep, inputs: StepInputs) -> None:
        """Copy the step, without waiting. Fields it does not fill describe rows that do nothing."""
        layout, num_runs = inputs.layout, len(step.block_runs)
        blocks = layout.size + num_runs
        size = blocks + len(step.block_values)
        pinned, numbers = self._ring.next(size)
        layout.write(
            numbers,
            step.values,
            padding={
                "token_ids": 0,
                "positions": 0,
                "slots": -1,
                "query_start": step.sizes.tokens,
                "context_lens": 0,
                "state_rows": self._trash,
            },
        )
        numbers[layout.size : blocks] = step.block_runs
        numbers[blocks:size] = step.block_values
        inputs.memory[:size].copy_(pinned[:size], non_blocking=True)
        self._ring.sent()
        self._lora_tables.version = self._pool.version
        if num_runs:
            runs = inputs.memory[layout.size : blocks].view(-1, RUN_FIELDS)
            append_blocks(runs, inputs.memory[blocks:size], self.tables)

    def blank(self, inputs: StepInputs) -> None:
        """Make all rows padding: nothing is computed for them and nothing written."""
        inputs.memory.zero_()
        inputs.attention.slot_mapping.fill_(-1)
        inputs.state_rows.fill_(self._trash)

    def take(self, inputs: StepInputs) -> None:
        """Fill token ids and block tables from what was sent and what the device holds."""
        take_inputs(
            inputs.layout.view(inputs.memory, "token_ids"),
            inputs.state_rows,
            inputs.attention.context_lens,
            self.last_tokens,
            self.tables,
            inputs.token_ids,
            inputs.attention.block_tables,
            self._block_size,
        )


class _PinnedRing:
    """Host memory that copies may still be reading while the next step is written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: list[tuple[Tensor, Ints]] = [self._make(0) for _ in range(RING)]
        self._copied: list[Any] = [None] * RING  # events
        self._at = 0

    def next(self, size: int) -> tuple[Tensor, Ints]:
        self._at = (self._at + 1) % RING
        wait(self._copied[self._at])  # long over, see RING
        if len(self._places[self._at][1]) < size:
            self._places[self._at] = self._make(2 * size)
        return self._places[self._at]

    def sent(self) -> None:
        self._copied[self._at] = mark(self._device)

    def _make(self, size: int) -> tuple[Tensor, Ints]:
        pinned = torch.zeros(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        numbers: Ints = pinned.numpy()
        return pinned, numbers

"""Any steps, sent and read back from device memory field by field, with no remains of others."""

from __future__ import annotations

import sys
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.pool import PagePool
from loraplex.adapters.weights import LoadedAdapter, LoadedModule
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.gpu.attention_plan import AttentionPlanner
from loraplex.engine.gpu.host_step import HostStep, HostSteps
from loraplex.engine.gpu.metadata import Metadata, StepInputs
from loraplex.engine.gpu.state_rows import StateRows
from loraplex.engine.gpu.step_layout import Layout, StepSizes
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.gpu.work import LoraWork

tiles_of = sys.modules["device_ops"].tiles_of
CPU = torch.device("cpu")
BLOCK, MAX_BLOCKS, MAX_SEQS = 4, 8, 6
RANKS = {"a": 8, "b": 40, "c": 16}
_numbers = count()


@pytest.fixture(scope="module")
def pool() -> PagePool:
    pool = PagePool(2, ((8, 8),) * 7, 1 << 20, torch.float32, CPU)
    for digest, rank in RANKS.items():
        module = LoadedModule(torch.ones(rank, 8), torch.ones(rank, 8), rank, 2.0)
        pool.install(digest, pool.build_image(LoadedAdapter(digest, rank, {(0, 0): module})))
    return pool


class Sender:
    """The parts of a runner up to the model, and what a step should look like."""

    def __init__(self, pool: PagePool, batch_invariant: bool = False) -> None:
        kv = PagedKVCache(2, 101, BLOCK, 1, 16, torch.float32, CPU)
        self.pool = pool
        self.batch_invariant = batch_invariant
        self.states = StateRows(MAX_SEQS)
        self.attention = AttentionPlanner(2, kv, CPU, batch_invariant=batch_invariant)
        self.steps = HostSteps(pool, self.states, self.attention, BLOCK, small_only=batch_invariant)
        self.metadata = Metadata(
            pool, max_num_tokens=256, max_num_seqs=MAX_SEQS, max_blocks=MAX_BLOCKS,
            block_size=BLOCK, device=CPU,
        )  # fmt: skip
        layout = self.layout(MAX_SEQS)
        memory = torch.full((layout.size + self.metadata.room_for_blocks,), -7, dtype=torch.int32)
        plan = self.attention.static(MAX_SEQS, BLOCK * MAX_BLOCKS)
        self.static = self.metadata.static(layout, memory, plan)

    def layout(self, rows: int) -> Layout:
        tiles = rows if self.batch_invariant else 0
        return Layout(
            StepSizes(
                tokens=rows, seqs=rows, small=rows, norm=rows, pages=99, small_entries=99,
                attention_tiles=tiles,
            )
        )  # fmt: skip

    def send(self, schedule: Schedule, *, static: bool = False) -> tuple[HostStep, StepInputs]:
        step = self.steps.build(schedule)
        inputs = self.static if static else self.metadata.fresh(step)
        self.metadata.send(step, inputs)
        self.metadata.take(inputs)
        return step, inputs

    def check(self, schedule: Schedule, step: HostStep, inputs: StepInputs) -> None:
        attention, row = inputs.attention, 0
        for i, s in enumerate(schedule.scheduled):
            state = self.states.take(s.seq.seq_id)
            assert state == (int(inputs.state_rows[i]), False)
            assert attention.query_start[i] == row
            assert attention.context_lens[i] == s.start + s.num_tokens
            blocks = s.seq.block_table[: -(-(s.start + s.num_tokens) // BLOCK)]
            assert attention.block_tables[i, : len(blocks)].tolist() == blocks
            for position in range(s.start, s.start + s.num_tokens):
                held = int(self.metadata.last_tokens[state[0]])
                expected = held if s.feeds_back else s.seq.token_ids[position]
                assert inputs.token_ids[row] == expected
                assert attention.positions[row] == position
                slot = s.seq.block_table[position // BLOCK] * BLOCK + position % BLOCK
                assert attention.slot_mapping[row] == slot
                row += 1
        count = len(schedule.scheduled)
        assert (attention.query_start[count:] == row).all()
        assert (attention.context_lens[count:] == 0).all()
        assert (attention.slot_mapping[row:] == -1).all()
        assert (inputs.state_rows[count:] == self.states.trash).all()
        self._check_lora(schedule, inputs, row)
        self._check_attention(schedule, inputs, row)
        ends = [int(attention.query_start[i + 1]) - 1 for i in range(count)]
        samples = [end for end, s in zip(ends, schedule.scheduled, strict=True) if s.samples]
        assert [row for _, row, _ in step.sampling] == [
            self.states.take(s.seq.seq_id)[0] for s in schedule.scheduled if s.samples
        ]
        if step.decodes_only:
            assert samples == list(range(count))
        elif samples:
            assert inputs.sample_rows is not None
            assert inputs.sample_rows.tolist() == samples

    def _check_lora(self, schedule: Schedule, inputs: StepInputs, num_rows: int) -> None:
        work = inputs.lora.plan
        assert isinstance(work, LoraWork)
        uses = [
            next(uses for first, uses in reversed(s.seq.spans) if first <= position)
            for s in schedule.scheduled
            for position in range(s.start, s.start + s.num_tokens)
        ]
        wanted = [
            [(page, use.weight) for use in of_row for page in self.pool.pages(use.digest)]
            for of_row in uses
        ]
        small, norm, large = map(tiles_of, (work.small, work.norm, work.large))
        entries: dict[str, set[int]] = {"small": set(), "large": set()}
        found: dict[int, Any] = {}
        for family, tiles in (("small", small), ("large", large)):
            for first, rows, page, pages, entry, *_ in tiles:
                assert rows <= (16 if family == "small" else 64)
                ids = work.page_ids[page : page + pages].tolist()
                weights = work.page_weights[page : page + pages].tolist()
                for r in range(first, first + rows):
                    assert r not in found, "a row in two tiles"
                    found[r] = list(zip(ids, weights, strict=True))
                mine = set(range(entry, entry + rows * pages))
                assert not mine & entries[family], "T entries shared"
                entries[family] |= mine
        assert [found.get(r) for r in range(num_rows)] == wanted
        assert len(found) == num_rows, "padding rows have tiles"
        assert max(entries["small"], default=-1) < work.small_entries
        assert max(entries["large"], default=-1) < work.large_entries

        def rows_of(tiles: list[list[int]]) -> list[tuple[int, int]]:
            return sorted(
                (t[0] + i, t[4] + i * t[3] if t[3] else -1) for t in tiles for i in range(t[1])
            )

        assert rows_of(norm) == rows_of(small), "the norm tiles are the small rows, cut finer"
        if self.batch_invariant:
            assert not large

    def _check_attention(self, schedule: Schedule, inputs: StepInputs, num_rows: int) -> None:
        work: Any = inputs.attention.plan
        assert work.num_splits >= 1
        tiled: list[int] = []
        if work.prefill_tiles is not None:
            assert work.prefill_capacity == len(work.prefill_tiles)
            for first, queries, position, seq in work.prefill_tiles[: int(work.prefill_count)]:
                rows = range(int(first), int(first + queries))
                assert inputs.attention.positions[rows[0]] == position
                assert all(
                    inputs.attention.query_start[seq] <= r < inputs.attention.query_start[seq + 1]
                    for r in rows
                )
                tiled += rows
        done = 0 if self.batch_invariant else schedule.num_decodes
        assert sorted(tiled) == list(range(done, num_rows))


def make_sequence(
    num_tokens: int, uses: list[tuple[str, float]], starts: dict[str, int] | None = None
) -> Sequence:
    """starts: of activated LoRAs among the adapters, where in the prompt they begin."""
    number = next(_numbers)
    request = GenerationRequest(
        request_id=str(number),
        prompt_token_ids=[100 * number + i for i in range(num_tokens)],
        sampling=SamplingParams(),
        adapters=tuple(AdapterUse(digest, weight) for digest, weight in uses),
    )
    seq = Sequence.from_request(
        request, seq_id=number, arrival_time=0.0, max_model_len=BLOCK * MAX_BLOCKS,
        eos_token_ids=frozenset(), seed=0,
        invocations={d: (100 * number + start,) for d, start in (starts or {}).items()},
    )  # fmt: skip
    seq.block_table = [(number * 7 + 3 * i) % 101 for i in range(-(-num_tokens // BLOCK))]
    return seq


def make_schedule(items: list[tuple[Sequence, int, int]], released: list[int]) -> Schedule:
    """(sequence, start, tokens)."""
    scheduled = [
        ScheduledSequence(s, start, n, start + n == s.num_tokens, start >= len(s.token_ids))
        for s, start, n in items
    ]
    scheduled.sort(key=lambda s: (not s.is_decode, s.seq.composition, s.seq.seq_id))
    return Schedule(
        scheduled,
        sum(s.is_decode for s in scheduled),
        sum(s.num_tokens for s in scheduled),
        released,
    )


compositions = st.lists(
    st.tuples(st.sampled_from(sorted(RANKS)), st.sampled_from([1.0, 0.5, -2.0])),
    max_size=2,
    unique_by=lambda use: use[0],
)


starts = st.dictionaries(st.sampled_from(sorted(RANKS)), st.integers(0, 30), max_size=2)


@settings(max_examples=30, deadline=None)
@given(
    lives=st.lists(
        st.tuples(
            st.integers(1, 29), st.lists(st.integers(1, 20), max_size=4), compositions, starts
        ),
        min_size=1,
        max_size=MAX_SEQS,
    ),
    batch_invariant=st.booleans(),
)
def test_sequences_live_through_steps(lives: Any, batch_invariant: bool, pool: PagePool) -> None:
    """Each prefills in chunks of its own, then decodes tokens that only the device knows."""
    sender = Sender(pool, batch_invariant)
    sequences = [(make_sequence(n, uses, begin), [*chunks]) for n, chunks, uses, begin in lives]
    sender.metadata.last_tokens.random_(0, 1 << 40)
    for _ in range(5):
        items = []
        for seq, chunks in sequences:
            left = seq.num_tokens - seq.num_computed_tokens
            num = min(left, chunks.pop(0)) if chunks else left
            items.append((seq, seq.num_computed_tokens, num))
        schedule = make_schedule(items, [])
        decodes_only = schedule.num_decodes == len(schedule.scheduled)
        for static in {False, decodes_only}:
            sender.check(schedule, *sender.send(schedule, static=static))
        for s in schedule.scheduled:
            s.seq.num_computed_tokens += s.num_tokens
            if s.samples:
                if s.feeds_back:
                    s.seq.token_ids.append(5)
                    s.seq.num_pending -= 1
                s.seq.num_pending += 1
                if s.seq.num_tokens > len(s.seq.block_table) * BLOCK:
                    s.seq.block_table.append(90 + len(s.seq.block_table))
        if any(seq.num_tokens > BLOCK * MAX_BLOCKS for seq, _ in sequences):
            break


def test_only_appended_blocks_are_sent(pool: PagePool) -> None:
    sender, seq = Sender(pool), make_sequence(9, [])
    step, _ = sender.send(make_schedule([(seq, 0, 9)], []))
    assert step.block_values.tolist() == seq.block_table
    step, _ = sender.send(make_schedule([(seq, 8, 1)], []))
    assert len(step.block_runs) == len(step.block_values) == 0
    seq.block_table.append(77)
    schedule = make_schedule([(seq, 8, 1)], [])
    step, inputs = sender.send(schedule)
    assert step.block_values.tolist() == [77]
    sender.check(schedule, step, inputs)


def test_a_row_starts_anew_with_each_owner(pool: PagePool) -> None:
    sender, first, second = Sender(pool), make_sequence(20, []), make_sequence(7, [])
    sender.send(make_schedule([(first, 0, 20)], []))
    sender.states.release([first.seq_id])
    schedule = make_schedule([(second, 0, 7)], [])
    step, inputs = sender.send(schedule)
    assert step.block_values.tolist() == second.block_table
    sender.check(schedule, step, inputs)


def test_tiles_are_cut_again_only_when_rows_or_pages_change(pool: PagePool) -> None:
    sender = Sender(pool)
    a, b = make_sequence(5, [("a", 1.0)]), make_sequence(5, [("b", 1.0)])
    both = [(a, 4, 1), (b, 4, 1)]
    first, _ = sender.send(make_schedule(both, []))
    again, _ = sender.send(make_schedule(both, []))
    assert again.values["small"] is first.values["small"]
    alone, _ = sender.send(make_schedule([(a, 4, 1)], []))
    assert alone.values["small"] is not first.values["small"]
    module = LoadedModule(torch.ones(4, 8), torch.ones(4, 8), 4, 1.0)
    pool.install("new", pool.build_image(LoadedAdapter("new", 4, {(0, 0): module})))
    after, _ = sender.send(make_schedule([(a, 4, 1)], []))
    assert after.values["small"] is not alone.values["small"]
    pool.remove("new")


def test_a_field_too_small_is_our_bug() -> None:
    layout = Layout(StepSizes(tokens=2, seqs=2))
    array = torch.zeros(layout.size, dtype=torch.int32).numpy()
    with pytest.raises(ValueError, match="positions: 3 values do not fit a field of 2"):
        layout.write(array, {"positions": array[:3]}, {})

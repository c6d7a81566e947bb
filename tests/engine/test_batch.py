"""A schedule as tensors, read back token by token, with no remains of the steps before."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.pool import PagePool
from loraplex.adapters.weights import LoadedAdapter, LoadedModule
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.batch import BatchBuilder, StepBatch
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence

CPU = torch.device("cpu")
BLOCK = 4
MAX_BLOCKS = 8
RANKS = {"a": 8, "b": 40, "c": 16}
_numbers = count()


@pytest.fixture(scope="module")
def pool() -> PagePool:
    pool = PagePool(2, ((8, 8),) * 7, 1 << 20, torch.float32, CPU)
    for digest, rank in RANKS.items():
        install(pool, digest, rank)
    return pool


def install(pool: PagePool, digest: str, rank: int) -> None:
    module = LoadedModule(torch.ones(rank, 8), torch.ones(rank, 8), rank, 2.0)
    pool.install(digest, pool.build_image(LoadedAdapter(digest, rank, {(0, 0): module})))


def make_sequence(
    num_tokens: int, *adapters: tuple[str, float], starts: dict[str, int] | None = None
) -> Sequence:
    """starts: of activated LoRAs among the adapters, where in the prompt they begin."""
    number = next(_numbers)
    request = GenerationRequest(
        request_id=str(number),
        prompt_token_ids=[1000 * number + i for i in range(num_tokens)],
        sampling=SamplingParams(),
        adapters=tuple(AdapterUse(digest, weight) for digest, weight in adapters),
    )
    seq = Sequence.from_request(
        request,
        seq_id=number,
        arrival_time=0.0,
        max_model_len=BLOCK * MAX_BLOCKS,
        eos_token_ids=frozenset(),
        seed=0,
        invocations={d: (1000 * number + start,) for d, start in (starts or {}).items()},
    )
    blocks = -(-num_tokens // BLOCK)
    seq.block_table = [(number * 7 + 3 * i) % 101 for i in range(blocks)]
    return seq


def make_schedule(*items: tuple[Sequence, int]) -> Schedule:
    """(sequence, tokens of it that are computed already); all the rest is scheduled."""
    scheduled = [ScheduledSequence(s, start, s.num_tokens - start, True) for s, start in items]
    scheduled.sort(key=lambda s: (not s.is_decode, s.seq.digests))
    return Schedule(
        scheduled,
        sum(s.is_decode for s in scheduled),
        sum(s.num_tokens for s in scheduled),
        [],
    )


def builder(pool: PagePool) -> BatchBuilder:
    return BatchBuilder(pool, BLOCK, 8, MAX_BLOCKS, CPU)


def applied(seq: Sequence, position: int) -> tuple[AdapterUse, ...]:
    return next(uses for first, uses in reversed(seq.spans) if first <= position)


def assert_right(batch: StepBatch, schedule: Schedule, pool: PagePool) -> None:
    attention, row = batch.attention, 0
    uses: list[tuple[AdapterUse, ...]] = []
    for i, s in enumerate(schedule.scheduled):
        assert attention.query_start[i] == attention.host_query_start[i] == row
        assert attention.context_lens[i] == s.start + s.num_tokens
        assert attention.host_context_lens[i] == s.start + s.num_tokens
        blocks = s.seq.block_table
        padding = [0] * (attention.block_tables.shape[1] - len(blocks))
        assert attention.block_tables[i].tolist() == blocks + padding
        assert attention.host_block_tables[i] == blocks
        for position in range(s.start, s.start + s.num_tokens):
            assert batch.token_ids[row] == s.seq.token_ids[position]
            assert attention.positions[row] == position
            slot = blocks[position // BLOCK] * BLOCK + position % BLOCK
            assert attention.slot_mapping[row] == slot
            uses.append(applied(s.seq, position))
            row += 1
    assert attention.query_start[-1] == row == len(batch.token_ids)
    assert attention.seq_ids == [s.seq.seq_id for s in schedule.scheduled]
    assert attention.num_decodes == schedule.num_decodes
    assert attention.block_tables.is_contiguous()

    lora = batch.lora
    if lora is None:
        assert not any(uses)
        return
    assert lora.tiles.tolist() == [list(tile) for tile in lora.host_tiles]
    assert lora.page_ids.tolist() == lora.host_page_ids
    assert lora.page_weights.tolist() == lora.host_page_weights
    assert lora.max_pages == max(tile[3] for tile in lora.host_tiles)
    assert lora.tables.version == pool.version
    pages_of: list[list[tuple[int, float]]] = [[] for _ in range(row)]
    for first, rows, entry, entries in lora.host_tiles:
        for r in range(first, first + rows):
            assert not pages_of[r], "a row in two tiles"
            ids = lora.host_page_ids[entry : entry + entries]
            weights = lora.host_page_weights[entry : entry + entries]
            pages_of[r] = list(zip(ids, weights, strict=True))
    for r, adapters in enumerate(uses):
        expected = [(page, u.weight) for u in adapters for page in pool.pages(u.digest)]
        assert pages_of[r] == expected


compositions = st.lists(
    st.tuples(st.sampled_from(sorted(RANKS)), st.sampled_from([1.0, 0.5])),
    max_size=2,
    unique_by=lambda use: use[0],
)


# Of activated LoRAs: inside the prompt, inside a chunk of it, or past its end (not invoked).
starts = st.dictionaries(st.sampled_from(sorted(RANKS)), st.integers(0, 31), max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.lists(
            st.tuples(st.integers(1, 30), st.integers(0, 29), compositions, starts),
            min_size=1,
            max_size=8,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_steps_read_back(steps: list[Any], pool: PagePool) -> None:
    """Successive steps share the builder, whose rows then hold remains of other sequences."""
    batches = builder(pool)
    for items in steps:
        schedule = make_schedule(
            *[
                (make_sequence(n, *uses, starts=begin), min(start, n - 1))
                for n, start, uses, begin in items
            ]
        )
        assert_right(batches.build(schedule), schedule, pool)


def test_rows_before_an_activation_are_in_no_tile(pool: PagePool) -> None:
    seq = make_sequence(10, ("a", 1.0), starts={"a": 6})
    for computed, tiles in ((0, [(6, 4, 0, 1)]), (5, [(1, 4, 0, 1)]), (6, [(0, 4, 0, 1)])):
        lora = builder(pool).build(make_schedule((seq, computed))).lora
        assert lora is not None
        assert lora.host_tiles == tiles
    assert (
        builder(pool).build(Schedule([ScheduledSequence(seq, 0, 6, False)], 0, 6, [])).lora is None
    )


def test_a_decoding_batch_is_followed_as_it_grows(pool: PagePool) -> None:
    batches = builder(pool)
    sequences = [make_sequence(5, ("a", 1.0)), make_sequence(3, ("b", 1.0)), make_sequence(9)]
    for step in range(20):
        schedule = make_schedule(*[(seq, seq.num_tokens - 1) for seq in sequences])
        assert_right(batches.build(schedule), schedule, pool)
        for seq in sequences:
            seq.token_ids.append(step)
            if seq.num_tokens > len(seq.block_table) * BLOCK:
                seq.block_table.append(50 + step)


def test_a_block_replaced_in_place_is_seen(pool: PagePool) -> None:
    """Copy-on-write changes a table without changing its length."""
    batches, seq = builder(pool), make_sequence(10)
    batches.build(make_schedule((seq, 9)))
    seq.block_table[1] = 77
    schedule = make_schedule((seq, 9))
    assert_right(batches.build(schedule), schedule, pool)


def test_the_lora_part_is_shared_while_nothing_changes(pool: PagePool) -> None:
    batches, seq, base = builder(pool), make_sequence(5, ("a", 1.0)), make_sequence(5)
    first = batches.build(make_schedule((seq, 4), (base, 4))).lora
    seq.token_ids.append(1)
    assert batches.build(make_schedule((seq, 4), (base, 4))).lora is not first, "two rows now"
    first = batches.build(make_schedule((seq, 5), (base, 4))).lora
    assert batches.build(make_schedule((seq, 5), (base, 4))).lora is first
    assert batches.build(make_schedule((seq, 5))).lora is not first, "T counts"
    first = batches.build(make_schedule((seq, 5))).lora
    install(pool, "new", 8)
    second = batches.build(make_schedule((seq, 5))).lora
    assert second is not None
    assert second is not first
    assert second.tables.version == pool.version
    pool.remove("new")


def test_neighbours_of_one_composition_are_one_tile(pool: PagePool) -> None:
    sequences = [make_sequence(5, ("a", 1.0)) for _ in range(3)]
    lora = builder(pool).build(make_schedule(*[(seq, 4) for seq in sequences])).lora
    assert lora is not None
    assert lora.host_tiles == [(0, 3, 0, 1)]
    assert lora.adapted == frozenset({(0, 0)})

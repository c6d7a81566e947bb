"""KV blocks: what is counted, what is shared, what is forgotten, and in which order."""

from __future__ import annotations

import struct
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loraplex.engine import block_manager as module
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.prefix_hash import _activation_hash, _link, block_hashes, root_hash
from loraplex.engine.sequence import Sequence

SIZE = 4
NUMBERS = count()


INVOCATIONS = {"x": (5,), "y": (5,), "z": (2, 3)}  # of activated LoRAs


def sequence(tokens: list[int], adapters: dict[str, float] | None = None, **rest: Any) -> Sequence:
    uses = tuple(AdapterUse(digest, weight) for digest, weight in (adapters or {}).items())
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tokens,
        sampling=SamplingParams(),
        adapters=uses,
        **rest,
    )
    return Sequence.from_request(
        request,
        seq_id=next(NUMBERS),
        arrival_time=0.0,
        max_model_len=1000,
        eos_token_ids=frozenset(),
        seed=0,
        invocations=INVOCATIONS,
    )


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> None:
    """What a step does to a sequence."""
    end = seq.num_tokens if num_tokens is None else seq.num_computed_tokens + num_tokens
    blocks.publish(seq, end)
    seq.num_computed_tokens = end


def started(blocks: BlockManager, tokens: list[int], **rest: Any) -> Sequence:
    seq = sequence(tokens, **rest)
    assert blocks.allocate(seq)
    return seq


def test_blocks_are_counted_and_come_lowest_first() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = started(blocks, [1] * 5), started(blocks, [2] * 9)
    assert (first.block_table, second.block_table) == ([0, 1], [2, 3, 4])
    assert (blocks.num_used_blocks, blocks.num_available_blocks) == (5, 3)
    blocks.free(first)
    assert started(blocks, [3] * 12).block_table == [0, 1, 5]


def test_allocation_is_all_or_nothing() -> None:
    blocks = BlockManager(3, SIZE)
    seq = sequence([1] * 12)
    assert not blocks.allocate(seq, keep_available=1)
    assert (seq.block_table, blocks.num_available_blocks) == ([], 3)
    assert blocks.allocate(seq)
    assert not blocks.grow(seq, 13)
    assert len(seq.block_table) == 3


def test_a_prefix_is_shared_and_counted() -> None:
    blocks = BlockManager(8, SIZE)
    first = started(blocks, [*range(10)])
    compute(blocks, first)
    second = started(blocks, [*range(8), 77, 78])
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_computed_tokens == 8
    assert (blocks.num_queried_tokens, blocks.num_hit_tokens) == (20, 8)
    blocks.free(first)
    blocks.check_invariants([second])


def test_the_last_token_is_always_left_to_compute() -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, started(blocks, [*range(8)]))
    assert started(blocks, [*range(8)]).num_computed_tokens == 4


def test_freed_contents_stay_findable_until_their_block_is_needed() -> None:
    blocks = BlockManager(4, SIZE)
    first = started(blocks, [*range(12)])
    compute(blocks, first)
    blocks.free(first)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks) == (0, 3)
    other = started(blocks, [9] * 8)  # takes the free block, then the tail of the chain
    assert set(other.block_table) == {3, 2}
    again = started(blocks, [*range(8)])
    assert again.num_computed_tokens == 4
    assert again.block_table[0] == 0


def test_a_block_is_found_once_its_last_token_is_known() -> None:
    """A pending token runs before anyone knows it: its block is computed first, named later."""
    blocks = BlockManager(8, SIZE)
    first = started(blocks, [1, 2, 3])
    compute(blocks, first)
    first.num_pending = 1
    compute(blocks, first)
    assert first.num_computed_tokens == 4
    other = started(blocks, [1, 2, 3, 4, 5])
    assert other.num_computed_tokens == 0
    blocks.free(other)
    first.num_pending = 0
    first.token_ids.append(4)
    blocks.publish(first, first.num_computed_tokens)
    assert started(blocks, [1, 2, 3, 4, 5]).num_computed_tokens == 4
    assert started(blocks, [1, 2, 3, 5, 5]).num_computed_tokens == 0


def test_a_partly_filled_block_is_never_shared() -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, started(blocks, [*range(7)]))
    assert started(blocks, [*range(7)]).num_computed_tokens == 4


@pytest.mark.parametrize(
    "other",
    [
        {"adapters": {"a": 1.0}},
        {"adapters": {"a": 0.5, "b": 2.0}},
        {"adapters": {"a": 0.5, "b": 1.0}, "cache_salt": "s"},
        {"adapters": {"ab": 0.5}},
        {},
    ],
)
def test_only_the_same_composition_and_salt_hit(other: dict[str, Any]) -> None:
    blocks = BlockManager(16, SIZE)
    compute(blocks, started(blocks, [*range(9)], adapters={"a": 0.5, "b": 1.0}))
    assert started(blocks, [*range(9)], **other).num_computed_tokens == 0
    same = started(blocks, [*range(9)], adapters={"b": 1.0, "c": 0.0, "a": 0.5})
    assert same.num_computed_tokens == 8


def test_root_hash_fields_cannot_run_into_each_other() -> None:
    roots = [
        root_hash((), ""),
        root_hash((), "a"),
        root_hash((AdapterUse("a"),), ""),
        root_hash((AdapterUse("a"), AdapterUse("b")), ""),
        root_hash((AdapterUse("ab"),), ""),
        root_hash((AdapterUse("a", 2.0),), ""),
    ]
    assert len(set(roots)) == len(roots)


def hits(first: list[int], second: list[int], one: Any, other: Any) -> int:
    """Tokens of the second sequence that the first computed."""
    blocks = BlockManager(16, SIZE)
    compute(blocks, started(blocks, first, adapters=one))
    return started(blocks, second, adapters=other).num_computed_tokens


X, Y, XY = {"x": 1.0}, {"y": 1.0}, {"x": 1.0, "y": 1.0}


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ({}, X, 8),  # the blocks before the one in which x begins
        (X, {}, 8),
        (X, Y, 8),
        (X, X, 16),
        (XY, XY, 16),
        (XY, X, 8),
        (X, {"x": 0.5}, 8),
        ({"a": 1.0}, {"a": 1.0, "x": 1.0}, 8),
        ({"a": 1.0}, X, 0),
        (X, {"z": 1.0}, 0),  # z begins in the first block
    ],
)
def test_k_v_before_an_activation_is_shared(
    one: dict[str, float], other: dict[str, float], shared: int
) -> None:
    tokens = [1, 1, 1, 1, 1, 1, 1, 1, 1, 5, *[1] * 7]
    if "z" in other:
        tokens[1:3] = 2, 3
    assert hits(tokens, tokens, one, other) == shared


def test_what_a_moved_activation_left_behind_is_not_found() -> None:
    """A chat goes on: what ran with x after its old place is history, the base model's, by now."""
    old = [1, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1, 1]
    assert hits(old, [*old, 1], X, X) == 12, "the activation stays where it was"
    assert hits(old, [*old, 5, 1, 1, 1, 1], X, X) == 4
    assert hits([*old, 1], [*old, 5, 1, 1, 1, 1], {}, X) == 12


def test_the_place_in_the_block_counts() -> None:
    """Equal tokens in the block, but the activation begins at another of them."""
    INVOCATIONS["late"], INVOCATIONS["early"] = (5, 1), (5, 5)
    tokens = [1, 1, 1, 1, 5, 5, 1, 1, 1]
    begin = {name: sequence(tokens, {name: 1.0}).spans[1][0] for name in ("late", "early")}
    assert begin == {"late": 5, "early": 4}
    one, two = (block_hashes(sequence(tokens, {name: 1.0}), 2, SIZE) for name in ("late", "early"))
    INVOCATIONS["late"] = INVOCATIONS.pop("early")  # the same adapter, had it begun earlier
    three = block_hashes(sequence(tokens, {"late": 1.0}), 2, SIZE)
    del INVOCATIONS["late"]
    assert one[0] == two[0] == three[0]
    assert len({one[1], two[1], three[1]}) == 3


def test_an_activation_cannot_be_forged_by_tokens() -> None:
    """The link of an activation and a block of chosen tokens may be the same bytes to hash."""
    digest = "x" * 8
    linked = _activation_hash(b"p" * 16, (AdapterUse(digest),), 0)
    packed = struct.pack("<qqd", 0, len(digest), 1.0) + digest.encode()
    tokens = struct.unpack("<4q", packed)
    assert struct.pack("<4q", *tokens) == packed
    assert _link(b"p" * 16 + packed) != linked


def test_a_hash_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "block_hashes", lambda seq, n, size: [b"same"] * n)
    blocks = BlockManager(8, SIZE)
    compute(blocks, started(blocks, [1] * 5))
    assert started(blocks, [2] * 5).num_computed_tokens == 0
    assert started(blocks, [1] * 5).num_computed_tokens == 4


def test_reset_forgets_contents_and_keeps_holders() -> None:
    blocks = BlockManager(8, SIZE)
    running, gone = started(blocks, [1] * 9), started(blocks, [2] * 9)
    for seq in (running, gone):
        compute(blocks, seq)
    blocks.free(gone)
    blocks.reset_prefix_cache()
    assert (blocks.num_cached_blocks, blocks.num_used_blocks) == (0, 3)
    for tokens in ([1] * 9, [2] * 9):
        seq = started(blocks, tokens)
        assert seq.num_computed_tokens == 0
        blocks.free(seq)
    blocks.check_invariants([running])


class BlockMachine(RuleBasedStateMachine):
    """Sequences with few distinct prefixes on few blocks, against a memory of what each block
    holds.
    """

    @initialize(units=st.integers(1, 6), unit=st.sampled_from([1, 3, 8]), cache=st.booleans())
    def build(self, units: int, unit: int, cache: bool) -> None:
        """Superblocks that close, go and come; which of them is not the block manager's choice."""
        self.blocks = BlockManager(
            units * unit,
            SIZE,
            enable_prefix_cache=cache,
            max_blocks=(units + 2) * unit,
            blocks_per_superblock=unit,
        )
        self.live: list[Sequence] = []
        self.contents: dict[int, object] = {}  # slot -> what was computed into it

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // SIZE] * SIZE + position % SIZE

    def expected(self, seq: Sequence, position: int) -> object:
        """What an entry of the KV cache depends on: tokens so far, and what applied to each."""
        applied = tuple(
            next(uses for first, uses in reversed(seq.spans) if first <= earlier)
            for earlier in range(position + 1)
        )
        return (applied, seq.request.cache_salt, tuple(seq.token_ids[: position + 1]))

    @rule(
        stem=st.integers(0, 1),
        length=st.integers(1, 20),
        adapters=st.sampled_from(
            [{}, {"a": 1.0}, {"a": 0.5}, {"a": 1.0, "b": 1.0}, X, XY, {"a": 1.0, "z": 1.0}]
        ),
        cache_salt=st.sampled_from(["", "", "s"]),
        keep_available=st.integers(0, 2),
    )
    def add(self, stem: int, length: int, keep_available: int, **rest: Any) -> None:
        seq = sequence([stem, *range(length - 1)], **rest)
        before = self.blocks.num_available_blocks
        if self.blocks.allocate(seq, keep_available=keep_available):
            self.live.append(seq)
            assert self.blocks.num_available_blocks >= keep_available
            assert seq.num_computed_tokens < seq.num_tokens
        else:
            assert self.blocks.num_available_blocks == before

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def run(self, data: st.DataObject) -> None:
        """Compute some tokens; at the end of the sequence, append one, at once or after it ran."""
        seq = data.draw(st.sampled_from(self.live))
        if seq.num_uncomputed_tokens == 0:
            if not self.blocks.grow(seq, seq.num_tokens + 1):
                return
            seq.num_pending = 1
            if data.draw(st.booleans()):
                self.learn(seq, data)
        end = seq.num_computed_tokens + data.draw(st.integers(1, seq.num_uncomputed_tokens))
        self.blocks.publish(seq, end)
        for position in range(seq.num_computed_tokens, end):
            slot = self.slot(seq, position)
            holders = [s for s in self.live if slot // SIZE in s.block_table]
            assert holders == [seq], "a shared block is written"
            if position < len(seq.token_ids):
                self.contents[slot] = self.expected(seq, position)
        seq.num_computed_tokens = end
        if seq.num_pending:
            assert seq.num_uncomputed_tokens == 0
            self.learn(seq, data)
            self.contents[self.slot(seq, end - 1)] = self.expected(seq, end - 1)

    def learn(self, seq: Sequence, data: st.DataObject) -> None:
        seq.num_pending = 0
        seq.token_ids.append(data.draw(st.integers(0, 1)))
        self.blocks.publish(seq, seq.num_computed_tokens)

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def free(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        self.blocks.free(seq)

    @rule(data=st.data())
    @precondition(lambda self: self.blocks.unused.owned - self.blocks.unused.closed)
    def close(self, data: st.DataObject) -> None:
        open_ones = self.blocks.unused.owned - self.blocks.unused.closed
        self.blocks.close(data.draw(st.sampled_from(sorted(open_ones))))

    @rule(data=st.data(), leaves=st.booleans())
    @precondition(lambda self: self.blocks.unused.closed)
    def reopen(self, data: st.DataObject, leaves: bool) -> None:
        unused = self.blocks.unused
        superblock = data.draw(st.sampled_from(sorted(unused.closed)))
        if leaves and not unused.used[superblock] and len(unused.owned) > 1:
            unused.remove(superblock)
        else:
            unused.reopen(superblock)

    @rule()
    def come_back(self) -> None:
        unused = self.blocks.unused
        for superblock in range(len(unused.used)):
            if superblock not in unused.owned:
                unused.add(superblock)
                return

    @rule()
    def reset(self) -> None:
        self.blocks.reset_prefix_cache()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "blocks"):
            blocks = self.blocks
            blocks.check_invariants(self.live)
            withdrawn = len(list(blocks.unused.withdrawn()))
            counted = blocks.num_used_blocks + blocks.num_available_blocks + withdrawn
            assert counted == blocks.num_blocks

    @invariant()
    def every_computed_token_is_still_where_the_table_says(self) -> None:
        for seq in getattr(self, "live", []):
            for position in range(seq.num_computed_tokens):
                assert self.contents[self.slot(seq, position)] == self.expected(seq, position)

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for seq in self.live:
                self.blocks.free(seq)
            assert self.blocks.num_used_blocks == 0


def test_any_order_of_operations() -> None:
    run_state_machine_as_test(
        BlockMachine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None)
    )

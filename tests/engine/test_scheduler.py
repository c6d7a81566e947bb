"""What runs in a step: order, budget, blocks, preemption. Adapters are a set that a test fills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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

from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.errors import InvalidRequest, QueueFull
from loraplex.engine.in_flight import InFlight
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.seams import Schedule
from loraplex.engine.sequence import Sequence, WaitingReason

SIZE = 4


class FakeResidency:
    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.wants: set[int] = set()
        self.running: Counter[str] = Counter()

    def want(self, rank: int, digests: Iterable[str]) -> None:
        assert rank not in self.wants
        self.wants.add(rank)

    def unwant(self, rank: int) -> None:
        self.wants.remove(rank)

    def is_ready(self, digests: Iterable[str]) -> bool:
        return self.ready.issuperset(digests)

    def waits_for_room(self, digests: Iterable[str]) -> bool:
        return False

    def acquire(self, digests: Iterable[str]) -> None:
        self.running.update(digests)

    def release(self, digests: Iterable[str]) -> None:
        self.running.subtract(digests)


class Bench:
    def __init__(
        self, num_blocks: int = 64, seqs: int = 8, tokens: int = 32, waiting: int = 100
    ) -> None:
        self.slots = FakeResidency()
        self.blocks = BlockManager(num_blocks, SIZE)
        self.scheduler = Scheduler(
            self.blocks,
            self.slots,
            InFlight(self.slots.release),
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_num_waiting=waiting,
        )
        self.numbers = count()

    def add(
        self,
        num_tokens: int,
        *,
        adapter: str = "",
        priority: int = 0,
        stem: int | None = None,
        tenant: str = "",
        share: float = 1.0,
    ) -> Sequence:
        number = next(self.numbers)
        request = GenerationRequest(
            request_id=str(number),
            prompt_token_ids=[number if stem is None else stem] * num_tokens,
            sampling=SamplingParams(),
            adapters=(AdapterUse(adapter),) if adapter else (),
            priority=priority,
            tenant=tenant,
            share=share,
        )
        seq = Sequence.from_request(
            request,
            seq_id=number,
            arrival_time=0.0,
            max_model_len=self.blocks.num_blocks * SIZE,
            eos_token_ids=frozenset(),
            seed=0,
        )
        self.scheduler.check(num_tokens)
        self.scheduler.add(seq)
        return seq

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        self.scheduler.check_invariants()
        self.scheduler.advance(schedule)
        for item in schedule.scheduled:
            if item.samples:
                self.scheduler.settle(item.seq, 0)
        return schedule

    def shares(self) -> dict[int, int]:
        """Tokens of each sequence in the next step."""
        return {item.seq.seq_id: item.num_tokens for item in self.step().scheduled}


@pytest.mark.parametrize("share", [0.25, 1.0, 4.0])
def test_seats_are_yielded_until_shares_have_alike(share: float) -> None:
    """Equal shares of any size: what counts is two seats, not two seats of share 1."""
    bench = Bench(seqs=4)
    for _ in range(6):
        bench.add(2, tenant="crowd", share=share)
    bench.step()
    few = [bench.add(2, tenant="few", share=share) for _ in range(6)]
    for _ in range(6):
        bench.step()
    running = Counter(seq.request.tenant for seq in bench.scheduler.running)
    assert running == {"crowd": 2, "few": 2}
    assert bench.scheduler.num_preemptions == 2
    assert [seq.status for seq in few[:2]] == ["running"] * 2


def test_a_long_prompt_is_chunked_and_decodes_keep_their_token() -> None:
    bench = Bench(tokens=8)
    bench.add(3)
    bench.add(20)
    assert bench.shares() == {0: 3, 1: 5}
    assert bench.shares() == {0: 1, 1: 7}
    assert bench.shares() == {0: 1, 1: 7}
    assert bench.shares() == {0: 1, 1: 1}  # the last token of the prompt: it samples
    assert bench.shares() == {0: 1, 1: 1}


def test_a_younger_decode_is_not_starved_by_an_older_prefill() -> None:
    bench = Bench(tokens=8)
    bench.add(6)
    bench.add(2)
    bench.step()
    bench.add(40, priority=-1)
    assert bench.shares() == {0: 1, 1: 1, 2: 6}
    assert bench.shares() == {0: 1, 1: 1, 2: 6}


def test_one_without_adapter_is_passed_over_but_keeps_its_place() -> None:
    bench = Bench(seqs=2)
    blocked = bench.add(2, adapter="a")
    bench.add(2)
    assert bench.shares() == {1: 2}
    assert bench.scheduler.waiting_reason(blocked) is WaitingReason.ADAPTER_LOADING
    bench.add(2)
    bench.slots.ready.add("a")
    assert bench.shares() == {0: 2, 1: 1}
    assert bench.slots.running == {"a": 1}
    assert bench.slots.wants == {2}
    assert bench.scheduler.waiting_reason(bench.scheduler.waiting[0]) is WaitingReason.QUOTA


def test_one_without_blocks_blocks_those_behind() -> None:
    bench = Bench(num_blocks=8)
    bench.add(16)
    bench.step()
    large, _ = bench.add(20), bench.add(1)
    assert bench.shares() == {0: 1}
    assert bench.scheduler.waiting_reason(large) is WaitingReason.KV


def test_the_last_in_order_is_preempted_and_released() -> None:
    bench = Bench(num_blocks=4)
    bench.slots.ready.add("a")
    old, young = bench.add(4), bench.add(4, adapter="a")
    bench.step()
    schedules = [bench.step() for _ in range(4)]
    assert old.num_tokens == 9
    schedules.append(bench.step())  # the old one needs a third block; none is left
    assert [item.seq for item in schedules[-1].scheduled] == [old]
    assert schedules[-1].released_seq_ids == [young.seq_id]
    assert (young.num_preemptions, young.block_table, young.num_computed_tokens) == (1, [], 0)
    assert bench.slots.running == {"a": 0}
    bench.scheduler.remove(old)
    # Recomputed from the prefix cache on: its first blocks are still there.
    (item,) = bench.step().scheduled
    assert item.seq is young
    assert item.start > 0
    assert item.samples


def test_the_token_reserved_for_a_decode_is_spent_when_it_is_preempted() -> None:
    bench = Bench(num_blocks=13, tokens=8)
    bench.add(2), bench.add(2), bench.add(2, priority=1)
    for _ in range(6):
        bench.step()
    bench.add(24)  # leaves one block, and in three steps each of the others needs one
    assert bench.shares() == {0: 1, 1: 1, 2: 1, 3: 5}
    assert bench.shares() == {0: 1, 1: 1, 3: 6}


def test_priority_then_arrival_decide_who_is_preempted() -> None:
    bench = Bench(num_blocks=4)
    unimportant, important = bench.add(4, priority=1), bench.add(4)
    while not (unimportant.num_preemptions or important.num_preemptions):
        bench.step()
    assert unimportant.num_preemptions == 1


def test_released_ids_are_not_lost_when_nothing_runs() -> None:
    bench = Bench()
    seq = bench.add(3)
    bench.step()
    bench.scheduler.remove(seq)
    assert not bench.scheduler.schedule().scheduled
    bench.add(3)
    assert bench.step().released_seq_ids == [seq.seq_id]


def test_what_can_never_run_is_refused() -> None:
    bench = Bench(num_blocks=2, waiting=1)
    with pytest.raises(InvalidRequest, match="KV cache of 8 tokens"):
        bench.scheduler.check(8)
    bench.add(7)
    with pytest.raises(QueueFull, match="1 requests wait already"):
        bench.scheduler.check(1)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 16), seqs=st.integers(1, 5), extra_tokens=st.integers(0, 12)
    )
    def build(self, num_blocks: int, seqs: int, extra_tokens: int) -> None:
        self.bench = Bench(num_blocks, seqs, seqs + extra_tokens)
        self.max_tokens = seqs + extra_tokens
        self.target: dict[Sequence, int] = {}

    @rule(
        num_tokens=st.integers(1, 24),
        num_output=st.integers(1, 10),
        adapter=st.sampled_from(["", "", "a", "b"]),
        priority=st.sampled_from([0, 0, 1]),
        stem=st.sampled_from([None, 7]),
    )
    def add(self, num_tokens: int, num_output: int, **rest: Any) -> None:
        capacity = self.bench.blocks.num_blocks * SIZE
        if num_tokens + num_output <= capacity:
            self.target[self.bench.add(num_tokens, **rest)] = num_tokens + num_output

    @rule(adapter=st.sampled_from("ab"))
    def adapter_moves(self, adapter: str) -> None:
        slots = self.bench.slots
        if adapter not in slots.ready:
            slots.ready.add(adapter)
        elif not slots.running[adapter]:
            slots.ready.remove(adapter)

    @rule(data=st.data())
    @precondition(lambda self: self.target)
    def cancel(self, data: st.DataObject) -> None:
        ordered = sorted(self.target, key=lambda seq: seq.seq_id)
        self.finish(data.draw(st.sampled_from(ordered)))

    def finish(self, seq: Sequence) -> None:
        del self.target[seq]
        self.bench.scheduler.remove(seq)

    @rule()
    def step(self) -> None:
        first = min(self.bench.scheduler.running, key=lambda seq: seq.order, default=None)
        schedule = self.bench.step()
        running = [item.seq for item in schedule.scheduled]
        assert first is None or first in running, "the first in order does not go on"
        assert schedule.num_tokens == sum(item.num_tokens for item in schedule.scheduled)
        assert schedule.num_tokens <= self.max_tokens
        decodes = [item.is_decode for item in schedule.scheduled]
        assert decodes == sorted(decodes, reverse=True)
        for item in schedule.scheduled:
            assert len(item.seq.block_table) * SIZE >= item.start + item.num_tokens
            if item.seq.num_tokens >= self.target[item.seq]:
                self.finish(item.seq)

    @invariant()
    def adapters_are_held_by_exactly_the_running(self) -> None:
        if hasattr(self, "bench"):
            scheduler, slots = self.bench.scheduler, self.bench.slots
            held = Counter(digest for seq in scheduler.running for digest in seq.digests)
            assert +slots.running == held
            assert slots.wants == {seq.order for seq in scheduler.waiting}

    def teardown(self) -> None:
        """With all adapters there, everything ends in bounded time: nobody starves."""
        if not hasattr(self, "bench"):
            return
        self.bench.slots.ready |= {"a", "b"}
        for _ in range(40 * len(self.target) + 1):
            self.step()
        assert not self.target
        assert self.bench.blocks.num_used_blocks == 0


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None)
    )

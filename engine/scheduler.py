"""Which sequences run in the next step, and how many tokens of each. No tensors, no clock.

A step spends `max_num_batched_tokens` so that every sequence's computed tokens catch up with its
tokens: decode, chunked prefill, prefix hits and recompute after preemption are one case
(Sarathi-Serve: 2403.02310).

Order is `Sequence.order` everywhere (`fair_order.py`). Running sequences go first, and each
decode among them is sure of its token; the rest of the budget goes to running prefills, then to
waiting sequences.

* A waiting sequence gets blocks for all its tokens at once when it is admitted, so only decodes
  can lack a block.
* If one does, the last sequence in order is preempted: it gives everything back and waits, to be
  recomputed. The first in order can thus always go on, and since no request may need more blocks
  than there are, all of them end. Nothing is admitted in such a step, and a few blocks stay
  unallocated at admission, against thrashing.
* Where all seats are taken, a tenant that has more than its share yields one to who has less.
* A waiting sequence whose adapters are not on the device, or whose grammar is not compiled, is
  passed over and blocks nobody. One that lacks blocks blocks all behind it, else a long prompt
  would wait forever behind short ones.

Steps may be in flight: a token that one of them samples is scheduled to run before it is known. Not
so with a grammar: which tokens may follow depends on it. Such a sequence sits out the step that is
launched while its token is in flight, and any step for which its mask is not ready; the others go
on.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain
from typing import Protocol

from loraplex.engine.block_manager import BlockManager
from loraplex.engine.errors import InvalidRequest, QueueFull
from loraplex.engine.in_flight import InFlight
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence, SequenceStatus, WaitingReason

_KEEP_AVAILABLE = 0.01  # of all blocks, not allocated by admissions while others run


class Residency(Protocol):
    """What the scheduler asks of `adapters.slots.AdapterSlots`."""

    def want(self, rank: int, digests: Iterable[str]) -> None: ...
    def unwant(self, rank: int) -> None: ...
    def is_ready(self, digests: Iterable[str]) -> bool: ...
    def waits_for_room(self, digests: Iterable[str]) -> bool: ...
    def acquire(self, digests: Iterable[str]) -> None: ...


class Scheduler:
    """Owns the waiting and running sets. Between `schedule` and `advance` nothing may be added or
    removed.

    in_flight: gives the adapters of sequences back that stop running.
    """

    def __init__(
        self,
        blocks: BlockManager,
        slots: Residency,
        in_flight: InFlight,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_waiting: int,
    ) -> None:
        self.running: list[Sequence] = []  # in order
        self.waiting: list[Sequence] = []  # in order
        self.num_preemptions = 0
        self._blocks = blocks
        self._slots = slots
        self._in_flight = in_flight
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_waiting = max_num_waiting
        self._waiting_tenants: Counter[str] = Counter()
        self._released_seq_ids: list[int] = []
        self._stopped_by = WaitingReason.QUOTA  # why the last schedule admitted no more

    # --- coming and going -----------------------------------------------------------------------

    def check(self, num_prompt_tokens: int) -> None:
        """Raises: QueueFull; InvalidRequest if the prompt can never be held."""
        if len(self.waiting) >= self._max_num_waiting:
            raise QueueFull(
                f"{len(self.waiting)} requests wait already, the limit (max_num_waiting); "
                "try again later"
            )
        capacity = self._blocks.min_blocks * self._blocks.block_size
        if num_prompt_tokens + 1 > capacity:
            raise InvalidRequest(
                f"the prompt has {num_prompt_tokens} tokens and with one output token exceeds the "
                f"KV cache of {capacity} tokens; shorten it or raise --kv-cache-memory",
                code="context_length_exceeded",
            )

    def add(self, seq: Sequence) -> None:
        """Queue it; its adapters begin to load. `check` was asked, and its adapters exist."""
        self._wait(seq)

    def remove(self, seq: Sequence) -> None:
        """It ended, wherever it was: its blocks are free at once, its adapters when no step in
        flight uses them.
        """
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq.status is SequenceStatus.WAITING:
            self._stop_waiting(seq)
            self._slots.unwant(seq.order)
        seq.status = SequenceStatus.FINISHED

    def requeue(self, seq: Sequence) -> None:
        """A running one gives everything back and waits, to be computed anew."""
        self.running.remove(seq)
        self._give_back(seq)
        seq.prompt_logprobs.clear()
        self._wait(seq)

    def waiting_reason(self, seq: Sequence) -> WaitingReason | None:
        if seq.status is not SequenceStatus.WAITING:
            return None
        if self._slots.is_ready(seq.digests):
            return WaitingReason.GRAMMAR if seq.lacks_mask else self._stopped_by
        if self._slots.waits_for_room(seq.digests):
            return WaitingReason.SLOT
        return WaitingReason.ADAPTER_LOADING

    # --- the step -------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Choose the next step and allocate for it. Empty when nothing can run now."""
        chosen: list[ScheduledSequence] = []
        first = self._yield_a_seat()
        budget, lacks_blocks = self._schedule_running(chosen, self._max_num_batched_tokens)
        if lacks_blocks:
            self._stopped_by = WaitingReason.KV
        else:
            budget = self._schedule_waiting(chosen, budget, first)
        chosen.sort(key=_batch_order)
        released = self._released_seq_ids
        if chosen:  # an empty schedule is not launched, so nobody would hear of them
            self._released_seq_ids = []
        return Schedule(
            scheduled=chosen,
            num_decodes=sum(item.is_decode for item in chosen),
            num_tokens=self._max_num_batched_tokens - budget,
            released_seq_ids=released,
        )

    def advance(self, schedule: Schedule) -> None:
        """The step was launched: for all that follow, its tokens are in the KV cache and what it
        samples is there.
        """
        for item in schedule.scheduled:
            item.seq.num_computed_tokens += item.num_tokens
            item.seq.num_pending += item.samples

    def settle(self, seq: Sequence, token_id: int) -> None:
        """The oldest pending token of a running sequence is known."""
        seq.num_pending -= 1
        seq.token_ids.append(token_id)
        self._blocks.publish(seq, seq.num_computed_tokens)

    def _schedule_running(self, chosen: list[ScheduledSequence], budget: int) -> tuple[int, bool]:
        """Returns the budget left and whether blocks ran out."""
        lacks_blocks = False
        num_decodes_to_come = sum(_decodes(seq) for seq in self.running)
        index = 0
        while index < len(self.running):  # which shrinks from its end
            seq = self.running[index]
            index += 1
            if seq.lacks_mask:
                continue
            if _decodes(seq):
                num_decodes_to_come -= 1
            num_tokens = min(seq.num_uncomputed_tokens, budget - num_decodes_to_come)
            if num_tokens <= 0:
                continue
            while not self._blocks.grow(seq, seq.num_computed_tokens + num_tokens):
                lacks_blocks = True
                victim = self.running[-1]
                if victim is seq:
                    break  # the last in order: it pauses and keeps what it has
                num_decodes_to_come -= _decodes(victim)
                self._preempt(victim)
            else:
                budget -= self._choose(chosen, seq, num_tokens)
        assert (
            chosen
            or not self.running
            or self._in_flight
            or any(seq.lacks_mask for seq in self.running)
        ), "running sequences cannot go on"
        return budget, lacks_blocks

    def _yield_a_seat(self) -> Sequence | None:
        """Where all seats are taken and somebody waits whose tenant has at least two fewer (for its
        share) than another, the other's last makes way. Returns who is to have the seat; at most
        one a step.

        What the last had computed stays findable, as far as blocks last, so coming back costs it
        little.
        """
        if len(self.running) < self._max_num_seqs or not self._waiting_tenants:
            return None
        seats = dict.fromkeys(self._waiting_tenants, 0.0)
        for seq in self.running:
            seats[seq.request.tenant] = seats.get(seq.request.tenant, 0.0) + 1 / seq.request.share
        crowd = max(seats, key=seats.__getitem__)
        if min(seats[tenant] for tenant in self._waiting_tenants) >= seats[crowd]:
            return None  # nobody has few, whatever its share
        for seq in self.waiting:
            has_few = seats[seq.request.tenant] + 2 / seq.request.share <= seats[crowd]
            if has_few and not seq.lacks_mask and self._slots.is_ready(seq.digests):
                if self._blocks.num_blocks_for(seq.num_tokens) > self._blocks.num_available_blocks:
                    return None  # a seat alone would not help it, and cost the other one
                self._preempt(next(s for s in reversed(self.running) if s.request.tenant == crowd))
                return seq
        return None

    def _schedule_waiting(
        self, chosen: list[ScheduledSequence], budget: int, first: Sequence | None
    ) -> int:
        """first: whom a seat was made free for."""
        self._stopped_by = WaitingReason.QUOTA
        ready: dict[tuple[str, ...], bool] = {}  # thousands may wait for the same few adapters
        admitted: list[Sequence] = []
        for seq in self.waiting if first is None else chain((first,), self.waiting):
            if budget <= 0 or len(self.running) >= self._max_num_seqs:
                break
            if seq.lacks_mask or seq.status is SequenceStatus.RUNNING:
                continue
            is_ready = ready.get(seq.digests)
            if is_ready is None:
                is_ready = ready[seq.digests] = self._slots.is_ready(seq.digests)
            if not is_ready:
                continue
            keep = max(1, int(self._blocks.num_blocks * _KEEP_AVAILABLE)) if self.running else 0
            if not self._blocks.allocate(seq, keep_available=keep):
                self._stopped_by = WaitingReason.KV
                break
            admitted.append(seq)
            self._run(seq)
            budget -= self._choose(chosen, seq, min(seq.num_uncomputed_tokens, budget))
        for seq in admitted:
            self._stop_waiting(seq)
        return budget

    def _choose(self, chosen: list[ScheduledSequence], seq: Sequence, num_tokens: int) -> int:
        start = seq.num_computed_tokens
        self._blocks.publish(seq, start + num_tokens)
        samples = start + num_tokens == seq.num_tokens and seq.request.pooling is None
        feeds_back = start >= len(seq.token_ids)
        chosen.append(ScheduledSequence(seq, start, num_tokens, samples, feeds_back))
        return num_tokens

    # --- changes of state -----------------------------------------------------------------------

    def _wait(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_order)
        self._waiting_tenants[seq.request.tenant] += 1
        self._slots.want(seq.order, seq.digests)

    def _stop_waiting(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self._waiting_tenants[seq.request.tenant] -= 1
        if not self._waiting_tenants[seq.request.tenant]:
            del self._waiting_tenants[seq.request.tenant]

    def _run(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=_order)
        self._slots.acquire(seq.digests)
        self._slots.unwant(seq.order)

    def _preempt(self, seq: Sequence) -> None:
        self.requeue(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def _give_back(self, seq: Sequence) -> None:
        self._blocks.free(seq)
        self._in_flight.drop(seq)
        seq.num_pending = 0
        self._released_seq_ids.append(seq.seq_id)

    def check_invariants(self) -> None:
        """Assert that sets, statuses, blocks and steps in flight agree. For tests and idle time."""
        for name, sequences, status in (
            ("running", self.running, SequenceStatus.RUNNING),
            ("waiting", self.waiting, SequenceStatus.WAITING),
        ):
            assert all(seq.status is status for seq in sequences), f"status of {name}"
            assert sequences == sorted(sequences, key=_order), f"order of {name}"
        assert len(self.running) <= self._max_num_seqs, "too many run"
        assert not any(seq.block_table for seq in self.waiting), "a waiting sequence holds blocks"
        assert not any(seq.num_pending for seq in self.waiting), "a waiting sequence has a pending"
        self._blocks.check_invariants(self.running)
        self._in_flight.check_invariants(self.running)


def _decodes(seq: Sequence) -> bool:
    """It can run one token now, of which it is sure."""
    return seq.num_uncomputed_tokens == 1 and not seq.lacks_mask


def _order(seq: Sequence) -> int:
    return seq.order


def _batch_order(item: ScheduledSequence) -> tuple[bool, Seq[tuple[str, float]], int]:
    return (not item.is_decode, item.seq.composition, item.seq.seq_id)

"""The steps that were launched and are not settled yet, and what has to wait for them. No torch.

    launch ----------------------- in flight ----------------------- settle
    tokens count as computed,                     the tokens are known: appended, published,
    who samples has a pending token               checked for an end, sent out

A sequence that leaves the running set meanwhile (ended, preempted) is *dropped* from the steps in
flight: what they sample for it goes nowhere, and after a preemption it is sampled again. What it
held:

* KV blocks are free at once. Steps take effect in the order of their launches, so whoever gets
  such a block writes and reads it after the steps in flight.
* Adapters are written by copies outside that order. They are released when every step has settled
  that was in flight when the sequence left.
* Memory that is taken from unused KV blocks is taken outside that order, too, and waits likewise.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class StepInFlight:
    schedule: Schedule
    handle: Any  # the runner's
    dropped: set[Sequence] = field(default_factory=set)
    leaving: list[str] = field(default_factory=list)  # digests to release when it settles
    then: list[Callable[[], None]] = field(default_factory=list)  # to call when it settles

    @property
    def live(self) -> Iterator[ScheduledSequence]:
        return (item for item in self.schedule.scheduled if item.seq not in self.dropped)


class InFlight:
    """release: gives adapters back, by digest."""

    def __init__(self, release: Callable[[Iterable[str]], None]) -> None:
        self._release = release
        self._steps: deque[StepInFlight] = deque()  # oldest first

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> StepInFlight:
        return self._steps[0]

    @property
    def sequences(self) -> list[Sequence]:
        """Each that a step still runs for, once."""
        return list(dict.fromkeys(item.seq for step in self._steps for item in step.live))

    def add(self, schedule: Schedule, handle: Any) -> None:
        self._steps.append(StepInFlight(schedule, handle))

    def settle_oldest(self) -> None:
        """It is over."""
        step = self._steps.popleft()
        self._release(step.leaving)
        for call in step.then:
            call()

    def when_settled(self, call: Callable[[], None]) -> None:
        """Call when every step that is in flight now has settled: now, if there is none."""
        if self._steps:
            self._steps[-1].then.append(call)
        else:
            call()

    def drop(self, seq: Sequence) -> None:
        """It left the running set."""
        for step in self._steps:
            step.dropped.add(seq)
        if self._steps:
            self._steps[-1].leaving += seq.digests
        else:
            self._release(seq.digests)

    @property
    def held(self) -> Counter[str]:
        """Adapters that only steps in flight still hold, with the number of holders."""
        return Counter(digest for step in self._steps for digest in step.leaving)

    def check_invariants(self, running: Iterable[Sequence]) -> None:
        """Assert that exactly the tokens that steps in flight sample are pending."""
        pending = Counter(item.seq for step in self._steps for item in step.live if item.samples)
        assert pending == Counter({seq: seq.num_pending for seq in running if seq.num_pending})
        assert set(self.sequences) <= set(running), "a step runs for a sequence that left"

"""Who goes first: every request gets a place, once, when it comes.

A *flow* is one adapter (or composition, or the base model) of one tenant. Each flow has a clock of
the work it was given, in virtual tokens: a prompt token counts one, an output token two, a load of
a page as much as `PAGE_COST`. A request's place is where its flow's clock stands, and moves that
clock on by the request's cost over its flow's weight. Flows that were idle begin at the clock of
whom is served now: nobody saves up. Lower places go first, everywhere: to be admitted, to have
adapters loaded, and, from the end, to be preempted.

    place = max(now served, flow's clock) + priority * PRIORITY_TOKENS
    flow's clock += cost * flows of its tenant / share of the tenant

So tenants share by their shares and a tenant's flows share alike, measured in tokens, and whoever
floods the server only gets behind itself. The counters are those of VTC ("Fairness in serving large
language models", OSDI 2024), taken when a request comes (start-time fair queueing, Goyal 1996)
rather than when one is picked: places do not change, so that loads, preemption and admission agree
on one order, and the first in it can always go on. What an output costs is not known then: each
flow expects what it had lately, and its clock is put right when a request ends.

Since places grow with the work that is served, a place is also an age: a priority is a head start
of so many virtual tokens, not a wall, and no request waits for ever.

Standard library only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

OUTPUT_COST = 2  # a decoded token against a prefilled one, as in VTC
PAGE_COST = 128  # loading one page: some two steps of 64 decodes
PRIORITY_TOKENS = 65_536  # the head start of one step of priority
EXPECTED_OUTPUT = 128  # tokens, of a flow that nothing is known of
MAX_IDLE_FLOWS = 4096
_LEARN = 0.25  # weight of the newest output in what a flow expects
_SEQ_BITS = 48  # below the virtual tokens: arrival, so that places differ

Flow = tuple[str, tuple[str, ...]]  # tenant, digests


@dataclass(slots=True)
class _Clock:
    virtual: float
    live: int = 0
    expected_output: float = EXPECTED_OUTPUT


@dataclass(frozen=True, slots=True)
class Place:
    """order: lower goes first; unique. start: virtual tokens."""

    order: int
    flow: Flow
    start: float
    cost: float  # as charged
    scale: float  # virtual tokens per token

    @classmethod
    def by_arrival(cls, seq_id: int, priority: int = 0) -> Place:
        """Of one that no flow knows of."""
        return cls(_order(priority * PRIORITY_TOKENS, seq_id), ("", ()), 0.0, 0.0, 0.0)


class FairOrder:
    def __init__(self) -> None:
        self.now = 0.0  # the latest start that was admitted
        self._flows: dict[Flow, _Clock] = {}
        self._live_flows: Counter[str] = Counter()  # by tenant

    def come(
        self,
        flow: Flow,
        seq_id: int,
        *,
        num_prompt_tokens: int,
        max_output_tokens: int,
        pages_to_load: int = 0,
        priority: int = 0,
        share: float = 1.0,
    ) -> Place:
        """The place of a request that came. It must `leave`."""
        clock = self._flows.get(flow)
        if clock is None:
            if len(self._flows) >= MAX_IDLE_FLOWS:
                self._forget_idle()
            clock = self._flows[flow] = _Clock(self.now)
        if clock.live == 0:
            self._live_flows[flow[0]] += 1
        clock.live += 1
        start = max(self.now, clock.virtual)
        output = min(clock.expected_output, max_output_tokens)
        cost = num_prompt_tokens + OUTPUT_COST * output + PAGE_COST * pages_to_load
        scale = self._live_flows[flow[0]] / share
        clock.virtual = start + cost * scale
        order = _order(int(start) + priority * PRIORITY_TOKENS, seq_id)
        return Place(order, flow, start, cost, scale)

    def serve(self, place: Place) -> None:
        """It was admitted."""
        self.now = max(self.now, place.start)

    def leave(self, place: Place, *, num_run_tokens: int, num_output_tokens: int) -> None:
        """It ended. num_run_tokens: of its prompt, not taken from the prefix cache."""
        clock = self._flows[place.flow]
        actual = num_run_tokens + OUTPUT_COST * num_output_tokens
        clock.virtual = max(place.start, clock.virtual + (actual - place.cost) * place.scale)
        if num_output_tokens:
            clock.expected_output += _LEARN * (num_output_tokens - clock.expected_output)
        clock.live -= 1
        if clock.live == 0:
            self._live_flows[place.flow[0]] -= 1
            if not self._live_flows[place.flow[0]]:
                del self._live_flows[place.flow[0]]

    def next_to(self, seq_id: int) -> int:
        """An order for somebody who is no request: as one that comes and is served now."""
        return _order(int(self.now), seq_id)

    def _forget_idle(self) -> None:
        """Of flows that nobody is in, the clocks say nothing once the others have passed them."""
        for flow, clock in list(self._flows.items()):
            if clock.live == 0 and clock.virtual <= self.now:
                del self._flows[flow]


def _order(tokens: int, seq_id: int) -> int:
    return (tokens << _SEQ_BITS) + seq_id

"""Places: who goes before whom. Arithmetic only; what comes of it is in test_simulation.py."""

from __future__ import annotations

import random
from collections import Counter

from loraplex.engine.fair_order import MAX_IDLE_FLOWS, OUTPUT_COST, PRIORITY_TOKENS, FairOrder, Flow

A: Flow = ("a", ("x",))
B: Flow = ("b", ("y",))


class Queue:
    """Requests that wait; the first in order is served whole, at once."""

    def __init__(self) -> None:
        self.order = FairOrder()
        self.waiting: dict[int, tuple[int, object]] = {}
        self.number = 0
        self.served: Counter[Flow] = Counter()  # tokens, as they count

    def add(self, flow: Flow, prompt: int = 100, output: int = 50, **more: float) -> int:
        self.number += 1
        place = self.order.come(
            flow, self.number, num_prompt_tokens=prompt, max_output_tokens=output, **more
        )
        self.waiting[place.order] = (self.number, place)
        self.sizes = {**getattr(self, "sizes", {}), self.number: (prompt, output)}
        return self.number

    def serve(self) -> int:
        number, place = self.waiting.pop(min(self.waiting))
        prompt, output = self.sizes[number]
        self.order.serve(place)
        self.order.leave(place, num_run_tokens=prompt, num_output_tokens=output)
        self.served[place.flow] += prompt + OUTPUT_COST * output
        return number


def test_one_flow_is_served_as_it_comes():
    queue = Queue()
    numbers = [queue.add(A, prompt=1 + i % 7, output=1 + i % 3) for i in range(50)]
    assert [queue.serve() for _ in numbers] == numbers


def test_who_floods_gets_behind_itself_only():
    queue = Queue()
    flood = [queue.add(A) for _ in range(30)]
    late = queue.add(B)
    assert queue.serve() == flood[0]
    assert queue.serve() == late
    assert queue.serve() == flood[1]


def test_backlogged_flows_share_alike_in_tokens_whatever_their_requests_look_like():
    """As far as outputs are what was expected; what they teach is another test's."""
    queue, chance = Queue(), random.Random(1)
    shapes = {A: (400, 20), B: (10, 60)}
    for flow, (prompt, output) in shapes.items():
        for _ in range(300):
            queue.add(flow, chance.randint(1, 2 * prompt), chance.randint(1, 2 * output))
    for _ in range(300):
        queue.serve()
    assert 0.9 < queue.served[A] / queue.served[B] < 1.1


def test_a_tenant_gains_nothing_by_more_adapters():
    queue = Queue()
    many: list[Flow] = [("a", (str(i),)) for i in range(10)]
    for _ in range(100):
        for flow in many:
            queue.add(flow)
        for _ in range(10):
            queue.add(B)
    for _ in range(600):
        queue.serve()
    tenants = Counter({"a": 0, "b": 0})
    for (tenant, _), tokens in queue.served.items():
        tenants[tenant] += tokens
    assert 0.85 < tenants["a"] / tenants["b"] < 1.15
    assert max(queue.served[f] for f in many) < 1.5 * min(queue.served[f] for f in many)


def test_shares_weigh():
    queue = Queue()
    for _ in range(400):
        queue.add(A, share=3.0)
        queue.add(B, share=1.0)
    for _ in range(400):
        queue.serve()
    assert 2.7 < queue.served[A] / queue.served[B] < 3.3


def test_nobody_saves_up_while_idle():
    queue = Queue()
    queue.add(B)
    for _ in range(100):
        queue.add(A)
        queue.serve()
    for _ in range(20):
        queue.add(A)
        queue.add(B)
    first = Counter(queue.serve() % 2 for _ in range(10))
    assert max(first.values()) <= 7, "an idle flow came back with a hundred requests' credit"


def test_a_priority_is_a_head_start_and_nobody_waits_for_ever():
    queue = Queue()
    patient = queue.add(A, priority=1)
    urgent = [queue.add(B) for _ in range(5)]
    assert [queue.serve() for _ in range(5)] == urgent
    served = 0
    while True:
        queue.add(B)
        if queue.serve() == patient:
            break
        served += 200
        assert served < 2 * PRIORITY_TOKENS, "it waits for ever"
    assert served > PRIORITY_TOKENS / 4, "the priority was worth nothing"


def test_clocks_are_put_right_by_what_outputs_cost():
    """Both expect the same; one's outputs are short. It must be served more often for it."""
    queue = Queue()
    counts: Counter[Flow] = Counter()
    for _ in range(400):
        for flow in (A, B):
            queue.number += 1
            place = queue.order.come(
                flow, queue.number, num_prompt_tokens=10, max_output_tokens=4096
            )
            queue.waiting[place.order] = (queue.number, place)
        _, place = queue.waiting.pop(min(queue.waiting))
        queue.order.serve(place)
        output = 20 if place.flow == A else 200
        queue.order.leave(place, num_run_tokens=10, num_output_tokens=output)
        counts[place.flow] += 1
    assert counts[A] > 2 * counts[B]


def test_flows_that_are_over_are_forgotten():
    order = FairOrder()
    for i in range(3 * MAX_IDLE_FLOWS):
        place = order.come(("t", (str(i),)), i, num_prompt_tokens=1, max_output_tokens=1)
        order.serve(place)
        order.leave(place, num_run_tokens=1, num_output_tokens=1)
        again = order.come(A, 10**6 + i, num_prompt_tokens=8, max_output_tokens=1)
        order.serve(again)
        order.leave(again, num_run_tokens=8, num_output_tokens=1)
    assert len(order._flows) <= MAX_IDLE_FLOWS + 1
    assert not order._live_flows

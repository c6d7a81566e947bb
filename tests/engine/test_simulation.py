"""The real scheduler on simulated time: who waits how long when somebody floods the server."""

from __future__ import annotations

from dataclasses import replace

from loraplex.engine.simulation import (
    Arrival,
    ArrivalOrder,
    Machine,
    percentile,
    power_law,
    simulate,
)


def flooded(duration_s: float = 60.0) -> tuple[list[Arrival], list[Arrival]]:
    quiet: list[Arrival] = []
    for i in range(4):
        trace = power_law(1, 0.4, duration_s, lengths=(32, 192), tenant=f"quiet-{i}", seed=i)
        quiet += [replace(arrival, adapter=1 + i) for arrival in trace]
    return quiet, power_law(1, 4.0, duration_s, lengths=(32, 192), tenant="loud", seed=9)


def test_others_hardly_notice_a_flood():
    quiet, loud = flooded()
    pages = [1] * 5
    alone = percentile([s.first_s for s in simulate(quiet, pages).served], 95)
    fair = simulate([*quiet, *loud], pages)
    plain = simulate([*quiet, *loud], pages, order=ArrivalOrder())

    def others(served: list) -> float:
        return percentile([s.first_s for s in served if s.arrival.tenant != "loud"], 95)

    assert others(fair.served) < 1.6 * alone
    assert others(plain.served) > 10 * alone, "there was no flood: nothing is shown"
    assert fair.tokens / fair.seconds > 0.95 * plain.tokens / plain.seconds
    assert len(fair.served) == len(quiet) + len(loud)
    assert fair.preemptions < 2 * len(quiet)


def test_one_tenant_alone_never_yields_a_seat():
    trace = power_law(4, 6.0, 30.0, lengths=(32, 128), seed=5)
    result = simulate(trace, [1] * 4, Machine(max_num_seqs=4))
    assert result.preemptions == 0
    assert len(result.served) == len(trace)


def test_many_adapters_on_little_room_all_get_their_turn():
    trace = power_law(40, 3.0, 60.0, alpha=0.5, lengths=(16, 64), seed=2)
    result = simulate(trace, [1] * 40, Machine(device_pages=8))
    assert len(result.served) == len(trace)
    assert result.loads > 40
    ends = [s.last_s for s in result.served]
    assert max(s.first_s for s in result.served) < 30, "somebody starves"
    assert percentile(ends, 99) < 40

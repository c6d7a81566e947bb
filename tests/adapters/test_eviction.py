"""Worth follows use, cost and size; on S-LoRA's traces it loads less than LRU."""

from __future__ import annotations

import pytest

from loraplex.adapters import eviction_bench
from loraplex.adapters.eviction import Use, UseClock
from loraplex.adapters.eviction_bench import Case, run


def test_a_use_counts_half_after_the_half_life() -> None:
    clock, use, other = UseClock(), Use(), Use()
    clock.num_adapters = 3
    clock.count(use)
    before = clock.recent(use)
    for _ in range(6):  # two uses of each of three adapters
        clock.count(other)
    assert clock.recent(use) == pytest.approx(before / 2)
    assert clock.recent(other) > clock.recent(use)


def test_frequent_beats_recent_and_dear_beats_cheap() -> None:
    clock, often, lately = UseClock(), Use(), Use()
    clock.num_adapters = 10
    for _ in range(5):
        clock.count(often)
    clock.count(lately)
    assert clock.worth(often, 100, 1.0) > clock.worth(lately, 100, 1.0)
    assert clock.worth(lately, 100, 2.0) > clock.worth(lately, 100, 1.0)
    assert clock.worth(lately, 50, 1.0) > clock.worth(lately, 100, 1.0)
    assert clock.worth(Use(), 100, 1.0) == 0


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("num_adapters", [16, 256])
def test_it_loads_less_than_lru(num_adapters: int, alpha: float) -> None:
    case = Case(num_adapters, alpha, drifting=False)
    lru, worth = (run(case, name, 3000).load_seconds for name in ("lru", "worth"))
    assert worth < 0.97 * lru


def test_the_simulated_lru_is_lru(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four in a circle where two fit is the worst case of LRU: it always misses."""
    monkeypatch.setattr(eviction_bench, "trace", lambda case, n, seed: [i % 4 for i in range(n)])
    monkeypatch.setattr(eviction_bench, "PAGES", (4,))
    case = Case(4, 0.0, drifting=False)
    assert run(case, "lru", 100).miss_rate == 1.0
    assert run(case, "largest", 100).miss_rate < 1.0

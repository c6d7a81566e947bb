"""Compares eviction policies on request traces: `python -m loraplex.adapters.eviction_bench`.

The traces are those of S-LoRA (2311.03285): popularity by a power law with exponent alpha, here
also with the ranking drawn anew every 2000 requests ("drifting"). Ranks are 8 to 64, so sizes
differ; the memory holds 30 % of all adapters, and at least eight of the smallest. A load costs a
fixed part and a part per byte. Every policy sees the same trace.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from loraplex.adapters.eviction import Use, UseClock

PAGE_BYTES = 1 << 20
FIXED_SECONDS, SECONDS_PER_PAGE = 1e-3, 1e-3
NUM_REQUESTS = 8000
DRIFT_EVERY = 2000
MEMORY_SHARE = 0.3
PAGES = (1, 1, 2, 4)  # ranks 8, 16, 32, 64 in equal parts


@dataclass(frozen=True, slots=True)
class Case:
    num_adapters: int
    alpha: float
    drifting: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    policy: str
    miss_rate: float
    load_seconds: float  # per request


@dataclass(slots=True)
class _Entry:
    pages: int
    last: int = 0
    uses: int = 0


class _Cache:
    """What a policy is asked about: everything it may want to know of a resident adapter."""

    def __init__(self, pages: list[int]) -> None:
        self.entries = [_Entry(count) for count in pages]
        self.use = [Use() for _ in pages]
        self.clock = UseClock()
        self.clock.num_adapters = len(pages)

    def worth(self, i: int) -> float:
        pages = self.entries[i].pages
        return self.clock.worth(self.use[i], pages * PAGE_BYTES, load_seconds(pages))


Policy = Callable[[_Cache, int], float]  # the lowest leaves first

POLICIES: dict[str, Policy] = {
    "lru": lambda cache, i: cache.entries[i].last,
    "lfu": lambda cache, i: cache.entries[i].uses,
    "largest": lambda cache, i: -cache.entries[i].pages,
    "recent use": lambda cache, i: cache.clock.recent(cache.use[i]),
    "worth": _Cache.worth,  # adapters/eviction.py: what the engine does
}


def load_seconds(pages: int) -> float:
    return FIXED_SECONDS + pages * SECONDS_PER_PAGE


def trace(case: Case, num_requests: int, seed: int = 0) -> list[int]:
    """The adapter of each request."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, case.num_adapters + 1) ** case.alpha
    ranks = rng.choice(case.num_adapters, num_requests, p=popularity / popularity.sum())
    who = np.arange(case.num_adapters)
    out: list[int] = []
    for start in range(0, num_requests, DRIFT_EVERY):
        if case.drifting:
            who = rng.permutation(case.num_adapters)
        out += who[ranks[start : start + DRIFT_EVERY]].tolist()
    return out


def run(case: Case, policy: str, num_requests: int, seed: int = 0) -> Outcome:
    rng = np.random.default_rng(seed + 1)
    pages = rng.choice(PAGES, case.num_adapters).tolist()
    room = max(8, int(sum(pages) * MEMORY_SHARE))
    cache, resident, rank = _Cache(pages), set[int](), POLICIES[policy]
    used = misses = 0
    seconds = 0.0
    for now, i in enumerate(trace(case, num_requests, seed)):
        entry = cache.entries[i]
        entry.last, entry.uses = now, entry.uses + 1
        cache.clock.count(cache.use[i])
        if i in resident:
            continue
        misses += 1
        seconds += load_seconds(entry.pages)
        while used + entry.pages > room:
            victim = min(resident, key=lambda j: rank(cache, j))
            resident.remove(victim)
            used -= cache.entries[victim].pages
        resident.add(i)
        used += entry.pages
    return Outcome(policy, misses / num_requests, seconds / num_requests)


def cases() -> list[Case]:
    return [
        Case(count, alpha, drifting)
        for count in (16, 64, 256, 1000)
        for alpha in (0.3, 0.6, 1.0)
        for drifting in (False, True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    args = parser.parse_args()
    names = list(POLICIES)
    print("loading time relative to LRU (miss rate); lower is better\n")
    print(f"| adapters | alpha | drifting | {' | '.join(names)} |")
    print("| --- " * (3 + len(names)) + "|")
    rows = []
    for case in cases():
        outcomes = [run(case, name, args.requests) for name in names]
        lru = outcomes[0].load_seconds
        cells = [f"{o.load_seconds / lru:.2f} ({o.miss_rate:.0%})" for o in outcomes]
        drifting = "yes" if case.drifting else "no"
        print(f"| {case.num_adapters} | {case.alpha} | {drifting} | {' | '.join(cells)} |")
        rows.append(asdict(case) | {"outcomes": [asdict(o) for o in outcomes]})
    print(json.dumps({"bench": "eviction", "requests": args.requests, "cases": rows}))


if __name__ == "__main__":
    main()

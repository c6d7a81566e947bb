"""What an adapter is worth keeping: how often it is used lately, times what a byte of it costs.

    worth = use * reload_seconds / bytes

`use` counts uses, each weighing half after `half_life` further uses of any adapter. Unlike LRU this
does not let one pass over many rarely used adapters empty the memory, and small adapters, which are
slow to load for their size, stay longer. The half-life grows with the number of adapters known, so
that each of them is used a few times within it.

Greedy-dual caching with sizes and costs: Cao and Irani 1997; frequency: GDSF, Cherkasova 1998; with
a decay instead of their inflation value, since popularity drifts. `python -m
loraplex.adapters.eviction_bench` compares it with LRU and others.
"""

from __future__ import annotations

from dataclasses import dataclass

USES_PER_ADAPTER = 2.0  # the half-life, in uses of every known adapter


@dataclass(slots=True)
class Use:
    """Recent uses of one adapter, as of `at` on the clock of uses."""

    weight: float = 0.0
    at: int = 0


class UseClock:
    """Counts uses of all adapters; turns `Use` records into comparable numbers."""

    def __init__(self) -> None:
        self.now = 0
        self.num_adapters = 1  # kept up to date by the owner

    def count(self, use: Use) -> None:
        """The adapter is used once more."""
        self.now += 1
        use.weight = self.recent(use) + 1.0
        use.at = self.now

    def recent(self, use: Use) -> float:
        half_life = USES_PER_ADAPTER * self.num_adapters
        return float(use.weight * 0.5 ** ((self.now - use.at) / half_life))

    def worth(self, use: Use, num_bytes: int, reload_seconds: float) -> float:
        """The higher, the longer it should stay. Arbitrary unit."""
        return self.recent(use) * reload_seconds / max(num_bytes, 1)

"""A histogram that costs a bisection per observation: no locks, no label look-ups, read only when
scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily


class Histogram:
    """For one thread (the event loop's). `bounds` are the upper bounds, ascending, without +Inf."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    @classmethod
    def of(cls, bounds: Sequence[float], counts: Sequence[int], total: float) -> Histogram:
        """One that somebody else counted: up to each bound, and beyond. total: of all values."""
        made = cls(bounds)
        made._counts[: len(counts)] = counts
        made._sum = total
        return made

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def absorb(self, other: Histogram) -> None:
        """Add the counts of another one with the same bounds."""
        assert self._bounds == other._bounds, "histograms of different bounds do not add up"
        self._counts = [mine + its for mine, its in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = [*(f"{float(bound)}" for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(labels, buckets, self._sum)

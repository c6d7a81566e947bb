"""Counters of adapters' versions with bounded cardinality: the busiest by name, everyone else as
`other`.

A version that gets busier than the least busy named one takes its place. Counters stay honest: what
a version counted before it lost its place goes to `other`, which therefore only grows, and one that
comes back starts at 0 (which Prometheus reads as a counter reset).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from loraplex.platform.histogram import Histogram

AdapterLabel = tuple[str, str]  # adapter, version

OTHER: AdapterLabel = ("other", "")
MAX_CANDIDATES = 10_000
TTFT_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(slots=True)
class Series:
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS))
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS))

    def absorb(self, other: Series) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.ttft.absorb(other.ttft)
        self.latency.absorb(other.latency)


class AdapterSeries:
    def __init__(self, max_named: int = 100) -> None:
        self._max_named = max_named
        self._named: dict[AdapterLabel, Series] = {}
        self._other = Series()
        # Candidates for a place, since they lost or lacked one.
        self._unnamed_requests: dict[AdapterLabel, int] = {}

    def of(self, label: AdapterLabel) -> Series:
        """The series to count one request of `label` in."""
        series = self._named.get(label)
        if series is not None:
            return series
        if len(self._named) < self._max_named:
            return self._admit(label)
        if len(self._unnamed_requests) >= MAX_CANDIDATES:
            self._unnamed_requests.clear()
        requests = self._unnamed_requests[label] = self._unnamed_requests.get(label, 0) + 1
        least = min(self._named, key=lambda known: self._named[known].requests)
        if requests <= self._named[least].requests:
            return self._other
        self._other.absorb(self._named.pop(least))
        return self._admit(label)

    def __iter__(self) -> Iterator[tuple[AdapterLabel, Series]]:
        yield from self._named.items()
        if self._other.requests:
            yield OTHER, self._other

    def _admit(self, label: AdapterLabel) -> Series:
        self._unnamed_requests.pop(label, None)
        return self._named.setdefault(label, Series())

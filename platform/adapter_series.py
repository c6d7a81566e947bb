"""Per-adapter counters with bounded cardinality: the busiest adapters by name, everyone else as
`other`.

An adapter that gets busier than the least busy named one takes its place. Counters stay honest:
what a name counted before it lost its place goes to `other`, which therefore only grows, and a name
that comes back starts at 0 (which Prometheus reads as a counter reset).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from loraplex.platform.histogram import Histogram

OTHER = "other"
MAX_CANDIDATES = 10_000
TTFT_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class Series:
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    loads: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS))

    def absorb(self, other: Series) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.loads += other.loads
        self.ttft.absorb(other.ttft)


class AdapterSeries:
    def __init__(self, max_named: int = 100) -> None:
        self._max_named = max_named
        self._named: dict[str, Series] = {}
        self._other = Series()
        self._unnamed_requests: dict[
            str, int
        ] = {}  # candidates for a place, since they lost or lacked one

    def of(self, name: str) -> Series:
        """The series to count one request of `name` in."""
        series = self._named.get(name)
        if series is not None:
            return series
        if len(self._named) < self._max_named:
            return self._admit(name)
        if len(self._unnamed_requests) >= MAX_CANDIDATES:
            self._unnamed_requests.clear()
        requests = self._unnamed_requests[name] = self._unnamed_requests.get(name, 0) + 1
        least = min(self._named, key=lambda known: self._named[known].requests)
        if requests <= self._named[least].requests:
            return self._other
        self._other.absorb(self._named.pop(least))
        return self._admit(name)

    def known(self, name: str) -> Series:
        """The series `name` counts in now, without counting a request."""
        return self._named.get(name, self._other)

    def __iter__(self) -> Iterator[tuple[str, Series]]:
        yield from self._named.items()
        if self._other.requests or self._other.loads:
            yield OTHER, self._other

    def _admit(self, name: str) -> Series:
        self._unnamed_requests.pop(name, None)
        return self._named.setdefault(name, Series())

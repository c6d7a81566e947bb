"""What became of adapters' residency: every change the engine told of, kept for a while, counted
for ever, and logged.

Lives in the API process, so its counters outlive a restart of the engine. Knows digests, no names.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from loraplex.engine.api import AdapterEvent, AdapterState, Stats
from loraplex.platform.histogram import Histogram

log = logging.getLogger("loraplex.residency")

MAX_KEPT = 2000
_ON_DEVICE = (AdapterState.DEVICE, AdapterState.DRAINING)
_IN_STATE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0, 600.0, 3600.0)
_LOAD = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0)


class ResidencyLog:
    """For one thread, the event loop's."""

    def __init__(self) -> None:
        self._kept: deque[AdapterEvent] = deque(maxlen=MAX_KEPT)
        self._in_state: dict[tuple[str, str], Histogram] = {}  # by states before and after
        self._load = Histogram(_LOAD)
        self._phases: dict[str, Histogram] = {}
        self._evictions: Counter[str] = Counter()  # by reason
        self._failures: Counter[str] = Counter()  # by code

    def hear(self, event: AdapterEvent | Stats) -> None:
        """Take in one piece of news of the engine; others than changes of residency are ignored."""
        if not isinstance(event, AdapterEvent):
            return
        self._kept.append(event)
        change = (str(event.before), str(event.after))
        self._in_state.setdefault(change, Histogram(_IN_STATE)).observe(event.seconds)
        if event.after is AdapterState.FAILED:
            self._failures[event.reason] += 1
        elif event.before in _ON_DEVICE and event.after not in _ON_DEVICE:
            self._evictions[event.reason] += 1
        if event.phases:
            self._load.observe(sum(event.phases.values()))
            for phase, seconds in event.phases.items():
                self._phases.setdefault(phase, Histogram(_LOAD)).observe(seconds)
        _log(event)

    def recent(self, limit: int, digest: str | None = None) -> list[AdapterEvent]:
        """The latest changes, newest first; of one adapter only where a digest is given."""
        found = (event for event in reversed(self._kept) if digest in (None, event.digest))
        return [event for event, _ in zip(found, range(limit), strict=False)]

    def families(self, labels: Mapping[str, str]) -> Iterable[Metric]:
        """labels: of every sample."""
        names, values = list(labels), list(labels.values())
        changes = HistogramMetricFamily(
            "loraplex:adapter_state_seconds",
            "Time adapters spent in a state (before) when they changed to another (after).",
            labels=[*names, "before", "after"],
        )
        for change, histogram in sorted(self._in_state.items()):
            histogram.add_to(changes, [*values, *change])
        load = HistogramMetricFamily(
            "vllm:lora_adapter_load_seconds",
            "Time from an adapter's first request until it was on the device.",
            labels=names,
        )
        self._load.add_to(load, values)
        phases = HistogramMetricFamily(
            "loraplex:adapter_load_phase_seconds",
            "What the time of adapter loads went into.",
            labels=[*names, "phase"],
        )
        for phase, histogram in self._phases.items():
            histogram.add_to(phases, [*values, phase])
        evictions = CounterMetricFamily(
            "loraplex:adapter_evictions",
            "Adapters that left the device: for others' room, by order, or deleted.",
            labels=[*names, "reason"],
        )
        for reason, count in sorted(self._evictions.items()):
            evictions.add_metric([*values, reason], count)
        failures = CounterMetricFamily(
            "loraplex:adapter_load_failures", "Failed loads.", labels=[*names, "code"]
        )
        for code, count in sorted(self._failures.items()):
            failures.add_metric([*values, code], count)
        return changes, load, phases, evictions, failures


def _log(event: AdapterEvent) -> None:
    """Arrivals and departures at INFO, failures as warnings, steps on the way at DEBUG."""
    if event.after is AdapterState.FAILED:
        level = logging.WARNING
    elif event.before in _ON_DEVICE or event.after in _ON_DEVICE:
        level = logging.INFO
    else:
        level = logging.DEBUG
    if not log.isEnabledFor(level):
        return
    fields = {
        "digest": event.digest[:12],
        "before": str(event.before),
        "after": str(event.after),
        "ms": round(event.seconds * 1000, 1),
        "reason": event.reason or None,
        "detail": event.detail or None,
        **{f"{phase}_ms": round(s * 1000, 1) for phase, s in event.phases.items()},
    }
    log.log(level, "adapter_state", extra=fields)

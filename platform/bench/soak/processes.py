"""What the server's two processes hold: memory and file handles, sampled while they work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

MIB = 1 << 20
ENGINE_MODULE = "loraplex.engine.process"


@dataclass(frozen=True, slots=True)
class Sample:
    """requests: sent until then. rss: resident bytes that are the process's own."""

    requests: int
    at: float
    rss: int
    handles: int
    threads: int


@dataclass(slots=True)
class Watched:
    name: str
    process: psutil.Process
    samples: list[Sample] = field(default_factory=list)
    died: bool = False

    def sample(self, requests: int) -> None:
        """What it holds now; nothing more once it is gone."""
        try:
            sample = Sample(
                requests,
                time.monotonic(),
                int(self.process.memory_info().rss),
                self.process.num_fds(),
                self.process.num_threads(),
            )
        except psutil.NoSuchProcess:
            self.died = True
        else:
            self.samples.append(sample)

    def growth(self, share: float = 0.5) -> float:
        """Bytes of resident memory gained over the last `share` of the samples; 0 with fewer than
        eight.

        Its rate is the median of the rates between any two of them (Theil 1950, Sen 1968), which a
        leak moves and a step in less than a quarter of them does not. Such steps are usual: oneDNN
        keeps a primitive for each new shape of a step, up to 1,024, so the engine's memory rises by
        some 200 MiB and then levels; when, depends on how often rare shapes come.
        """
        last = self.samples[int(len(self.samples) * (1 - share)) :]
        if len(last) < 8:
            return 0.0
        x = np.array([s.requests for s in last], dtype=float)
        y = np.array([s.rss for s in last], dtype=float)
        first, second = np.triu_indices(len(last), 1)
        apart = x[second] > x[first]  # the last two samples may be of one moment
        rates = (y[second] - y[first])[apart] / (x[second] - x[first])[apart]
        return float(np.median(rates) * (x[-1] - x[0])) if rates.size else 0.0

    def as_dict(self) -> dict[str, float]:
        first, last = self.samples[0], self.samples[-1]
        return {
            "rss_first_mib": round(first.rss / MIB, 1),
            "rss_last_mib": round(last.rss / MIB, 1),
            "rss_growth_last_half_mib": round(self.growth() / MIB, 2),
            "handles_most": max(s.handles for s in self.samples),
            "handles_first": first.handles,
            "handles_last": last.handles,
            "threads_last": last.threads,
        }


def watch(api_pid: int) -> list[Watched]:
    """The API process and its engine."""
    api = psutil.Process(api_pid)
    engines = [p for p in api.children(recursive=True) if ENGINE_MODULE in " ".join(p.cmdline())]
    assert len(engines) == 1, f"one engine process, not {len(engines)}"
    return [Watched("api", api), Watched("engine", engines[0])]


def grown(watched: Sequence[Watched], limit_bytes: float) -> list[str]:
    """Those whose memory grew more than it may, in words."""
    return [
        f"the {w.name} process grew by {w.growth() / MIB:.1f} MiB over the last half of the run, "
        f"the limit is {limit_bytes / MIB:.1f}"
        for w in watched
        if w.growth() > limit_bytes
    ]

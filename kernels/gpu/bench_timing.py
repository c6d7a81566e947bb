"""Timing: many passes captured in one CUDA graph, replayed, the median taken.

A pass is one operation on data of its own. Launches from Python would take longer than the kernels,
hence the graph; and a pass that met its own data in the L2 cache would measure the cache, hence as
many passes as make the working set several caches large (`num_passes`). Knows nothing of LoRA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

WARM_REPLAYS = 3
MAX_REPLAYS = 30
MIN_REPLAYS = 5
SECONDS = 0.15  # of replays for one number
WORKING_SET_BYTES = 256 << 20  # four times the largest L2 cache we know, an H200's 60 MB
MAX_PASSES = 640

Pass = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one pass: median and 80th percentile over replays."""

    us: float
    us_p80: float


class Timer(Protocol):
    def __call__(self, passes: Sequence[Pass]) -> Timing: ...


def num_passes(bytes_per_pass: float) -> int:
    """Passes on different data that together outgrow the cache."""
    return max(2, min(MAX_PASSES, -(-WORKING_SET_BYTES // max(1, int(bytes_per_pass)))))


class GraphTimer:
    """Captures the passes once and replays them. seconds: of replays, at least MIN_REPLAYS."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds

    def __call__(self, passes: Sequence[Pass]) -> Timing:
        graph = capture(passes)
        for _ in range(WARM_REPLAYS):
            graph.replay()
        times = self._replay(graph)
        return Timing(
            us=statistics.median(times) / len(passes),
            us_p80=sorted(times)[len(times) * 4 // 5] / len(passes),
        )

    def _replay(self, graph: torch.cuda.CUDAGraph) -> list[float]:
        times: list[float] = []
        spent = 0.0
        while len(times) < MIN_REPLAYS or (len(times) < MAX_REPLAYS and spent < self.seconds):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
            spent += times[-1] / 1e6
        return times


def capture(passes: Sequence[Pass]) -> torch.cuda.CUDAGraph:
    """Run the passes once, so that everything is compiled, then capture them in order."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in passes:
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in passes:
            run()
    return graph


class WallTimer:
    """Runs the first pass once, by the clock: where kernels are interpreted, time means nothing."""

    def __call__(self, passes: Sequence[Pass]) -> Timing:
        start = time.perf_counter()
        passes[0]()
        us = (time.perf_counter() - start) * 1e6
        return Timing(us, us)

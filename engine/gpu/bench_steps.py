"""Steps of the real runner on a random model: their time by batch, adapters, ranks and popularity.

Steps run as the engine runs them, the next one launched before the last is collected; what the
scheduler does between them is not in it. The LoRA tax is `step with adapters / step without - 1`.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from loraplex.adapters.pool import PagePool
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.gpu.bench_model import install_adapters, random_image
from loraplex.engine.gpu.runner import GpuRunner
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence as EngineSequence

ZIPF = 1.0  # of the power law: the n-th most popular adapter is asked for in proportion to 1 / n
MIXED_RANKS = (8, 16, 32, 64)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds between the ends of steps."""

    median: float
    p99: float
    mean: float
    steps: int


def summarise(ends_s: Sequence[float]) -> StepTimes:
    """ends_s: when each step was collected, at least two."""
    gaps = sorted((b - a) * 1e3 for a, b in pairwise(ends_s))
    return StepTimes(
        median=statistics.median(gaps),
        p99=gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))],
        mean=statistics.fmean(gaps),
        steps=len(gaps),
    )


def popularity(kind: str, batch: int, adapters: int) -> list[int]:
    """Which adapter each of `batch` requests asks for.

    kind: "distinct" (needs as many adapters), "one", or "power law" over all of them.
    """
    if kind == "one":
        return [0] * batch
    if kind == "distinct":
        if adapters < batch:
            raise ValueError(f"{batch} distinct requests need as many adapters, not {adapters}")
        return list(range(batch))
    if kind != "power law":
        raise ValueError(f"popularity {kind!r}: must be distinct, one or power law")
    weights = 1.0 / np.arange(1, adapters + 1) ** ZIPF
    chosen = np.random.default_rng(0).choice(adapters, batch, p=weights / weights.sum())
    return sorted(int(adapter) for adapter in chosen)


class Sequences:
    """Made-up sequences with blocks of their own, as they come."""

    def __init__(self, runner: GpuRunner) -> None:
        self._runner = runner
        self._made = 0

    def make(
        self, num_tokens: Sequence[int], digests: Sequence[str | None]
    ) -> list[EngineSequence]:
        """num_tokens: of each sequence, all but the last in the KV cache already."""
        size, first = self._runner.kv_cache.block_size, 0
        made: list[EngineSequence] = []
        for tokens, digest in zip(num_tokens, digests, strict=True):
            self._made += 1
            uses = () if digest is None else (AdapterUse(digest),)
            seq = EngineSequence.from_request(
                GenerationRequest(
                    request_id=str(self._made),
                    prompt_token_ids=[len(made) % 100] * tokens,
                    sampling=SamplingParams(temperature=0.0),
                    adapters=uses,
                ),
                seq_id=self._made,
                arrival_time=0.0,
                max_model_len=tokens + 1,
                eos_token_ids=frozenset(),
                seed=0,
            )
            blocks = -(-tokens // size)
            seq.block_table = list(range(first, first + blocks))
            first += blocks
            made.append(seq)
        if first > self._runner.kv_cache.num_blocks:
            raise ValueError(
                f"{first} blocks wanted, the cache has {self._runner.kv_cache.num_blocks}"
            )
        return made


def schedule(sequences: Sequence[EngineSequence], new: int = 1) -> Schedule:
    """Each runs its last `new` tokens and samples."""
    scheduled = [ScheduledSequence(seq, seq.num_tokens - new, new, True) for seq in sequences]
    scheduled.sort(key=lambda s: s.seq.composition)
    decodes = len(scheduled) if new == 1 else 0
    return Schedule(scheduled, decodes, new * len(scheduled), [])


def run_steps(
    runner: GpuRunner, step: Schedule, seconds: float, at_least: int, clock: Clock
) -> list[float]:
    """The same step again and again, one in flight ahead. When each was collected, in seconds.

    at_least: steps, two or more.
    """
    ends: list[float] = []
    started = clock()
    handle = runner.launch(step)
    while len(ends) < at_least or clock() - started < seconds:
        following = runner.launch(step)
        runner.collect(handle)
        ends.append(clock())
        handle = following
    runner.collect(handle)  # nothing was launched meanwhile, so its time would not be a step's
    return ends


@dataclass(slots=True, kw_only=True)
class StepBench:
    """pool: the runner's. seconds: of steps for one number, and steps at least."""

    runner: GpuRunner
    pool: PagePool
    seconds: float
    clock: Clock = time.perf_counter
    at_least: int = 20
    sequences: Sequences = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = Sequences(self.runner)

    def step(
        self, num_tokens: Sequence[int], digests: Sequence[str | None], new: int = 1
    ) -> StepTimes:
        made = self.sequences.make(num_tokens, digests)
        step = schedule(made, new)
        run_steps(self.runner, step, 0.0, 2, self.clock)  # warm
        times = summarise(run_steps(self.runner, step, self.seconds, self.at_least, self.clock))
        self.runner.forget([seq.seq_id for seq in made])
        return times

    def tokens(self, num_tokens: Sequence[int], digests: Sequence[str | None]) -> list[int | None]:
        """What one step samples, in the order of the sequences."""
        made = self.sequences.make(num_tokens, digests)
        step = schedule(made)
        samples = self.runner.collect(self.runner.launch(step))
        self.runner.forget([seq.seq_id for seq in made])
        found = {
            s.seq.seq_id: sample.token_id for s, sample in zip(step.scheduled, samples, strict=True)
        }
        return [found[seq.seq_id] for seq in made]


@dataclass(frozen=True, slots=True)
class ColdLoads:
    """usable_ms: from the order until a step may begin with the adapter. landed_ms: until its last
    byte is there. quiet, loading: the other sequences' steps without loads and beside them.
    """

    usable_ms: float
    landed_ms: float
    quiet: StepTimes
    loading: StepTimes


def cold_loads(
    bench: StepBench, rank: int, digests: Sequence[str | None], context: int, loads: int
) -> ColdLoads:
    """Adapters loaded from pinned memory one after another while a decode batch runs on."""
    runner, pool = bench.runner, bench.pool
    image = random_image(pool, rank)
    contexts = [context] * len(digests)
    quiet = bench.step(contexts, digests)
    made = bench.sequences.make(contexts, digests)
    step = schedule(made)
    usable: list[float] = []
    landed: list[float] = []
    ends: list[float] = []
    failures: list[Exception] = []
    handle = runner.launch(step)
    for i in range(loads):
        name, start = f"cold-{i}", bench.clock()
        head, done = threading.Event(), threading.Event()
        pool.reserve(name, image.layout)

        def copy(name: str = name, head: Any = head, done: Any = done) -> None:
            try:
                pool.copy(name, image, head.set)
            except Exception as error:
                failures.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        while not done.is_set() or len(ends) < (i + 1) * bench.at_least:
            following = runner.launch(step)
            runner.collect(handle)
            handle = following
            ends.append(bench.clock())
            if head.is_set() and name not in pool:
                pool.publish(name, image)
                usable.append((bench.clock() - start) * 1e3)
            if done.is_set() and len(landed) == i:
                landed.append((bench.clock() - start) * 1e3)
        thread.join()
        if failures:
            raise failures[0]
        if name not in pool:
            pool.publish(name, image)
            usable.append((bench.clock() - start) * 1e3)
        pool.remove(name)
    runner.collect(handle)
    runner.forget([seq.seq_id for seq in made])
    return ColdLoads(
        usable_ms=statistics.median(usable),
        landed_ms=statistics.median(landed),
        quiet=quiet,
        loading=summarise(ends),
    )


@contextmanager
def installed(pool: PagePool, ranks: Sequence[int]) -> Iterator[list[str]]:
    """Adapters of these ranks, resident for as long as the block runs: their digests."""
    digests = install_adapters(pool, ranks)
    if pool.arena.device.type == "cuda":
        torch.cuda.synchronize()
    try:
        yield digests
    finally:
        for digest in digests:
            pool.remove(digest)

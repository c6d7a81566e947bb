"""The real engine on a clock of its own: hours of traffic in seconds, to see who waits how long.

    python -m loraplex.engine.simulation

Scheduler, order, block manager and adapter residency are the ones that serve; only the model and
the loads are replaced by what they would cost. So fairness and starvation can be looked at with a
thousand adapters and hours of a trace, first come first served beside it.

The cost of a step is a fixed part, a part per token and a part per adapter page in it; that of a
load a fixed part and one per page. `Costs` has the figures of the demo-size model of the benches on
two CPU cores; other machines have others, and what is compared are ratios.

Traces: S-LoRA's (2311.03285; power law over adapters, gamma arrivals), and a flood by one tenant.
No tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.adapters.residency import AdapterSize, LoadDone, Stage
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine import api
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.fair_order import FairOrder, Flow, Place
from loraplex.engine.seams import Schedule, StepSample


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds."""

    step: float = 10e-3
    token: float = 0.6e-3
    page: float = 0.5e-3
    load: float = 10e-3
    load_page: float = 15e-3


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    tenant: str
    adapter: int | None
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Served:
    """What became of an arrival: seconds from it to the first token and to the last."""

    arrival: Arrival
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """blocks of 16 tokens; pages of adapters that fit on the device."""

    max_num_seqs: int = 16
    num_blocks: int = 1024
    device_pages: int = 64
    costs: Costs = Costs()


class ArrivalOrder(FairOrder):
    """First come, first served: what `FairOrder` is compared with. Knows no tenants, either."""

    def come(self, flow: Flow, seq_id: int, **costs: Any) -> Place:
        return replace(super().come(flow, seq_id, **costs), order=seq_id)

    def next_to(self, seq_id: int) -> int:
        return seq_id


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0


class _Loader:
    """Loads end when the clock says so."""

    def __init__(self, clock: _Clock, costs: Costs, pages: Sequence[int]) -> None:
        self._clock = clock
        self._costs = costs
        self._pages = pages
        self._under_way: deque[tuple[float, LoadDone]] = deque()
        self._free_at = 0.0

    def describe(self, digest: str) -> AdapterSize:
        pages = self._pages[int(digest)]
        return AdapterSize(16 * pages, pages, pages, pages)

    def begin_host_load(self, digest: str) -> None:
        self._begin(digest, Stage.HOST, self._costs.load)

    def begin_device_load(self, digest: str) -> None:
        self._begin(digest, Stage.DEVICE, self._costs.load_page * self._pages[int(digest)])

    def _begin(self, digest: str, stage: Stage, seconds: float) -> None:
        self._free_at = max(self._free_at, self._clock.now) + seconds  # one thread
        self._under_way.append((self._free_at, LoadDone(digest, stage, True, seconds)))

    @property
    def next_end(self) -> float:
        return self._under_way[0][0] if self._under_way else float("inf")

    def poll(self) -> list[LoadDone]:
        ended = []
        while self._under_way and self._under_way[0][0] <= self._clock.now:
            ended.append(self._under_way.popleft()[1])
        return ended

    def drop_device(self, digest: str) -> int:
        return self._pages[int(digest)]

    def drop_host(self, digest: str) -> int:
        return self._pages[int(digest)]

    def forget(self, digest: str) -> None:
        pass


class _Runner:
    """A step takes its time and samples anything."""

    max_in_flight = 0

    def __init__(self, clock: _Clock, costs: Costs, pages: Sequence[int]) -> None:
        self._clock = clock
        self._costs = costs
        self._pages = pages
        self.busy_s = 0.0
        self.tokens = 0

    def launch(self, schedule: Schedule) -> list[StepSample]:
        digests = {digest for item in schedule.scheduled for digest in item.seq.digests}
        pages = sum(self._pages[int(digest)] for digest in digests)
        costs = self._costs
        seconds = costs.step + costs.token * schedule.num_tokens + costs.page * pages
        self._clock.now += seconds
        self.busy_s += seconds
        self.tokens += schedule.num_tokens
        return [StepSample(1 if item.samples else None) for item in schedule.scheduled]

    def collect(self, handle: list[StepSample]) -> list[StepSample]:
        return handle


@dataclass(frozen=True, slots=True)
class Result:
    served: list[Served]
    seconds: float
    tokens: int  # run in steps
    loads: int
    preemptions: int

    def of(self, tenant: str) -> list[Served]:
        return [served for served in self.served if served.arrival.tenant == tenant]


def simulate(
    arrivals: Iterable[Arrival],
    pages: Sequence[int],
    machine: Machine = Machine(),
    order: FairOrder | None = None,
) -> Result:
    """Run them all to their end. pages: of each adapter."""
    clock = _Clock()
    loader = _Loader(clock, machine.costs, pages)
    runner = _Runner(clock, machine.costs, pages)
    blocks = BlockManager(machine.num_blocks, 16, enable_prefix_cache=True)
    slots = AdapterSlots(
        loader,
        device_bytes_total=machine.device_pages,
        host_bytes_total=sum(pages),
        clock=lambda: clock.now,
    )
    tokens = 8 * machine.max_num_seqs
    engine = Engine(
        EngineConfig(
            model="simulated",
            adapter_dir=Path("none"),
            max_num_seqs=machine.max_num_seqs,
            max_num_batched_tokens=tokens,
            max_num_waiting=1 << 20,
        ),
        _MODEL,
        runner,
        slots,
        blocks,
        lambda: _MEMORY,
        order=order,
        clock=lambda: clock.now,
    )
    coming = deque(sorted(arrivals, key=lambda arrival: arrival.at))
    live: dict[str, Arrival] = {}
    firsts: dict[str, float] = {}
    served: list[Served] = []
    number = 0
    while coming or engine.has_work():
        while coming and coming[0].at <= clock.now:
            arrival = coming.popleft()
            number += 1
            live[str(number)] = arrival
            tenant = "" if isinstance(order, ArrivalOrder) else arrival.tenant
            engine.add(_request(str(number), arrival, tenant))
        for output in engine.step():
            arrival = live[output.request_id]
            if output.token_ids:
                firsts.setdefault(output.request_id, clock.now - arrival.at)
            if output.finish_reason is not None:
                assert output.error is None, output.error
                del live[output.request_id]
                last_s = clock.now - arrival.at
                served.append(Served(arrival, firsts.pop(output.request_id), last_s))
        if not engine.ran_last_step:
            # Nothing can run: on to the next arrival or load, or to the end of a wait for room.
            then = min(loader.next_end, coming[0].at if coming else float("inf"), clock.now + 0.05)
            clock.now = max(clock.now, then)
    stats = engine.stats()
    return Result(served, clock.now, runner.tokens, slots.num_loads, stats.num_preemptions)


def _request(name: str, arrival: Arrival, tenant: str) -> api.GenerationRequest:
    adapter = arrival.adapter
    return api.GenerationRequest(
        request_id=name,
        prompt_token_ids=[int(name)] * arrival.prompt,  # shares no prefix with any other
        sampling=api.SamplingParams(max_tokens=arrival.output, temperature=0.0, ignore_eos=True),
        adapters=() if adapter is None else (api.AdapterUse(str(adapter)),),
        tenant=tenant,
    )


# --- traces -----------------------------------------------------------------------------------


def power_law(
    num_adapters: int,
    rate: float,
    duration_s: float,
    *,
    alpha: float = 1.0,
    cv: float = 1.0,
    lengths: tuple[int, int] = (8, 512),
    tenant: str = "a",
    seed: int = 42,
) -> list[Arrival]:
    """S-LoRA's trace, in its order of draws. cv: 1 = Poisson, more = bursts."""
    rng = np.random.RandomState(seed)
    total = int(rate * duration_s)
    adapters = np.floor(rng.power(alpha, total) * num_adapters).astype(int)
    prompts = rng.randint(*lengths, total)
    outputs = rng.randint(*lengths, total)
    times = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, total))
    return [
        Arrival(at, tenant, adapter, prompt, output)
        for at, adapter, prompt, output in zip(
            times.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), strict=True
        )
    ]


def diurnal(trace: Sequence[Arrival], period_s: float, depth: float = 0.8) -> list[Arrival]:
    """The same requests, thinned and crowded by a sine: the busiest moment has (1 + depth) times
    the mean rate.
    """
    at = np.array([arrival.at for arrival in trace])
    grid = np.linspace(0.0, at[-1], 4096)
    load = grid + depth * period_s / (2 * np.pi) * (1 - np.cos(2 * np.pi * grid / period_s))
    warped = np.interp(at / at[-1] * load[-1], load, grid)
    return [replace(a, at=float(t)) for a, t in zip(trace, warped, strict=True)]


# --- cases ------------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q))


def starvation(order: FairOrder) -> dict[str, float]:
    """SGLang's published case, scaled: 6 adapters, room for 3, requests near what fits."""
    trace = power_law(6, 4.0, 300.0, lengths=(128, 129), seed=1)
    result = simulate(trace, [1] * 6, Machine(device_pages=3), order)
    ends = [served.last_s for served in result.served]
    return {
        "e2e_median_s": percentile(ends, 50),
        "e2e_p90_s": percentile(ends, 90),
        "p90_to_median": percentile(ends, 90) / percentile(ends, 50),
        "tokens_per_s": result.tokens / result.seconds,
    }


def flood(order: FairOrder) -> dict[str, float]:
    """Five tenants of one adapter each; one of them sends ten times what the others do."""
    quiet: list[Arrival] = []
    for i in range(4):
        trace = power_law(1, 0.4, 300.0, lengths=(32, 192), tenant=f"quiet-{i}", seed=10 + i)
        quiet += [replace(arrival, adapter=1 + i) for arrival in trace]
    loud = power_law(1, 4.0, 300.0, lengths=(32, 192), tenant="loud", seed=9)
    alone = simulate(quiet, [1] * 5, order=type(order)())
    both = simulate([*quiet, *loud], [1] * 5, order=order)
    theirs = [served.first_s for served in both.served if served.arrival.tenant != "loud"]
    before = [served.first_s for served in alone.served]
    return {
        "others_ttft_p95_s": percentile(theirs, 95),
        "others_ttft_p95_alone_s": percentile(before, 95),
        "ratio": percentile(theirs, 95) / percentile(before, 95),
        "preemptions": both.preemptions,
        "loud_ttft_p95_s": percentile([s.first_s for s in both.of("loud")], 95),
        "tokens_per_s": both.tokens / both.seconds,
    }


def thousand(order: FairOrder) -> dict[str, float]:
    """1,000 adapters of ranks 8 to 64, room for 64 pages, an hour with a day's shape, in bursts."""
    trace = power_law(1000, 4.0, 3600.0, alpha=0.3, cv=2.0, lengths=(8, 128), seed=3)
    pages = [(1, 1, 2, 4)[i % 4] for i in range(1000)]
    result = simulate(diurnal(trace, 1800.0, 0.5), pages, Machine(num_blocks=2048), order)
    ends = [served.last_s for served in result.served]
    return {
        "requests": len(ends),
        "hours": result.seconds / 3600,
        "ttft_p50_s": percentile([s.first_s for s in result.served], 50),
        "ttft_max_s": max(s.first_s for s in result.served),
        "e2e_p90_to_median": percentile(ends, 90) / percentile(ends, 50),
        "loads": result.loads,
        "preemptions": result.preemptions,
        "tokens_per_s": result.tokens / result.seconds,
    }


CASES = {"starvation": starvation, "flood": flood, "thousand": thousand}


def main() -> int:
    parser = argparse.ArgumentParser(description="Who waits how long, in simulated time.")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    for name in parser.parse_args().cases.split(","):
        for order in (FairOrder(), ArrivalOrder()):
            figures = CASES[name](order)
            print(f"{name:12} {type(order).__name__}")
            for key, value in figures.items():
                print(f"    {key:26} {value:10.3f}")
            shown = {key: round(value, 4) for key, value in figures.items()}
            print(
                json.dumps({"bench": f"simulation {name}", "order": type(order).__name__} | shown)
            )
    return 0


_MODEL = api.ModelInfo(
    name="simulated", architecture="Simulated", dtype="float32", device="cpu", backend="torch",
    vocab_size=1 << 40, max_model_len=4096, num_layers=1, eos_token_ids=[0], bos_token_id=None,
    tokenizer_json="", chat_template=None, special_tokens={}, generation_defaults={}, modules=[],
    num_parameters=1,
)  # fmt: skip
_MEMORY = api.MemoryInfo(
    weights_bytes=0, kv_cache_bytes=0, kv_block_bytes=0, kv_blocks_total=0, kv_blocks_used=0,
    kv_blocks_cached=0, block_size=16, adapter_bytes_total=0, adapter_bytes_used=0,
    adapter_page_bytes=1, host_adapter_bytes_total=0, host_adapter_bytes_used=0,
    workspace_bytes=0, device_bytes_total=0, device_bytes_free=0,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())

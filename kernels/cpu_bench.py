"""What adapters and attention cost on this CPU.

    GOMP_SPINCOUNT=1000 python -m loraplex.kernels.bench --device cpu [lora attention ...]

Question: is a decode step with adapters limited by the bytes of the adapters it uses, and attention
by the bytes of the KV cache? Physics: floor = bytes / sequential read bandwidth, measured first.
The LoRA time is that of all operations of a step except the base linears, with adapters minus
without. Numbers are the 20th percentile over interleaved repetitions, wall clock, so a machine with
other work to do shows more; the environment variable, which the engine process sets too, keeps
threads from spinning then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.native_build import BuildError
from loraplex.kernels.native_ops import NativeOps
from loraplex.kernels.ops import NUM_MODULES, AttentionBatch, LoraBatch, Ops
from loraplex.kernels.random_step import (
    LayerStep,
    RandomAdapters,
    make_activations,
    make_adapters,
    make_attention,
    make_lora,
    random_tensor,
)
from loraplex.kernels.torch_ops import TorchOps

RANKS = (8, 16, 32, 64)  # the adapters' ranks, in turn
BLOCK_SIZE = 16
DTYPE = torch.bfloat16


SMALL = ModelShape("small", 8, 512, 8, 4, 64, 1408, 0)
MEDIUM = ModelShape("medium", 24, 1024, 16, 8, 64, 2816, 0)
CPU = torch.device("cpu")


def random_values(*size: int) -> Tensor:
    return random_tensor(*size, dtype=DTYPE, device=CPU, std=0.02)


def make_pool(model: ModelShape, num_adapters: int) -> RandomAdapters:
    return make_adapters(model, [RANKS[i % len(RANKS)] for i in range(num_adapters)], DTYPE, CPU)


def make_rows(adapters: RandomAdapters, rows: int) -> LoraBatch:
    """As many rows for each adapter, one adapter after the other."""
    each = rows // len(adapters.pages)
    return make_lora(adapters, [(each, (i,)) for i in range(len(adapters.pages))], weights=(1.0,))


class Step:
    """The operations of one decoder pass on random activations, base linears optional."""

    def __init__(
        self, model: ModelShape, ops: Ops, rows: int, batch: AttentionBatch, blocks: int
    ) -> None:
        self.model, self.ops = model, ops
        kv = ops.kv_cache(
            model.num_layers, blocks, BLOCK_SIZE, model.num_kv_heads, model.head_dim, DTYPE, CPU
        )
        given = make_activations(model, rows, DTYPE, CPU)
        self.layer = LayerStep(model, ops, given, None, batch, kv)

    def others(self, lora: LoraBatch | None) -> None:
        """Everything but the base linears and attention."""
        self.layer.lora = lora
        for layer in range(self.model.num_layers):
            self.layer.adapted(layer)

    def attention(self, q: Tensor) -> None:
        for layer in range(self.model.num_layers):
            self.layer.attention(q, layer)

    def linears(self) -> Callable[[], object]:
        given = self.layer.given
        inputs = {"qkv": given.x, "o": given.attended, "gate_up": given.x, "down": given.inner}
        layers = [
            [
                (inputs[name], self.ops.linear(random_values(out, width)))
                for name, (width, out) in self.model.linears().items()
            ]
            for _ in range(self.model.num_layers)
        ]

        def run() -> None:
            for layer in layers:
                for x, linear in layer:
                    linear(x)

        return run


def milliseconds(runs: dict[str, Callable[[], object]], seconds: float = 1.5) -> dict[str, float]:
    """The 20th percentile of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(values)[len(values) // 5] for name, values in times.items()}


def read_bandwidth() -> float:
    """GB/s of a sequential read by all threads."""
    data = torch.ones(1 << 26)
    return data.nbytes / 1e6 / milliseconds({"sum": partial(torch.sum, data)}, 1.0)["sum"]


def backends() -> list[Ops]:
    try:
        return [NativeOps(), TorchOps()]
    except BuildError as error:
        print(f"no native kernels: {error}")
        return [TorchOps()]


def bench_lora(results: dict[str, float], bandwidth: float) -> None:
    print(f"\nLoRA in decode, ms per step: {'floor':>10}  of {bandwidth:.1f} GB/s")
    for model in (SMALL, MEDIUM):
        for adapters, rows in ((8, 8), (8, 32), (32, 32)):
            pool = make_pool(model, adapters)
            batch, blocks = make_attention([160] * rows, [1] * rows, BLOCK_SIZE, CPU)
            runs: dict[str, Callable[[], object]] = {}
            for ops in backends():
                step = Step(model, ops, rows, batch, blocks)
                with_lora = make_rows(pool, rows)
                runs[f"{ops.name} base"] = partial(step.others, None)
                runs[f"{ops.name} lora"] = partial(step.others, with_lora)
            ms = milliseconds(runs)
            floor = pool.live_bytes / bandwidth / 1e6
            line = f"{model.name:7} {adapters:3} adapters {rows:3} tokens {floor:8.2f}"
            for ops in backends():
                base = ms[f"{ops.name} base"]
                alone = ms[f"{ops.name} lora"] - base
                results[f"lora/{model.name}/{adapters}/{rows}/{ops.name}"] = alone
                line += f"  {ops.name} {alone:7.2f} ({alone / floor:.2f}x) base ops {base:.2f}"
            print(line, flush=True)


def bench_attention(results: dict[str, float], bandwidth: float) -> None:
    print("\ndecode attention, ms per step")
    generator = torch.Generator().manual_seed(0)
    for model in (SMALL, MEDIUM):
        for rows, low, high in ((1, 160, 161), (8, 140, 180), (32, 140, 180), (32, 32, 480)):
            lengths = torch.randint(low, high, (rows,), generator=generator).tolist()
            floor = sum(lengths) * model.kv_width * 4 * model.num_layers / bandwidth / 1e6
            runs: dict[str, Callable[[], object]] = {}
            q = random_values(rows, model.num_heads, model.head_dim)
            for ops in backends():
                batch, blocks = make_attention(lengths, [1] * rows, BLOCK_SIZE, CPU)
                step = Step(model, ops, rows, batch, blocks)
                runs[ops.name] = partial(step.attention, q)
            ms = milliseconds(runs, 1.0)
            line = f"{model.name:7} B={rows:2} length {low:3}..{high:3} floor {floor:6.2f}"
            for name, value in ms.items():
                results[f"attention/{model.name}/{rows}/{low}-{high}/{name}"] = value
                line += f"  {name} {value:7.2f} ({value / floor:.2f}x)"
            print(line, flush=True)


def bench_prefill(results: dict[str, float]) -> None:
    print("\nprefill of 512 tokens with 4 adapters, ms per step")
    for model in (SMALL, MEDIUM):
        pool = make_pool(model, 4)
        batch, blocks = make_attention([128] * 4, [128] * 4, BLOCK_SIZE, CPU)
        runs: dict[str, Callable[[], object]] = {}
        for ops in backends():
            step = Step(model, ops, 512, batch, blocks)
            lora = make_rows(pool, 512)
            runs[f"{ops.name} base"] = partial(step.others, None)
            runs[f"{ops.name} lora"] = partial(step.others, lora)
            q = random_values(512, model.num_heads, model.head_dim)
            runs[f"{ops.name} attention"] = partial(step.attention, q)
        runs["linears"] = step.linears()
        ms = milliseconds(runs)
        line = f"{model.name:7} linears {ms['linears']:7.1f}"
        results[f"prefill/{model.name}/linears"] = ms["linears"]
        for ops in backends():
            alone = ms[f"{ops.name} lora"] - ms[f"{ops.name} base"]
            results[f"prefill/{model.name}/{ops.name}"] = alone
            line += f"  {ops.name} lora {alone:6.1f} ({alone / ms['linears'] * 100:.0f} %)"
            line += (
                f" other {ms[f'{ops.name} base']:.1f} attention {ms[f'{ops.name} attention']:.1f}"
            )
        print(line, flush=True)


def bench_linears(results: dict[str, float], bandwidth: float) -> None:
    print("\nbase linears without head, ms per step")
    ops = backends()[0]
    for model in (SMALL, MEDIUM):
        size = sum(a * b for a, b in map(model.widths, range(NUM_MODULES))) * model.num_layers * 2
        line = f"{model.name:7} floor {size / bandwidth / 1e6:6.2f}"
        for rows in (1, 8, 32):
            batch, blocks = make_attention([16] * rows, [1] * rows, BLOCK_SIZE, CPU)
            run = Step(model, ops, rows, batch, blocks).linears()
            value = milliseconds({"linears": run}, 1.0)["linears"]
            results[f"linears/{model.name}/{rows}"] = value
            line += f"  {rows} tokens {value:.2f}"
        print(line, flush=True)


CASES = ("lora", "attention", "prefill", "linears")


@torch.inference_mode()
def run_cpu_bench(names: Sequence[str]) -> dict[str, Any]:
    """names: of `CASES`, none for all. Prints tables, returns the numbers."""
    bandwidth = read_bandwidth()
    results: dict[str, float] = {"bandwidth_gb_s": bandwidth}
    cases: dict[str, Callable[[], object]] = {
        "lora": lambda: bench_lora(results, bandwidth),
        "attention": lambda: bench_attention(results, bandwidth),
        "prefill": lambda: bench_prefill(results),
        "linears": lambda: bench_linears(results, bandwidth),
    }
    for name in names or CASES:
        cases[name]()
    return {
        "threads": torch.get_num_threads(),
        "ms": {name: round(value, 3) for name, value in results.items()},
    }

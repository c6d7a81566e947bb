"""What adapters and attention cost on this CPU.

    GOMP_SPINCOUNT=1000 python -m loraplex.kernels.bench [lora|attention|prefill|linears ...]

Question: is a decode step with adapters limited by the bytes of the adapters it uses, and attention
by the bytes of the KV cache? Physics: floor = bytes / sequential read bandwidth, measured first.
The LoRA time is that of all operations of a step except the base linears, with adapters minus
without. Numbers are the 20th percentile over interleaved repetitions, wall clock, so a machine with
other work to do shows more; the environment variable, which the engine process sets too, keeps
threads from spinning then. The last line is JSON for machines.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.native_build import BuildError
from loraplex.kernels.native_ops import NativeOps
from loraplex.kernels.ops import (
    GATE_UP,
    NUM_MODULES,
    PAGE_RANKS,
    QKV,
    AttentionBatch,
    KVCache,
    LoraBatch,
    Module,
    Ops,
    PageTables,
)
from loraplex.kernels.torch_ops import TorchOps

RANKS = (8, 16, 32, 64)  # the adapters' ranks, in turn
BLOCK_SIZE = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int

    def widths(self, module: int) -> tuple[int, int]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        return ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h))[module]


SMALL = Model("small", 8, 512, 8, 4, 64, 1408)
MEDIUM = Model("medium", 24, 1024, 16, 8, 64, 2816)


def random_values(count: int) -> Tensor:
    """Random numbers, repeating after a while: fresh ones by the gigabyte take too long."""
    pattern = torch.randn(1 << 20).to(DTYPE) * 0.02
    return pattern.repeat(-(-count // pattern.numel()))[:count]


def make_pool(model: Model, num_adapters: int) -> tuple[PageTables, list[list[int]], int]:
    """Tables, pages of each adapter, and the bytes of one pass over all live rows."""
    pages: list[list[int]] = []
    lives: list[int] = []
    for adapter in range(num_adapters):
        rank = RANKS[adapter % len(RANKS)]
        pages.append([])
        for first in range(0, rank, PAGE_RANKS):
            pages[-1].append(len(lives))
            lives.append(min(PAGE_RANKS, rank - first))
    size = (len(lives), model.layers, NUM_MODULES)
    offset_a, offset_b = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    used = nbytes = 0
    for page, live in enumerate(lives):
        for layer in range(model.layers):
            for module in range(NUM_MODULES):
                for table, width in zip((offset_a, offset_b), model.widths(module), strict=True):
                    table[page, layer, module] = used
                    used += PAGE_RANKS * width
                    nbytes += live * width * DTYPE.itemsize
    live_ranks = torch.tensor(lives, dtype=torch.int32)[:, None, None].expand(size).contiguous()
    return (
        PageTables(random_values(used), offset_a, offset_b, live_ranks, torch.ones(size)),
        pages,
        nbytes,
    )


def make_lora(tables: PageTables, pages: list[list[int]], rows: list[int]) -> LoraBatch:
    """rows: how many rows each adapter serves, one after the other."""
    tiles: list[tuple[int, int, int, int]] = []
    ids: list[int] = []
    row = 0
    for mine, count in zip(pages, rows, strict=True):
        if count:
            tiles.append((row, count, len(ids), len(mine)))
            ids += mine
        row += count
    return LoraBatch(
        tables=tables,
        tiles=torch.tensor(tiles, dtype=torch.int32),
        page_ids=torch.tensor(ids, dtype=torch.int32),
        page_weights=torch.ones(len(ids)),
        max_pages=4,
        host_tiles=tiles,
        host_page_ids=ids,
        host_page_weights=[1.0] * len(ids),
        adapted=frozenset(
            (layer, module)
            for layer in range(tables.offset_a.shape[1])
            for module in range(NUM_MODULES)
        ),
    )


def make_attention(
    lengths: list[int], queries: list[int], generator: torch.Generator
) -> tuple[AttentionBatch, int]:
    """Sequences in shuffled blocks. Returns the batch and the number of blocks used."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(counts), generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    starts = [0]
    positions, slots = [], []
    for table, length, count in zip(tables, lengths, queries, strict=True):
        starts.append(starts[-1] + count)
        for position in range(length - count, length):
            positions.append(position)
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    width = max(counts)
    return (
        AttentionBatch(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(
                [t + [0] * (width - len(t)) for t in tables], dtype=torch.int32
            ),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            num_decodes=sum(1 for count in queries if count == 1),
            seq_ids=list(range(len(lengths))),
            host_query_start=starts,
            host_context_lens=lengths,
            host_block_tables=tables,
        ),
        sum(counts),
    )


class Step:
    """The operations of one decoder pass on random activations, base linears optional."""

    def __init__(
        self, model: Model, ops: Ops, rows: int, batch: AttentionBatch, blocks: int
    ) -> None:
        self.model, self.ops, self.batch = model, ops, batch
        self.kv: KVCache = ops.kv_cache(
            model.layers,
            blocks,
            BLOCK_SIZE,
            model.num_kv_heads,
            model.head_dim,
            DTYPE,
            torch.device("cpu"),
        )
        q_width = model.num_heads * model.head_dim
        self.qkv_width = q_width + 2 * model.num_kv_heads * model.head_dim
        self.x = random_values(rows * model.hidden).view(rows, model.hidden)
        self.attended = random_values(rows * q_width).view(rows, q_width)
        self.inner = random_values(rows * model.intermediate).view(rows, model.intermediate)
        self.qkv = random_values(rows * self.qkv_width).view(rows, self.qkv_width)
        self.gate_up = random_values(rows * 2 * model.intermediate).view(rows, -1)
        self.residual = torch.zeros(rows, model.hidden, dtype=DTYPE)
        self.norm = torch.ones(model.hidden, dtype=DTYPE)
        self.cos, self.sin = torch.ones(rows, model.head_dim), torch.zeros(rows, model.head_dim)

    def others(self, lora: LoraBatch | None) -> None:
        """Everything but the base linears and attention."""
        ops, model = self.ops, self.model
        for layer in range(model.layers):
            t = ops.lora_shrink(self.x, lora, layer, QKV)
            ops.rope_kv_write(
                self.qkv,
                t,
                lora,
                layer,
                self.cos,
                self.sin,
                None,
                None,
                1e-6,
                model.num_heads,
                self.kv,
                self.batch,
            )
            for x, module in ((self.attended, Module.O), (self.inner, Module.DOWN)):
                t = ops.lora_shrink(x, lora, layer, (module,))
                ops.add_rms_norm(self.x, t, lora, layer, module, self.residual, self.norm, 1e-6)
            t = ops.lora_shrink(self.x, lora, layer, GATE_UP)
            ops.swiglu(self.gate_up, t, lora, layer)

    def attention(self, q: Tensor) -> None:
        for layer in range(self.model.layers):
            self.ops.attention(q, self.kv, layer, self.batch, self.model.head_dim**-0.5, None)

    def linears(self) -> Callable[[], object]:
        m, rand = self.model, random_values
        q_width = m.num_heads * m.head_dim
        shapes = (
            (self.x, self.qkv_width),
            (self.attended, m.hidden),
            (self.x, 2 * m.intermediate),
            (self.inner, m.hidden),
        )
        assert self.attended.shape[1] == q_width
        layers = [
            [(x, self.ops.linear(rand(x.shape[1] * out).view(out, -1))) for x, out in shapes]
            for _ in range(m.layers)
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
    generator = torch.Generator().manual_seed(0)
    for model in (SMALL, MEDIUM):
        for adapters, rows in ((8, 8), (8, 32), (32, 32)):
            tables, pages, nbytes = make_pool(model, adapters)
            lora = [rows // adapters] * adapters
            batch, blocks = make_attention([160] * rows, [1] * rows, generator)
            runs: dict[str, Callable[[], object]] = {}
            for ops in backends():
                step = Step(model, ops, rows, batch, blocks)
                with_lora = make_lora(tables, pages, lora)
                runs[f"{ops.name} base"] = partial(step.others, None)
                runs[f"{ops.name} lora"] = partial(step.others, with_lora)
            ms = milliseconds(runs)
            floor = nbytes / bandwidth / 1e6
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
            width = model.num_kv_heads * model.head_dim
            floor = sum(lengths) * width * 4 * model.layers / bandwidth / 1e6
            runs: dict[str, Callable[[], object]] = {}
            q = random_values(rows * model.num_heads * model.head_dim)
            q = q.view(rows, model.num_heads, model.head_dim)
            for ops in backends():
                batch, blocks = make_attention(lengths, [1] * rows, generator)
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
    generator = torch.Generator().manual_seed(0)
    for model in (SMALL, MEDIUM):
        tables, pages, _ = make_pool(model, 4)
        batch, blocks = make_attention([128] * 4, [128] * 4, generator)
        runs: dict[str, Callable[[], object]] = {}
        for ops in backends():
            step = Step(model, ops, 512, batch, blocks)
            lora = make_lora(tables, pages, [128] * 4)
            runs[f"{ops.name} base"] = partial(step.others, None)
            runs[f"{ops.name} lora"] = partial(step.others, lora)
            q = random_values(512 * model.num_heads * model.head_dim)
            q = q.view(512, model.num_heads, model.head_dim)
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
    generator = torch.Generator().manual_seed(0)
    ops = backends()[0]
    for model in (SMALL, MEDIUM):
        size = sum(a * b for a, b in map(model.widths, range(NUM_MODULES))) * model.layers * 2
        line = f"{model.name:7} floor {size / bandwidth / 1e6:6.2f}"
        for rows in (1, 8, 32):
            batch, blocks = make_attention([16] * rows, [1] * rows, generator)
            run = Step(model, ops, rows, batch, blocks).linears()
            value = milliseconds({"linears": run}, 1.0)["linears"]
            results[f"linears/{model.name}/{rows}"] = value
            line += f"  {rows} tokens {value:.2f}"
        print(line, flush=True)


def commit() -> str | None:
    try:
        root = Path(__file__).resolve().parent
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.inference_mode()
def main(names: list[str]) -> None:
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    results: dict[str, float] = {"bandwidth_gb_s": bandwidth}
    cases: dict[str, Callable[[], object]] = {
        "lora": lambda: bench_lora(results, bandwidth),
        "attention": lambda: bench_attention(results, bandwidth),
        "prefill": lambda: bench_prefill(results),
        "linears": lambda: bench_linears(results, bandwidth),
    }
    for name in names or cases:
        cases[name]()
    about = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "ms": {name: round(value, 3) for name, value in results.items()},
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main(sys.argv[1:])

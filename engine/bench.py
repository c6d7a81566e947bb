"""What adapters cost a step of the engine, on random weights of a known model's shape.

    python -m loraplex.engine.bench [--shape llama-3-8b ...] [--quick] [--out FILE]
    python -m loraplex.engine.bench --all --out FOLDER     # everything on a GPU, under ten minutes

Question: what does a step with adapters take beside the same step without, by batch, rank and
popularity? Physics: a decode reads every weight of the model once and every distinct adapter's;
`floor_ms` is those bytes over the bandwidth of a copy. The runner is the engine's own, with graphs
and one step in flight; the scheduler is not in it. The last line is JSON for machines.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraplex.kernels.bench import write_report
from loraplex.kernels.gpu.bench_context import note_row
from loraplex.kernels.model_shapes import SHAPES, TINY, ModelShape
from loraplex.kernels.versions import versions

BLOCK_SIZE = 16
DEFAULT_SHAPES = ("llama-3-8b", "qwen2.5-0.5b", "llama-3.2-1b")
SECONDS = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """pages: of 16 ranks, room for adapters. popular: adapters a power law runs over."""

    batches: Sequence[int]
    context: int
    prefills: Sequence[tuple[int, int]]  # prompts, tokens of each
    pages: int
    popular: int
    seconds: float
    at_least: int
    cold_batch: int
    cold_loads: int


FULL = Sizes(
    batches=(1, 8, 32, 64, 128, 256), context=512, prefills=((1, 2048), (4, 512)), pages=272,
    popular=256, seconds=0.4, at_least=20, cold_batch=32, cold_loads=8,
)  # fmt: skip
QUICK = Sizes(
    batches=(1, 64), context=512, prefills=((1, 2048),), pages=80,
    popular=64, seconds=0.2, at_least=10, cold_batch=32, cold_loads=3,
)  # fmt: skip
DRY = Sizes(
    batches=(2,), context=20, prefills=((1, 18),), pages=4,
    popular=2, seconds=0.0, at_least=2, cold_batch=2, cold_loads=1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wish:
    """One row of the table: which adapters the requests of a batch use."""

    name: str
    ranks: tuple[int, ...]  # of the adapters that are resident
    chosen: tuple[int, ...]  # the adapter of each request


def wishes(batch: int, pages: int, popular: int) -> Iterator[Wish]:
    """All that fit `pages` pages of 16 ranks."""
    from loraplex.engine.gpu.bench_steps import MIXED_RANKS, popularity

    mixed = tuple(MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(batch))
    every = [
        ("distinct r16", (16,) * batch, "distinct"),
        ("distinct r64", (64,) * batch, "distinct"),
        ("distinct, ranks 8 to 64", mixed, "distinct"),
        ("one r16", (16,), "one"),
        ("power law r16", (16,) * popular, "power law"),
    ]
    for name, ranks, kind in every:
        if sum(-(-rank // 16) for rank in ranks) <= pages:
            yield Wish(name, ranks, tuple(popularity(kind, batch, len(ranks))))


@dataclass(slots=True)
class Report:
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    journal: Path | None = None  # gets every row at once, should the process be stopped

    def add(self, **values: Any) -> None:
        row = {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in values.items()
        }
        self.rows.append(row)
        note_row(self.journal, row)
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def bench_shape(
    shape: ModelShape,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    report: Report,
    deadline: float,
) -> None:
    """Decode, prefill and cold loads. deadline: of `time.monotonic`."""
    from loraplex.engine.gpu import bench_model
    from loraplex.engine.gpu.bench_steps import StepBench
    from loraplex.kernels.gpu.ops import TritonOps

    longest = max(sizes.context, *(tokens for _, tokens in sizes.prefills)) + 1
    most_tokens = max(
        max(sizes.batches) * sizes.context, *(count * tokens for count, tokens in sizes.prefills)
    )
    decoder = bench_model.random_decoder(shape, TritonOps(), dtype, device, longest)
    pool = bench_model.make_pool(shape, sizes.pages, dtype, device)
    runner = bench_model.make_runner(
        decoder,
        pool,
        max_num_seqs=max(*sizes.batches, sizes.cold_batch),
        max_num_tokens=max(count * tokens for count, tokens in sizes.prefills),
        max_len=longest,
        num_blocks=-(-most_tokens // BLOCK_SIZE) + max(sizes.batches),
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=device,
    )
    bench = StepBench(runner=runner, pool=pool, seconds=sizes.seconds, at_least=sizes.at_least)
    _check_graphs(bench, shape, sizes, report)
    _decode(bench, shape, sizes, report, deadline)
    _prefill(bench, shape, sizes, report, deadline)
    _cold(bench, shape, sizes, report, deadline)


def _check_graphs(bench: Any, shape: ModelShape, sizes: Sizes, report: Report) -> None:
    """One capture serves adapters that came later: the same tokens as launched one by one."""
    from loraplex.engine.gpu.bench_steps import installed

    batch = min(64, max(sizes.batches))
    contexts = [sizes.context] * batch

    def tokens() -> tuple[list[int | None], list[int | None]]:
        """With adapters and without; the same adapters every time."""
        torch.manual_seed(0)
        with installed(bench.pool, [16, 8]) as digests:
            uses = [(digests[0], digests[1], None)[i % 3] for i in range(batch)]
            return bench.tokens(contexts, uses), bench.tokens(contexts, [None] * batch)

    eager, base = tokens()
    start = time.perf_counter()
    bench.runner.graphs.capture()
    captured_s = time.perf_counter() - start
    captured, _ = tokens()
    differing = sum(a != b for a, b in zip(eager, captured, strict=True))
    moved = sum(a != b for a, b in zip(eager, base, strict=True))
    report.add(
        shape=shape.name, case="graphs", batch=batch, capture_s=captured_s,
        rows_that_differ_from_eager=differing, rows_that_adapters_change=moved,
    )  # fmt: skip
    if batch > 1 and moved == 0:
        raise AssertionError("adapters change no token: the comparison would prove nothing")
    # Random logits are full of near ties, which rounding turns over; a wrong adapter turns over
    # nearly every row.
    if differing > max(1, batch // 5):
        raise AssertionError(f"{differing} of {batch} tokens differ between a graph and no graph")


def _decode(bench: Any, shape: ModelShape, sizes: Sizes, report: Report, deadline: float) -> None:
    from loraplex.engine.gpu.bench_steps import installed
    from loraplex.kernels.gpu.roofline import H200, decode_step_us

    for batch in sizes.batches:
        if time.monotonic() > deadline:
            report.not_reached.append(f"{shape.name} decode {batch}")
            continue
        contexts = [sizes.context] * batch
        base = bench.step(contexts, [None] * batch)
        floor = decode_step_us(H200, shape, contexts) / 1e3
        report.add(
            shape=shape.name, case="decode", batch=batch, adapters="none", ms=base.median,
            p99_ms=base.p99, floor_ms=floor, fraction=floor / base.median,
        )  # fmt: skip
        for wish in wishes(batch, sizes.pages, sizes.popular):
            with installed(bench.pool, wish.ranks) as digests:
                times = bench.step(contexts, [digests[i] for i in wish.chosen])
            ranks = [wish.ranks[i] for i in sorted(set(wish.chosen))]
            floor = decode_step_us(H200, shape, contexts, ranks) / 1e3
            report.add(
                shape=shape.name, case="decode", batch=batch, adapters=wish.name,
                distinct=len(ranks), ms=times.median, p99_ms=times.p99, floor_ms=floor,
                fraction=floor / times.median, tax=times.median / base.median - 1,
            )  # fmt: skip


def _prefill(bench: Any, shape: ModelShape, sizes: Sizes, report: Report, deadline: float) -> None:
    from loraplex.engine.gpu.bench_steps import installed

    for count, tokens in sizes.prefills:
        if time.monotonic() > deadline:
            report.not_reached.append(f"{shape.name} prefill {count} x {tokens}")
            continue
        base = bench.step([tokens] * count, [None] * count, tokens)
        with installed(bench.pool, [16] * count) as digests:
            adapted = bench.step([tokens] * count, list(digests), tokens)
        report.add(
            shape=shape.name, case="prefill", prompts=count, tokens=tokens, ms=base.median,
            lora_ms=adapted.median, tax=adapted.median / base.median - 1,
            tokens_s=count * tokens / adapted.median * 1e3,
        )  # fmt: skip


def _cold(bench: Any, shape: ModelShape, sizes: Sizes, report: Report, deadline: float) -> None:
    from loraplex.engine.gpu.bench_steps import cold_loads, installed

    if time.monotonic() > deadline:
        report.not_reached.append(f"{shape.name} cold loads")
        return
    batch = sizes.cold_batch
    resident = min(batch, sizes.pages - 1)
    with installed(bench.pool, [16] * resident) as digests:
        chosen = [digests[i % resident] for i in range(batch)]
        found = cold_loads(bench, 16, chosen, sizes.context, sizes.cold_loads)
    report.add(
        shape=shape.name, case="cold load r16", batch=batch, usable_ms=found.usable_ms,
        landed_ms=found.landed_ms, quiet_p99_ms=found.quiet.p99, loading_p99_ms=found.loading.p99,
        p99_ratio=found.loading.p99 / found.quiet.p99,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loraplex.engine.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="fewer batch sizes, less repetition")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no size after that")
    parser.add_argument("--dry-run", action="store_true", help="once, tiny, in the interpreter")
    parser.add_argument("--all", action="store_true", help="self-test, kernel and engine benches")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--commit", help="of this source, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON file; with --all a folder")
    chosen = parser.parse_args(arguments)
    if chosen.all:
        from loraplex.engine.gpu.bench_all import run_all

        if chosen.out is None:
            parser.error("--all needs --out FOLDER")
        return run_all(chosen.out, dry_run=chosen.dry_run, peers=chosen.peer, commit=chosen.commit)
    device = torch.device("cpu" if chosen.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run runs it once, tiny, in the interpreter")
    shapes = [TINY] if chosen.dry_run else [SHAPES[n] for n in chosen.shape or DEFAULT_SHAPES]
    sizes = DRY if chosen.dry_run else QUICK if chosen.quick else FULL
    dtype = torch.float32 if chosen.dry_run else getattr(torch, chosen.dtype)
    report, started = Report(), time.monotonic()
    report.journal = chosen.out and chosen.out.with_suffix(".jsonl")
    for i, shape in enumerate(shapes):
        # The time is shared out: a large model must not take all of it.
        deadline = started + chosen.seconds * (i + 1) / len(shapes)
        print(f"\n{shape.name}", flush=True)
        torch.manual_seed(0)
        try:
            bench_shape(shape, sizes, dtype, device, report, deadline)
        except Exception as error:  # the other shapes go on
            traceback.print_exc()
            report.errors[shape.name] = f"{type(error).__name__}: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    facts = versions(device)
    if chosen.commit:
        facts["commit"] = chosen.commit
    write_report(
        {
            "bench": "engine",
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            **facts,
            "seconds": round(time.monotonic() - started, 1),
            "rows": report.rows,
            "errors": report.errors,
            "not_reached": report.not_reached,
        },
        chosen.out,
    )
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())

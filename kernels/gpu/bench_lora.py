"""LoRA in decode and prefill: ours, beside torch.bmm and other servers' kernels.

What adapters cost is the time of an operation with them, shrink included, minus that of the same
operation without: the deltas ride in kernels that run anyway. Decode is judged by the bytes of the
distinct adapters, which have to come from memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loraplex.kernels.gpu.attention_work import attention_work
from loraplex.kernels.gpu.bench_context import BLOCK_SIZE, MOST_ERROR, Bench, WrongResult
from loraplex.kernels.gpu.bench_timing import Pass, num_passes
from loraplex.kernels.gpu.expected import relative_error
from loraplex.kernels.gpu.layer_checks import (
    Pair,
    check_add_norm,
    check_rope_kv,
    check_swiglu,
    fill,
)
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.peers import LoraProblem
from loraplex.kernels.gpu.roofline import (
    GROUPS,
    expand_bytes,
    linear_flops,
    lora_bytes,
    lora_flops,
    shrink_bytes,
)
from loraplex.kernels.gpu.shrink import shrink
from loraplex.kernels.gpu.work import LoraWork, lora_work
from loraplex.kernels.ops import GATE_UP, QKV, Module
from loraplex.kernels.random_step import (
    LayerStep,
    Run,
    make_activations,
    make_adapters,
    make_attention,
    make_lora,
    random_tensor,
)

ARENA_BYTES = 24 << 30  # adapters of one measurement, at most
MAX_PROBLEMS = 320  # copies of the weights for other servers' kernels: preparing them takes time

Operation = Callable[[LayerStep, int], object]


@dataclass(frozen=True, slots=True, eq=False)
class LoraSteps:
    """Copies of one step, each with adapters of its own, and the step without adapters."""

    adapted: list[LayerStep]
    plain: LayerStep
    num_layers: int

    def places(self, count: int) -> list[tuple[LayerStep, int]]:
        """Pairs of step and layer whose adapters lie in different memory, then again from the
        first.
        """
        every = [(step, layer) for layer in range(self.num_layers) for step in self.adapted]
        return [every[i % len(every)] for i in range(count)]


def make_steps(
    bench: Bench,
    runs: Sequence[Run],
    ranks: Sequence[int],
    *,
    modules: Sequence[Sequence[Module]] | None = None,
    shuffled: bool = True,
) -> LoraSteps:
    """runs: as for `make_lora`, adapters counted from 0; `ranks` of each."""
    shape, device = bench.shape, bench.device
    per_layer = lora_bytes(shape, [-(-rank // 16) * 16 for rank in ranks], bench.dtype.itemsize)
    wanted = num_passes(min(shrink_bytes(shape, (Module.O,), ranks), per_layer))
    fitting = max(2, ARENA_BYTES // per_layer)
    count = 2 if bench.dry_run else min(wanted, fitting)
    layers = min(shape.num_layers, count)
    copies = -(-count // layers)
    adapters = make_adapters(
        shape, list(ranks) * copies, bench.dtype, device, num_layers=layers,
        modules=None if modules is None else list(modules) * copies, shuffled=shuffled,
    )  # fmt: skip
    rows = sum(run[0] for run in runs)
    given = make_activations(shape, rows, bench.dtype, device)
    ops = TritonOps()
    queries = [1] * rows if rows <= 256 else [rows]
    batch, blocks = make_attention([max(20, q) for q in queries], queries, BLOCK_SIZE, device)
    kv = ops.kv_cache(
        layers, blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, bench.dtype, device
    )
    batch.plan = attention_work(batch, shape.num_heads, kv)
    fill(kv)

    def step(own_runs: Sequence[Run]) -> LayerStep:
        lora = make_lora(adapters, own_runs)
        lora.plan = lora_work(lora, rows, device)  # now: a capture must not copy from the host
        return LayerStep(shape, ops, given, lora, batch, kv)

    shifted = [
        [(n, tuple(a + i * len(ranks) for a in adapters_of)) for n, adapters_of in runs]
        for i in range(copies)
    ]
    return LoraSteps([step(own) for own in shifted], step([(rows, ())]), layers)


def _operation(group: str) -> Operation:
    modules = GROUPS[group]

    def run(step: LayerStep, layer: int) -> object:
        t = step.shrink(modules, layer)
        if modules == QKV:
            return step.rope_kv_write(t, layer)
        if modules == GATE_UP:
            return step.swiglu(t, layer)
        return step.add_rms_norm(modules[0], t, layer)

    return run


def _check(bench: Bench, group: str, step: LayerStep) -> None:
    modules = GROUPS[group]
    t = step.shrink(modules)
    pairs: list[Pair]
    if modules == QKV:
        pairs = check_rope_kv(step, t)
    elif modules == GATE_UP:
        pairs = check_swiglu(step, t)
    else:
        pairs = check_add_norm(modules[0], step, t)
    for got, want in pairs:
        bench.check(group, got, want)


def _whole(step: LayerStep, layer: int) -> None:
    step.adapted(layer)


def _cost(bench: Bench, steps: LoraSteps, run: Operation, count: int) -> tuple[float, float]:
    """(with adapters minus without, without) in microseconds."""
    places = steps.places(count)
    with_lora = bench.time([partial(run, step, layer) for step, layer in places]).us
    without = bench.time([partial(run, steps.plain, layer) for _, layer in places]).us
    return with_lora - without, without


def _shrink_alone(bench: Bench, steps: LoraSteps, group: str, count: int) -> float:
    def run(step: LayerStep, layer: int) -> object:
        assert step.lora is not None
        work = step.lora.plan
        assert isinstance(work, LoraWork)
        x = step.input_of(GROUPS[group])
        return shrink(x, step.lora.tables, work, layer, GROUPS[group])

    return bench.time([partial(run, step, layer) for step, layer in steps.places(count)]).us


def bench_decode(bench: Bench) -> None:
    """Every row its own adapter, group by group."""
    full = [(16, b) for b in (1, 64, 8, 32, 256)] + [(64, b) for b in (1, 32, 64, 256)]
    for rank, rows in bench.sizes("decode", full, [(16, 1), (16, 64)], [(16, 2)]):
        steps = make_steps(bench, [(1, (i,)) for i in range(rows)], [rank] * rows)
        for group, modules in GROUPS.items():
            _check(bench, group, steps.adapted[0])
            size = shrink_bytes(bench.shape, modules, [rank] * rows)
            nbytes = size + expand_bytes(bench.shape, modules, [rank] * rows)
            count = num_passes(nbytes)
            us, plain = _cost(bench, steps, _operation(group), count)
            others = _others(bench, group, rank, rows)
            bench.add(
                "decode", bench.machine.floor_us(nbytes), group=group, rank=rank, rows=rows, us=us,
                shrink_us=_shrink_alone(bench, steps, group, count), plain_us=plain, **others,
            )  # fmt: skip
        del steps


def _others(bench: Bench, group: str, rank: int, rows: int) -> dict[str, float | str]:
    """Microseconds of torch.bmm and of each peer's configurations on the same shapes."""
    shape, modules = bench.shape, GROUPS[group]
    widths_in = {shape.widths(module)[0] for module in modules}
    (width,) = widths_in
    nbytes = shrink_bytes(shape, modules, [rank] * rows) + expand_bytes(
        shape, modules, [rank] * rows
    )
    count = 2 if bench.dry_run else min(MAX_PROBLEMS, num_passes(nbytes))
    problems = [_problem(bench, width, modules, rank, rows) for _ in range(count)]
    found: dict[str, float | str] = {"bmm_us": bench.time([_bmm(p) for p in problems]).us}
    want = problems[0].expected()
    for peer in bench.peers:
        try:
            ready = [peer.variants(problem) for problem in problems]
        except Exception as error:  # a peer that does not run here is no reason to stop
            found[f"{peer.name} us"] = _named(error)
            continue
        for name in ready[0]:
            try:
                passes: list[Pass] = [runs[name] for runs in ready]
                error_here = relative_error(ready[0][name](), want)
                if not error_here <= MOST_ERROR[bench.dtype]:
                    raise WrongResult(f"relative error {error_here:.2g}")
                found[f"{peer.name} {name} us"] = bench.time(passes).us
            except Exception as error:
                found[f"{peer.name} {name} us"] = _named(error)
    return found


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _problem(
    bench: Bench, width: int, modules: Sequence[Module], rank: int, rows: int
) -> LoraProblem:
    def rand(*size: int, std: float = 1.0) -> Tensor:
        return random_tensor(*size, dtype=bench.dtype, device=bench.device, std=std)

    outs = [bench.shape.widths(module)[1] for module in modules]
    return LoraProblem(
        x=rand(rows, width),
        a=[rand(rows, rank, width, std=width**-0.5) for _ in outs],
        b=[rand(rows, out, rank, std=0.25) for out in outs],
        rows=list(range(rows)),
        scaling=1.5,
        # A server that is to hold more adapters than one step uses.
        max_adapters=256 if rows == 1 else max(8, rows),
    )


def _bmm(problem: LoraProblem) -> Pass:
    """One adapter a row in plain torch: two batched products a module, weights in row order."""
    y = [
        torch.zeros(len(problem.rows), 1, width, dtype=problem.x.dtype, device=problem.x.device)
        for width in problem.widths
    ]
    x = problem.x[:, None]

    def run() -> None:
        for a, b, out in zip(problem.a, problem.b, y, strict=True):
            out.baddbmm_(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2), alpha=problem.scaling)

    return run


def bench_popularity(bench: Bench) -> None:
    """All of a layer's LoRA, adapters shared by rows, and ranks mixed."""
    sharing: list[tuple[int, int]] = [(64, 1), (256, 1), (256, 4), (256, 16), (64, 64)]
    for rows, adapters in bench.sizes("popularity", sharing, [(64, 1), (256, 16)], [(2, 1)]):
        each = rows // adapters
        runs: list[Run] = [(each, (i,)) for i in range(adapters)]
        _layer_cost(bench, "popularity", runs, [16] * adapters, rows=rows, adapters=adapters)
    mixed = [(8, 16, 64)[i % 3] for i in range(64)]
    for count in bench.sizes("mixed ranks", (64,), (64,), (2,)):
        runs = [(1, (i,)) for i in range(count)]
        _layer_cost(bench, "mixed ranks 8, 16, 64", runs, mixed[:count], rows=count)


def bench_compositions(bench: Bench) -> None:
    """Two adapters a row; adapters of q and v only; pages in order against pages anywhere."""
    for rows in bench.sizes("compositions", (64,), (), (1,)):
        pairs: list[Run] = [(1, (2 * i, 2 * i + 1)) for i in range(rows)]
        _layer_cost(bench, "two adapters a row", pairs, [16] * 2 * rows, rows=rows)
    for rows in bench.sizes("q and v only", (64,), (), (1,)):
        runs: list[Run] = [(1, (i,)) for i in range(rows)]
        only = [(Module.Q, Module.V)] * rows
        _layer_cost(bench, "q and v only", runs, [16] * rows, modules=only, rows=rows)
    for rows in bench.sizes("page order", (256,), (), (1,)):
        runs = [(1, (i,)) for i in range(rows)]
        for shuffled in (False, True):
            name = "pages anywhere" if shuffled else "pages in order"
            _layer_cost(bench, name, runs, [16] * rows, shuffled=shuffled, rows=rows)


def _layer_cost(
    bench: Bench,
    case: str,
    runs: Sequence[Run],
    ranks: Sequence[int],
    *,
    modules: Sequence[Sequence[Module]] | None = None,
    shuffled: bool = True,
    **labels: int,
) -> None:
    steps = make_steps(bench, runs, ranks, modules=modules, shuffled=shuffled)
    for group in GROUPS:
        _check(bench, group, steps.adapted[0])
    adapted = [tuple(Module)] * len(ranks) if modules is None else modules
    nbytes = sum(
        rank * bench.shape.rank_parameters(own) * bench.dtype.itemsize
        for rank, own in zip(ranks, adapted, strict=True)
    )
    us, plain = _cost(bench, steps, _whole, num_passes(nbytes))
    bench.add(case, bench.machine.floor_us(nbytes), **labels, us=us, plain_us=plain)


def bench_prefill(bench: Bench) -> None:
    """A prompt's rows under 1, 4 or 16 adapters, as a share of the base linears' time."""
    full = [(2048, 4, 16), (512, 4, 16), (8192, 4, 16), (2048, 1, 16), (2048, 16, 16)]
    full.append((2048, 4, 64))
    for rows, adapters, rank in bench.sizes("prefill", full, full[:1], [(70, 1, 16)]):
        each = rows // adapters
        steps = make_steps(bench, [(each, (i,)) for i in range(adapters)], [rank] * adapters)
        for group in GROUPS:
            _check(bench, group, steps.adapted[0])
        count = 2 if bench.dry_run else 4
        us, plain = _cost(bench, steps, _whole, count)
        shape, given = bench.shape, steps.plain.given
        reads = (2 * shape.hidden + shape.q_width + shape.intermediate) * rows
        nbytes = reads * bench.dtype.itemsize + lora_bytes(shape, [rank] * adapters)
        linears = _linears_us(bench, given.x, given.attended, given.inner)
        bench.add(
            "prefill", bench.machine.floor_us(nbytes, lora_flops(shape, rows, rank)),
            rows=rows, adapters=adapters, rank=rank, us=us, plain_us=plain, linears_us=linears,
            tax=us / (linears + plain),
            linears_tflop_s=linear_flops(shape, rows) / linears / 1e6,
        )  # fmt: skip


def _linears_us(bench: Bench, x: Tensor, attended: Tensor, inner: Tensor) -> float:
    inputs = {"qkv": x, "o": attended, "gate_up": x, "down": inner}
    weights = {
        name: random_tensor(out, width, dtype=bench.dtype, device=bench.device, std=width**-0.5)
        for name, (width, out) in bench.shape.linears().items()
    }

    def run() -> None:
        for name, weight in weights.items():
            torch.nn.functional.linear(inputs[name], weight)

    return bench.time([run] * 2).us

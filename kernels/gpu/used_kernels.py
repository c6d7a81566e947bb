"""The launches a model's steps consist of, found by running its operations on meta tensors.

Nothing is computed and no GPU is asked: the operations themselves say which kernels they would
start, with which types and configurations, so this list cannot go out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loraplex.kernels.gpu.launch import Launch, recording
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.sample_checks import SampleStep
from loraplex.kernels.gpu.step_inputs import append_blocks, take_inputs
from loraplex.kernels.model_shapes import ModelShape
from loraplex.kernels.ops import Module, Ops
from loraplex.kernels.random_step import (
    RMS_EPS,
    LayerStep,
    Run,
    make_activations,
    make_adapters,
    make_attention,
    make_lora,
)

META = torch.device("meta")
RANKS = (8, 16, 40)
# Sequences of a decode step and longest context. The first shows every path through the decode
# kernels: rows alone, sharing, composed and of the base; contexts split and not.
DECODES = ((8, 1000), (1, 8000), (1, 100), (64, 1000), (256, 500))
# Tokens of a prefill. The first is also run as a chunk of a longer prompt, beside decodes.
PREFILLS = (200, 2048, 20)


def recorded_launches(
    shape: ModelShape,
    dtype: torch.dtype,
    ops: Ops | None = None,
    *,
    decodes: Sequence[tuple[int, int]] = DECODES,
    prefills: Sequence[int] = PREFILLS,
    block_size: int = 16,
) -> list[Launch]:
    """Every launch of steps of the given sizes: one layer, what stands before and after it, and
    sampling.

    Steps hold base rows, rows of their own adapter, rows that share one and compositions; the same
    steps without adapters come along.
    """
    ops = TritonOps() if ops is None else ops
    with recording() as launches:
        for step in steps_of(shape, dtype, META, ops, decodes, prefills, block_size):
            step.adapted()
            step.attention()
            ops.rms_norm(step.given.x, step.given.norm, RMS_EPS)
            for name in shape.linears():
                x, weight, bias = step.linear_operands(name)
                ops.linear(weight, bias)(x)
            _start_inputs(shape, dtype, ops, step.given.x.shape[0], block_size)
        for rows in sorted({rows for rows, _ in decodes}):
            SampleStep(rows, shape.vocab_size, dtype, META).start()
    return launches


def steps_of(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    decodes: Sequence[tuple[int, int]],
    prefills: Sequence[int],
    block_size: int,
) -> Iterator[LayerStep]:
    """Steps of one layer on random data: decodes, chunks beside decodes, prefills; each with
    adapters and without.
    """
    adapters = make_adapters(
        shape, RANKS, dtype, device, num_layers=1,
        modules=[(Module.Q, Module.V), tuple(Module), tuple(Module)],
    )  # fmt: skip
    work = [(mixed_runs(rows), _spread(context, rows), [1] * rows) for rows, context in decodes]
    for rows in prefills[:1]:
        runs = [*mixed_runs(4), (rows, ()), (rows, (0, 2))]
        work.insert(1, (runs, [9, 30, 5, 17, rows + 25, rows], [1] * 4 + [rows] * 2))
    work += [([(rows, (0, 2))], [rows], [rows]) for rows in prefills]
    for runs, contexts, queries in work:
        given = make_activations(shape, sum(queries), dtype, device)
        for lora in (make_lora(adapters, runs), None):
            batch, blocks = make_attention(contexts, queries, block_size, device)
            kv = ops.kv_cache(
                1, blocks, block_size, shape.num_kv_heads, shape.head_dim, dtype, device
            )
            yield LayerStep(shape, ops, given, lora, batch, kv)


def mixed_runs(rows: int) -> list[Run]:
    """Rows of a decode step by composition: base, alone, composed, and the rest sharing one."""
    wanted: list[Run] = [(1, (1,)), (1, ()), (1, (0, 2)), (1, (0,)), (rows, (2,))]
    runs: list[Run] = []
    for count, composition in wanted:
        count = min(count, rows - sum(done for done, _ in runs))
        if count:
            runs.append((count, composition))
    return runs


def _spread(context: int, rows: int) -> list[int]:
    """Contexts from a few tokens up to `context`, the longest first."""
    return [max(1, context - i * context // rows) for i in range(rows)]


def _start_inputs(
    shape: ModelShape, dtype: torch.dtype, ops: Ops, rows: int, block_size: int
) -> None:
    """What a step does before its first layer."""

    def ints(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    table = torch.empty(shape.vocab_size, shape.hidden, dtype=dtype, device=META)
    ids, tables = ints(rows, dtype=torch.int64), ints(rows + 1, 4096)
    ops.embed(ids, table)
    append_blocks(ints(rows, 4), ints(rows), tables)
    last = ints(rows + 1, dtype=torch.int64)
    sent, states, contexts = ints(rows), ints(rows), ints(rows)
    take_inputs(sent, states, contexts, last, tables, ids, ints(rows, 4096), block_size)

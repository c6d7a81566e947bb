"""Sampling on the device against a sort of the vocabulary, greedy and drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.gpu.bench_context import Bench
from loraplex.kernels.gpu.bench_timing import Pass, num_passes
from loraplex.kernels.gpu.expected import excess
from loraplex.kernels.gpu.sample_checks import SampleStep

TOP_P, TOP_K = 0.9, 50


def bench_sampler(bench: Bench) -> None:
    vocab = bench.shape.vocab_size
    for rows in bench.sizes("sampler", (1, 64, 256), (64,), (3,)):
        nbytes = rows * vocab * bench.dtype.itemsize
        count = 2 if bench.dry_run else min(64, num_passes(nbytes))
        steps = [SampleStep(rows, vocab, bench.dtype, bench.device) for _ in range(count)]
        for got, want in steps[0].check():
            if excess(got, want, bench.dtype) > 1:
                raise AssertionError("sampling disagrees with torch")
        floor = bench.machine.floor_us(nbytes)
        greedy = bench.time([step.likeliest for step in steps]).us
        bench.add("sampler", floor, what="greedy", rows=rows, us=greedy)
        drawn = bench.time([step.draw for step in steps]).us
        sort = bench.time([_sorting(step.rows.logits) for step in steps]).us
        bench.add("sampler", floor, what="top-k and greedy rows", rows=rows, us=drawn, sort_us=sort)


def _sorting(logits: Tensor) -> Pass:
    """What a sampler without kernels of its own does: sort, cut, draw."""

    def run() -> Tensor:
        values, order = torch.sort(logits.float(), descending=True)
        probabilities = torch.softmax(values, -1)
        outside = probabilities.cumsum(-1) - probabilities > TOP_P
        outside[:, TOP_K:] = True
        weights = probabilities.masked_fill(outside, 0.0)
        noise = torch.empty_like(weights).exponential_()
        return order.gather(1, (weights / noise).argmax(-1, keepdim=True))

    return run

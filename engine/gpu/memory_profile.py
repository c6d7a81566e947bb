"""Measures what a step needs: the largest one is run with made-up sequences, before the KV cache
and the adapters get what is left.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

from loraplex.adapters.pool import PagePool
from loraplex.engine.config import EngineConfig
from loraplex.engine.gpu.dummy_steps import EVERYTHING, DummySteps, dummy_adapter
from loraplex.engine.gpu.graphs import decode_buckets
from loraplex.engine.gpu.memory_plan import MeasuredGpu
from loraplex.engine.gpu.runner import GpuRunner
from loraplex.engine.machine import Memory, device_memory
from loraplex.engine.memory import size

logger = logging.getLogger(__name__)

GRAPH_BYTES = 8 << 20  # a captured step's own launches and arguments [est]

MakeRunner = Callable[[PagePool, int], GpuRunner]  # pool, blocks of the KV cache -> without graphs


def measure_gpu(
    config: EngineConfig,
    before: Memory,
    pool: PagePool,
    make_runner: MakeRunner,
    max_len: int,
    device: torch.device,
) -> MeasuredGpu:
    """before: the GPU's memory when nothing was loaded. pool: a small one, to be thrown away.
    max_len: tokens of the longest sequence.
    """
    max_num_seqs, max_num_tokens = config.step_sizes

    def largest_step() -> None:
        runner = make_runner(pool, 1)
        with dummy_adapter(pool) as use:
            steps = DummySteps(runner, max_len)
            steps.run(largest_runs(max_num_seqs, max_num_tokens, max_len), [(use,)], **EVERYTHING)

    step = peak_bytes(largest_step, device)
    graphs = graph_bytes(config, step)
    logger.debug("a step takes %s, graphs %s", size(step), size(graphs))
    now = device_memory(device)
    weights = before.free - now.free
    return MeasuredGpu(before=before, now=now, weights=weights, step=step, graphs=graphs)


def graph_bytes(config: EngineConfig, step: int) -> int:
    """What captured steps need, given what the largest step does. A captured step of S rows needs
    about what S rows of the largest one do, once for all.
    """
    max_num_seqs, max_num_tokens = config.step_sizes
    num_graphs = len(decode_buckets(max_num_seqs))
    return num_graphs * GRAPH_BYTES + step * max_num_seqs // max_num_tokens


def largest_runs(max_num_seqs: int, max_num_tokens: int, max_len: int) -> list[tuple[int, int]]:
    """(new tokens, tokens in all): as many sequences and tokens as a step may hold."""
    runs: list[tuple[int, int]] = []
    seqs, tokens = max_num_seqs, max_num_tokens
    while seqs and tokens:
        new = min(max_len, tokens - (seqs - 1))  # one at least for each of the others
        runs.append((new, new))
        seqs, tokens = seqs - 1, tokens - new
    return runs


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Memory that `run` holds at its worst moment, beyond what is held before it."""
    cuda: Any = torch.cuda
    cuda.synchronize(device)
    cuda.empty_cache()
    cuda.reset_peak_memory_stats(device)
    before = cuda.memory_allocated(device)
    run()
    cuda.synchronize(device)
    peak: int = cuda.max_memory_allocated(device) - before
    gc.collect()  # what `run` made may refer to itself
    cuda.empty_cache()
    return peak

"""What is done once, so that no request waits for it: capture, and a step of every kind.

Kernels are compiled for combinations of types and options, of which a model uses few; each of those
comes up in one of the steps here. `tests/engine/gpu/test_warm_up.py` holds other steps against the
list.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loraplex.adapters.pool import PagePool
from loraplex.engine.api import AdapterUse
from loraplex.engine.gpu.dummy_steps import EVERYTHING, DummySteps, dummy_adapter
from loraplex.engine.gpu.graphs import decode_buckets
from loraplex.engine.gpu.memory_profile import largest_runs
from loraplex.engine.gpu.runner import GpuRunner
from loraplex.engine.lane import Lanes
from loraplex.engine.probe import paged_logits, probe_tokens

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Runs = list[tuple[int, int]]  # (new tokens, tokens in all) of each sequence

SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": 0},
    {"logit_bias": {0: 1.0}},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "logit_bias": {0: 1.0}},
    {"repetition_penalty": 1.1},
    EVERYTHING,
)
PROMPTS = (3, 17, 40, 100)  # tokens: in one small tile, in two, in a large one, in two


def warm_up(
    runner: GpuRunner,
    pool: PagePool,
    max_num_seqs: int,
    max_num_tokens: int,
    max_len: int,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Capture the graphs, run every kind of step, and what a probe of an adapter runs.

    max_len: tokens of the longest sequence.
    """
    started = time.perf_counter()
    runner.graphs.capture(on_progress)
    steps = DummySteps(runner, max_len)
    with dummy_adapter(pool) as use:
        for runs, uses, sampling in _kinds(use, max_num_seqs, max_num_tokens, max_len):
            steps.run(runs, uses, **sampling)
        _probe(runner, pool, use)
    logger.info("warmed up in %.1f s", time.perf_counter() - started)


@torch.inference_mode()
def _probe(runner: GpuRunner, pool: PagePool, use: AdapterUse) -> None:
    """Its batches are made without the runner, with 64-bit numbers: other configurations."""
    decoder = runner.decoder
    tokens = probe_tokens(decoder.config.vocab_size).to(decoder.embedding.device)
    lanes = Lanes(pool, decoder.lane_model)
    for digest in (None, use.digest):
        paged_logits(decoder, pool, runner.kv_cache.block_size, tokens, digest, lanes)


def _kinds(
    use: AdapterUse, max_num_seqs: int, max_num_tokens: int, max_len: int
) -> Iterator[tuple[Runs, list[tuple[AdapterUse, ...]], dict[str, Any]]]:
    def fits(runs: Runs) -> bool:
        return (
            len(runs) <= max_num_seqs
            and sum(new for new, _ in runs) <= max_num_tokens
            and max(total for _, total in runs) <= max_len
        )

    base: list[tuple[AdapterUse, ...]] = [()]
    adapted: list[tuple[AdapterUse, ...]] = [(use,)]
    mixed = base + adapted
    for rows in decode_buckets(max_num_seqs):
        yield [(1, 2)] * rows, mixed, {}
    for sampling in SAMPLING:
        for rows in (1, 2):
            if rows <= max_num_seqs:
                yield [(1, 2)] * rows, mixed, sampling
    for prompt in PROMPTS:
        for runs in (
            [(prompt, prompt)],
            [(1, 2)] * 3 + [(prompt, prompt)],
            [(prompt, prompt), (prompt, prompt + 1)],
        ):
            for uses in (base, adapted, mixed):
                if fits(runs):
                    yield runs, uses, {}
    largest = largest_runs(max_num_seqs, max_num_tokens, max_len)
    yield largest, mixed, {"prompt_logprobs": 1}

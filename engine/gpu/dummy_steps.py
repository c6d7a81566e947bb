"""Steps of made-up sequences through the real runner: to measure what they take, and to have
compiled what they use. Before anybody is served: they write to the first block of the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

from loraplex.adapters.pool import PagePool
from loraplex.adapters.weights import LoadedAdapter, LoadedModule
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.gpu.runner import GpuRunner
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence as EngineSequence

DIGEST = "warm-up"
RANK = 16

# Everything that makes the sampler work.
EVERYTHING: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {0: 1.0},
    "logprobs": 5,
}


class DummySteps:
    """max_len: tokens of the longest sequence."""

    def __init__(self, runner: GpuRunner, max_len: int) -> None:
        self.max_len = max_len
        self._runner = runner
        self._block_size = runner.kv_cache.block_size
        self._numbers = count(start=-1, step=-1)  # no real sequence has such a number

    def run(
        self,
        runs: Sequence[tuple[int, int]],
        uses: Sequence[tuple[AdapterUse, ...]] = ((),),
        **sampling: Any,
    ) -> None:
        """One step, waited for. runs: (new tokens, tokens in all) of each sequence, all of which
        sample. uses: their adapters, in turn.
        """
        sequences = [
            (self.sequence(total, uses[i % len(uses)], **sampling), new)
            for i, (new, total) in enumerate(runs)
        ]
        self._runner.collect(self._runner.launch(self.schedule(sequences)))
        self._runner.forget([seq.seq_id for seq, _ in sequences])

    def schedule(self, sequences: Sequence[tuple[EngineSequence, int]]) -> Schedule:
        """Each runs its last so many tokens."""
        scheduled = [
            ScheduledSequence(seq, seq.num_tokens - new, new, samples=True)
            for seq, new in sequences
        ]
        scheduled.sort(key=lambda s: (not s.is_decode, s.seq.composition))
        num_decodes = sum(s.is_decode for s in scheduled)
        return Schedule(scheduled, num_decodes, sum(new for _, new in sequences), [])

    def sequence(
        self, num_tokens: int, uses: tuple[AdapterUse, ...], **sampling: Any
    ) -> EngineSequence:
        number = next(self._numbers)
        request = GenerationRequest(
            request_id=str(number),
            prompt_token_ids=[0] * num_tokens,
            sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
            adapters=uses,
        )
        seq = EngineSequence.from_request(
            request,
            seq_id=number,
            arrival_time=0.0,
            max_model_len=num_tokens + 1,
            eos_token_ids=frozenset(),
            seed=0,
        )
        seq.block_table = [0] * -(-num_tokens // self._block_size)
        return seq


@contextmanager
def dummy_adapter(pool: PagePool) -> Iterator[AdapterUse]:
    """An adapter of zeros that adapts the first layer, for as long as the block runs."""
    modules = {
        (0, kind): LoadedModule(
            torch.zeros(RANK, wide, dtype=pool.dtype), torch.zeros(RANK, out, dtype=pool.dtype),
            RANK, 1.0,
        )
        for kind, (wide, out) in enumerate(pool.module_shapes)
    }  # fmt: skip
    pool.install(DIGEST, pool.build_image(LoadedAdapter(DIGEST, RANK, modules)))
    try:
        yield AdapterUse(DIGEST)
    finally:
        pool.remove(DIGEST)

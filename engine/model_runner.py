"""Runs one step: batch, forward pass, sampling. Owns the decoder, the KV cache and the sampler.

Implements `seams.Runner`. Knows nothing about queues, blocks or adapters beyond what the schedule
says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.engine.api import TokenLogprobs
from loraplex.engine.batch import BatchBuilder
from loraplex.engine.lane import Lane, Lanes
from loraplex.engine.model import Decoder
from loraplex.engine.pooling import Pooler
from loraplex.engine.sampling import Sampler, prompt_targets, token_logprobs
from loraplex.engine.seams import Schedule, StepSample
from loraplex.kernels.ops import KVCache

# Rows of logits made at once for prompt log-probabilities: 64 rows of a 128k vocabulary are 32 MB.
PROMPT_LOGPROB_ROWS = 64


class ModelRunner:
    max_in_flight = 0  # on a CPU a step is over when `launch` returns

    def __init__(
        self, decoder: Decoder, kv_cache: KVCache, batches: BatchBuilder, sampler: Sampler
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self._lanes = Lanes(batches.pool, decoder.lane_model)
        self._batches = batches
        self._sampler = sampler
        self._pooler = Pooler()

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> list[StepSample]:
        """Run the step; `collect` has nothing left to wait for."""
        self._sampler.forget(schedule.released_seq_ids)
        self._pooler.forget(schedule.released_seq_ids)
        batch = self._batches.build(schedule)
        lane = self._lanes.find(batch.runs)
        hidden = self.decoder.forward(
            batch.token_ids, self.kv_cache, batch.attention, batch.lora, lane=lane
        )
        scheduled = schedule.scheduled
        ends = batch.attention.host_query_start[1:]
        rows = [end - 1 for s, end in zip(scheduled, ends, strict=True) if s.samples]
        samples = [StepSample()] * len(scheduled)
        if rows:
            everything = len(rows) == hidden.shape[0]
            logits = self.decoder.logits(
                hidden if everything else hidden[rows], lane and lane.at(rows)
            )
            places = [i for i, s in enumerate(scheduled) if s.samples]
            sampled = self._sampler.sample(logits, [scheduled[i].seq for i in places])
            for i, token_id, logprobs in zip(
                places, sampled.token_ids, sampled.logprobs, strict=True
            ):
                samples[i] = StepSample(token_id, logprobs)
        for i, s in enumerate(scheduled):
            if s.num_prompt_logprobs:
                first = ends[i] - s.num_tokens
                asking = range(first, first + s.num_prompt_logprobs)
                samples[i] = StepSample(
                    samples[i].token_id,
                    samples[i].logprobs,
                    self._prompt_logprobs(
                        hidden,
                        asking,
                        prompt_targets(s),
                        s.seq.sampling.prompt_logprobs or 0,
                        lane,
                    ),
                )
            if s.seq.request.pooling is not None:
                vector = self._pooler.add(s, hidden[ends[i] - s.num_tokens : ends[i]])
                if vector is not None:
                    samples[i] = StepSample(embedding=vector.numpy().astype("<f4").tobytes())
        return samples

    def collect(self, handle: list[StepSample]) -> list[StepSample]:
        return handle

    def _prompt_logprobs(
        self,
        hidden: Tensor,
        rows: range,
        targets: list[int],
        num_top: int,
        lane: Lane | None,
    ) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for first in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            part = targets[first : first + PROMPT_LOGPROB_ROWS]
            here = rows[first : first + len(part)]
            logits = self.decoder.logits(hidden[here.start : here.stop], lane and lane.at(here))
            found += token_logprobs(logits, part, [num_top] * len(part))
        return found

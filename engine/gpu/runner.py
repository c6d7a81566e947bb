"""Runs steps on a GPU without waiting for it: the host writes step n + 1 while the GPU runs n.

Implements `seams.Runner`. A step is one copy of numbers, one graph (or, with prompts or a lane in
it, the model's launches one by one), the output head and the sampler. Sampled tokens stay on the
device for the next step, so nothing here reads from it before `collect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.engine.gpu.attention_plan import AttentionPlanner
from loraplex.engine.gpu.device_logprobs import PromptLogprobs
from loraplex.engine.gpu.events import faults, mark, wait
from loraplex.engine.gpu.graphs import DecodeGraphs, GraphBackend
from loraplex.engine.gpu.host_step import HostStep, HostSteps
from loraplex.engine.gpu.metadata import Metadata, StepInputs
from loraplex.engine.gpu.state_rows import StateRows
from loraplex.engine.gpu.transfers import Arrival
from loraplex.engine.lane import Lane, Lanes
from loraplex.engine.model import Decoder
from loraplex.engine.model_runner import PROMPT_LOGPROB_ROWS
from loraplex.engine.pooling import Pooler
from loraplex.engine.sampling import Sampled, prompt_targets
from loraplex.engine.seams import Schedule, StepSample
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.kv_cache import PagedKVCache


class Sampler(Protocol):
    """`engine.gpu.sampler.DeviceSampler`."""

    def forget(self, state_rows: list[int]) -> None: ...
    def launch(
        self,
        logits: Tensor,
        items: list[tuple[Sequence, int, int]],
        last_tokens: Tensor | None = None,
    ) -> Any: ...
    def collect(self, handle: Any) -> Sampled: ...


@dataclass(frozen=True, slots=True, eq=False)
class StepHandle:
    num_scheduled: int
    places: list[int]  # of those that sample, in the schedule
    sampled: Any  # the sampler's handle; None: nobody samples
    prompt_logprobs: list[tuple[int, list[PromptLogprobs]]]  # by place
    embeddings: list[tuple[int, Arrival]]  # by place
    over: Any  # an event after all of the step


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """max_blocks: blocks of the longest sequence the engine accepts."""

    max_num_seqs: int
    max_num_tokens: int
    max_blocks: int


class GpuRunner:
    """batch_invariant: as the decoder's operations have it."""

    max_in_flight = 1

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: PagedKVCache,
        pool: PagePool,
        sampler: Sampler,
        graphs: GraphBackend,
        limits: RunnerLimits,
        device: torch.device,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.states = StateRows(limits.max_num_seqs)
        self._lanes = Lanes(pool, decoder.lane_model)
        self._pool = pool
        self._sampler = sampler
        self._pooler = Pooler()
        self._device = device
        attention = AttentionPlanner(
            decoder.config.num_heads, kv_cache, device, batch_invariant=batch_invariant
        )
        self._steps = HostSteps(
            pool, self.states, attention, kv_cache.block_size, small_only=batch_invariant
        )
        self._metadata = Metadata(
            pool,
            max_num_tokens=limits.max_num_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_blocks=limits.max_blocks,
            block_size=kv_cache.block_size,
            device=device,
        )
        self.graphs = DecodeGraphs(
            self._metadata,
            attention,
            graphs,
            self._forward,
            max_num_seqs=limits.max_num_seqs,
            max_context=limits.max_blocks * kv_cache.block_size,
            device=device,
        )

    def forget(self, seq_ids: Iterable[int]) -> None:
        """These sequences left the running set."""
        seq_ids = list(seq_ids)
        self._pooler.forget(seq_ids)
        self._sampler.forget(self.states.release(seq_ids))

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> StepHandle:
        """Raises: DeviceLost when the device failed for good."""
        with faults(self._device):
            self.forget(schedule.released_seq_ids)
            step = self._steps.build(schedule)
            lane = self._lanes.find(step.runs)
            inputs, hidden = self._run(step, lane)
            return StepHandle(
                num_scheduled=len(schedule.scheduled),
                places=[i for i, s in enumerate(schedule.scheduled) if s.samples],
                sampled=self._sample(step, inputs, hidden, lane),
                prompt_logprobs=self._prompt_logprobs(step, hidden, lane),
                embeddings=self._embeddings(step, hidden),
                over=mark(self._device),
            )

    def collect(self, handle: StepHandle) -> list[StepSample]:
        """Raises: DeviceLost when the device failed for good."""
        samples = [StepSample()] * handle.num_scheduled
        with faults(self._device):
            wait(handle.over)
            if handle.sampled is not None:
                sampled = self._sampler.collect(handle.sampled)
                for place, token_id, logprobs in zip(
                    handle.places, sampled.token_ids, sampled.logprobs, strict=True
                ):
                    samples[place] = StepSample(token_id, logprobs)
            for place, parts in handle.prompt_logprobs:
                found = [entry for part in parts for entry in part.collect()]
                samples[place] = StepSample(samples[place].token_id, samples[place].logprobs, found)
            for place, arrival in handle.embeddings:
                [vector] = arrival.wait()
                samples[place] = StepSample(embedding=vector.astype("<f4").tobytes())
        return samples

    def _run(self, step: HostStep, lane: Lane | None) -> tuple[StepInputs, Tensor]:
        """Send the step and run the model, `[rows, hidden]`; the real rows come first."""
        scheduled = step.schedule.scheduled
        arrivals = self._pool.arriving({d for s in scheduled for d in s.seq.digests})
        inputs = None if arrivals or lane is not None else self.graphs.find(step)
        if inputs is not None:
            self._metadata.send(step, inputs)
            return inputs, self.graphs.replay(inputs)

        def wait_for_adapters(layer: int) -> None:
            for arrival in arrivals:
                arrival.wait(layer)

        inputs = self._metadata.fresh(step)
        self._metadata.send(step, inputs)
        if lane is not None:
            wait_for_adapters(0)  # the embedding comes before it; parts arrive ahead of all layers
        return inputs, self._forward(inputs, wait_for_adapters if arrivals else None, lane)

    def _forward(
        self,
        inputs: StepInputs,
        before_layer: Callable[[int], None] | None = None,
        lane: Lane | None = None,
    ) -> Tensor:
        """What a graph captures: launches whose arguments are the same for every step that fits."""
        self._metadata.take(inputs)
        return self.decoder.forward(
            inputs.token_ids, self.kv_cache, inputs.attention, inputs.lora, before_layer, lane
        )

    def _sample(self, step: HostStep, inputs: StepInputs, hidden: Tensor, lane: Lane | None) -> Any:
        count = len(step.sampling)
        if count == 0:
            return None
        if inputs.sample_rows is not None:
            hidden = hidden.index_select(0, inputs.sample_rows)
        # A captured step's rows are all multiplied: its few sizes are known to the library by now.
        logits = self.decoder.logits(hidden, lane and lane.at(step.sample_rows))[:count]
        return self._sampler.launch(logits, step.sampling, self._metadata.last_tokens)

    def _embeddings(self, step: HostStep, hidden: Tensor) -> list[tuple[int, Arrival]]:
        found = []
        for place, s in enumerate(step.schedule.scheduled):
            if s.seq.request.pooling is not None:
                row = step.query_start[place]
                vector = self._pooler.add(s, hidden[row : row + s.num_tokens])
                if vector is not None:
                    found.append((place, Arrival(vector)))
        return found

    def _prompt_logprobs(
        self, step: HostStep, hidden: Tensor, lane: Lane | None
    ) -> list[tuple[int, list[PromptLogprobs]]]:
        found: list[tuple[int, list[PromptLogprobs]]] = []
        if step.decodes_only:
            return found
        for place, s in enumerate(step.schedule.scheduled):
            targets = prompt_targets(s)
            if not targets:
                continue
            row, num_top = step.query_start[place], s.seq.sampling.prompt_logprobs or 0
            parts: list[PromptLogprobs] = []
            for first in range(0, len(targets), PROMPT_LOGPROB_ROWS):
                part = targets[first : first + PROMPT_LOGPROB_ROWS]
                here = range(row + first, row + first + len(part))
                logits = self.decoder.logits(hidden[here.start : here.stop], lane and lane.at(here))
                parts.append(PromptLogprobs.start(logits, part, num_top))
            found.append((place, parts))
        return found

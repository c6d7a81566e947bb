"""Steps scheduled by hand, one ahead of the tokens known, and seven mixed cases for them."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import Any

from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.seams import Schedule, ScheduledSequence
from loraplex.engine.sequence import Sequence

MAX_BLOCKS, BLOCK_SIZE, BUDGET = 8, 16, 40
_numbers = count()


class Steps:
    """Schedules by hand, a step ahead of the tokens known. Blocks are spread over the cache."""

    def __init__(self, runner: Any, num_blocks: int) -> None:
        self.runner = runner
        self.free = [(7 * i + 3) % num_blocks for i in range(num_blocks)]
        self.in_flight: deque[tuple[Schedule, Any]] = deque()
        self.released: list[int] = []
        self.made: dict[int, Any] = {}

    def sequence(self, prompt: list[int], *uses: AdapterUse, **sampling: Any) -> Sequence:
        number = next(_numbers)
        params = SamplingParams(**{"temperature": 0.0, **sampling})
        request = GenerationRequest(
            request_id=str(number), prompt_token_ids=prompt, sampling=params, adapters=uses
        )
        return Sequence.from_request(
            request, seq_id=number, arrival_time=0.0, max_model_len=MAX_BLOCKS * BLOCK_SIZE,
            eos_token_ids=frozenset(), seed=number,
        )  # fmt: skip

    def step(self, wanted: list[tuple[Sequence, int]]) -> None:
        scheduled = []
        for seq, num in wanted:
            start = seq.num_computed_tokens
            while len(seq.block_table) * BLOCK_SIZE < start + num:
                seq.block_table.append(self.free.pop())
            scheduled.append(
                ScheduledSequence(
                    seq, start, num, start + num == seq.num_tokens, start >= len(seq.token_ids)
                )
            )
        scheduled.sort(key=lambda s: (not s.is_decode, s.seq.composition, s.seq.seq_id))
        schedule = Schedule(
            scheduled,
            sum(s.is_decode for s in scheduled),
            sum(s.num_tokens for s in scheduled),
            self.released,
        )
        self.released = []
        self.in_flight.append((schedule, self.runner.launch(schedule)))
        for s in scheduled:
            s.seq.num_computed_tokens += s.num_tokens
            s.seq.num_pending += s.samples
        while len(self.in_flight) > self.runner.max_in_flight:
            self.settle()

    def settle(self) -> None:
        schedule, handle = self.in_flight.popleft()
        for s, sample in zip(schedule.scheduled, self.runner.collect(handle), strict=True):
            assert (sample.token_id is not None) == s.samples
            if s.samples and s.seq.num_pending:
                s.seq.num_pending -= 1
                s.seq.token_ids.append(sample.token_id)
            if sample.prompt_logprobs is not None:
                self.made.setdefault(s.seq.seq_id, []).extend(sample.prompt_logprobs)

    def release(self, seq: Sequence) -> None:
        self.released.append(seq.seq_id)
        self.free += seq.block_table
        seq.block_table, seq.num_computed_tokens, seq.num_pending = [], 0, 0

    def run(self, sequences: list[Sequence], num_tokens: int) -> list[list[int]]:
        """Each to its end, in chunks that fill a budget, decodes beside prefills."""
        while open_ := [s for s in sequences if s.num_output_tokens < num_tokens]:
            budget, wanted = BUDGET, []
            for seq in open_:
                num = min(seq.num_tokens - seq.num_computed_tokens, budget)
                if num:
                    wanted.append((seq, num))
                    budget -= num
            self.step(wanted)
        while self.in_flight:
            self.settle()
        return [seq.output_token_ids[:num_tokens] for seq in sequences]


def cases(steps: Steps, digests: dict[str, str], make_prompt: Any) -> list[Sequence]:
    every = list(digests.values())
    compositions = [
        (),
        (AdapterUse(every[0]),),
        (AdapterUse(every[1]), AdapterUse(every[4], 0.5)),
        (AdapterUse(every[5]),),
        (AdapterUse(every[1]), AdapterUse(every[4], 0.5)),
        (),
        (AdapterUse(every[3], -0.75),),
    ]
    made = [steps.sequence(make_prompt(5 + 9 * i, i), *uses) for i, uses in enumerate(compositions)]
    made[4].spans = ((0, ()), (23, made[4].adapters))  # as if they were invoked there
    return made

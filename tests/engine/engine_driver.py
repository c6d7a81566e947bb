"""The whole engine in this process, driven step by step."""

from __future__ import annotations

import time
from typing import Any

from loraplex.engine import api
from loraplex.engine.api import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from loraplex.engine.hosted import HostedEngine

NUM_TOKENS = 10
DEADLINE_S = 60


class Driver:
    """An engine on a tiny model with all its adapters in the store."""

    def __init__(self, hosted: HostedEngine, digests: dict[str, str]) -> None:
        self.hosted = hosted
        self.digests = digests
        self.count = 0

    def generate(
        self,
        cases: list[tuple[list[int], str | None]],
        output_token_ids: list[int] | None = None,
        **sampling: Any,
    ) -> list[list[api.SequenceOutput]]:
        """All cases at once; each one's outputs up to its end. Invariants hold after every step."""
        outputs: dict[str, list[api.SequenceOutput]] = {}
        for prompt, adapter in cases:
            self.count += 1
            outputs[str(self.count)] = []
            params = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling}
            uses = () if adapter is None else (AdapterUse(self.digests[adapter]),)
            self.hosted.add(
                GenerationRequest(
                    request_id=str(self.count),
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(**params),
                    adapters=uses,
                    output_token_ids=output_token_ids or [],
                )
            )
        end = time.monotonic() + DEADLINE_S
        while self.hosted.engine.has_work():
            assert time.monotonic() < end, "the engine does not come to an end"
            for output in self.hosted.step():
                outputs[output.request_id].append(output)
            self.hosted.engine.check_invariants()
            self.hosted.engine.idle_wait(1.0)
        return list(outputs.values())

    def tokens(self, cases: list[tuple[list[int], str | None]]) -> list[list[int]]:
        made = []
        for outputs in self.generate(cases):
            assert outputs[-1].finish_reason == FinishReason.LENGTH, outputs[-1]
            made.append([token for output in outputs for token in output.token_ids])
        return made

    def load_all(self) -> None:
        """So that what follows does not depend on how fast adapters arrive."""
        for call_id, digest in enumerate(self.digests.values()):
            self.hosted.call(api.Call(call_id=call_id, method="load", digest=digest))
        answers: list[api.Answer] = []
        while len(answers) < len(self.digests):
            self.hosted.step()
            answers += self.hosted.take_answers()
        assert all(answer.error is None for answer in answers)

    def evict(self, digest: str) -> None:
        self.hosted.call(api.Call(call_id=1, method="evict", digest=digest, tier="host"))
        self.hosted.step()
        [answer] = self.hosted.take_answers()
        assert answer.error is None, answer.error

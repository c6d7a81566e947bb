"""The whole engine on the GPU's kernels, interpreted on a CPU: the tokens of the CPU path.

A small model, few tokens: a program of a kernel takes milliseconds here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.api import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.hosted import HostedEngine

# T of a module that a page does not adapt is never written; kernels drop what they make of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

DEADLINE_S = 120
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

Case = tuple[list[int], tuple[str, ...]]  # prompt, adapters


class Driver:
    def __init__(self, hosted: HostedEngine, digests: dict[str, str]) -> None:
        self.hosted = hosted
        self.digests = digests
        self.count = 0
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}

    def add(self, case: Case, **sampling: Any) -> str:
        prompt, adapters = case
        name = str(self.count)
        self.count += 1
        uses = tuple(AdapterUse(self.digests[a], 1.0 - 0.5 * i) for i, a in enumerate(adapters))
        params = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **sampling}
        self.tokens[name] = []
        self.hosted.add(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=SamplingParams(**params),
                adapters=uses,
            )
        )
        return name

    def step(self) -> None:
        for output in self.hosted.step():
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason
        self.hosted.engine.check_invariants()
        self.hosted.engine.idle_wait(1.0)

    def finish(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while self.hosted.engine.has_work():
            assert time.monotonic() < end, "the engine does not come to an end"
            self.step()

    def run(self, cases: list[Case], **sampling: Any) -> list[list[int]]:
        names = [self.add(case, **sampling) for case in cases]
        self.finish()
        return [self.tokens[name] for name in names]


@pytest.fixture
def make_driver(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Iterator[Callable[..., Driver]]:
    open_: list[HostedEngine] = []

    def make(backend: str, family: str = "llama", **settings: Any) -> Driver:
        model = tiny_model(family, **SMALL)
        digests = store_adapters(tmp_path / "store", model, tiny_adapters(model))
        defaults = {
            "model": str(model),
            "adapter_dir": tmp_path / "store",
            "device": "cpu",
            "backend": backend,
            "num_threads": 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
            "max_model_len": 64,
            "kv_cache_memory": 1 << 20,
            "adapter_memory": 2 << 20,
        }
        hosted = build_engine(EngineConfig(**{**defaults, **settings}))
        open_.append(hosted)
        return Driver(hosted, digests)

    yield make
    for hosted in open_:
        hosted.close()


def test_mixed_adapters_in_chunks_then_prefix_hits(make_driver: Any, make_prompt: Any) -> None:
    """Ranks 4 to 33, a composition and the base model; two of six wait for a place."""
    cases: list[Case] = [
        (make_prompt(33), ("all",)),
        (make_prompt(7, 1), ()),
        (make_prompt(20, 2), ("layer0", "qv")),
        (make_prompt(33), ("rank24",)),
        (make_prompt(3, 4), ("patterns",)),
        (make_prompt(33), ("all",)),
    ]
    expected, driver = make_driver("torch"), make_driver("triton")
    assert driver.run(cases) == expected.run(cases)
    hits = driver.hosted.stats().prefix_cache_hits
    longer: list[Case] = [(prompt + make_prompt(4, 9), adapters) for prompt, adapters in cases[:2]]
    assert driver.run(longer, max_tokens=2) == expected.run(longer, max_tokens=2)
    assert driver.hosted.stats().prefix_cache_hits > hits

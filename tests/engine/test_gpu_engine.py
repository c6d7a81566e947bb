"""The whole engine on the GPU's kernels: the tokens of the CPU path.

Interpreted on a CPU, where a program of a kernel takes milliseconds (so: a small model, few
tokens), and on a GPU where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine.api import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.hosted import HostedEngine
from loraplex.engine.machine import device_memory
from loraplex.kernels.gpu.launch import is_interpreted

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

interpreted = pytest.mark.skipif(
    not is_interpreted(), reason="kernels are compiled here, so they cannot run on the CPU"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

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


@pytest.fixture(autouse=True)
def _dirty_memory() -> Iterator[None]:
    """What nobody wrote is NaN, so whoever uses it is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def make_driver(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Iterator[Callable[..., Driver]]:
    open_: list[HostedEngine] = []

    def make(backend: str, family: str = "llama", **settings: Any) -> Driver:
        model = tiny_model(family, **({} if settings.get("device") == "cuda" else SMALL))
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


@interpreted
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


@interpreted
def test_preempted_and_cancelled_between_steps_in_flight(
    make_driver: Any, make_prompt: Any, tiny_model: Any
) -> None:
    """KV memory for two of three sequences; one more goes away while its step runs."""
    from loraplex.engine.memory import kv_block_bytes
    from loraplex.engine.model_config import read_model_config

    block = kv_block_bytes(read_model_config(tiny_model("llama", **SMALL)), 16, torch.float32)
    settings = {"kv_cache_memory": 4 * block, "max_model_len": 48, "enable_prefix_cache": False}
    drivers = [make_driver(backend, **settings) for backend in ("torch", "triton")]
    cases: list[Case] = [
        (make_prompt(10), ("qv",)),
        (make_prompt(11, 1), ()),
        (make_prompt(12, 2), ("qv",)),
    ]
    made = []
    for driver in drivers:
        driver.run([(make_prompt(2), ("qv",))], max_tokens=1)  # its adapter is there, so all begin
        doomed = driver.add((make_prompt(5, 3), ()), max_tokens=20)
        names = [driver.add(case, max_tokens=9) for case in cases]
        for _ in range(3):
            driver.step()
        assert driver.tokens[doomed], "it should run when it is cancelled"
        driver.hosted.cancel([doomed])
        driver.finish()
        assert driver.reasons[doomed] == FinishReason.ABORT
        made.append([driver.tokens[name] for name in names])
    assert made[0] == made[1]
    assert drivers[1].hosted.stats().num_preemptions > 0


@interpreted
def test_batch_invariance_through_the_whole_engine(make_driver: Any, make_prompt: Any) -> None:
    """Seeded draws of a request alone equal those among others; the setting reaches the kernels."""
    driver = make_driver("triton", batch_invariant=True)
    case: Case = (make_prompt(19), ("all",))
    params = {"temperature": 1.5, "seed": 3, "max_tokens": 4, "logprobs": 1}
    [alone] = driver.run([case], **params)
    among = driver.run([(make_prompt(9, 1), ()), case, (make_prompt(4, 2), ("qv",))], **params)
    assert among[1] == alone


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gpu_makes_the_tokens_of_the_cpu(family: str, make_driver: Any, make_prompt: Any) -> None:
    cases: list[Case] = [
        (make_prompt(33 + i, i), adapters)
        for i, adapters in enumerate(
            [(), ("qv",), ("all",), ("rslora",), ("rank24", "qv"), ("patterns",), ("layer0",)]
        )
    ]
    settings = {"family": family, "max_model_len": 128, "kv_cache_memory": 16 << 20,
                "adapter_memory": 16 << 20, "dtype": "float32"}  # fmt: skip
    cpu = make_driver("torch", device="cpu", **settings)
    gpu = make_driver("auto", device="cuda", **settings)
    assert gpu.run(cases, max_tokens=12) == cpu.run(cases, max_tokens=12)


@needs_gpu
@pytest.mark.gpu
def test_memory_stays_within_its_share(make_driver: Any, make_prompt: Any) -> None:
    gpu = torch.device("cuda:0")
    used_before = device_memory(gpu).total - device_memory(gpu).free
    driver = make_driver(
        "auto", device="cuda", gpu_memory_utilization=0.4, kv_cache_memory=None,
        adapter_memory=None, max_num_seqs=None, max_num_batched_tokens=None, max_model_len=None,
    )  # fmt: skip
    driver.run([(make_prompt(100 + i, i), ("all",) if i % 2 else ()) for i in range(64)])
    memory = device_memory(gpu)
    assert memory.total - memory.free <= max(0.4 * memory.total, used_before) + (64 << 20)
    assert driver.hosted.memory().kv_cache_bytes > 0.2 * memory.total

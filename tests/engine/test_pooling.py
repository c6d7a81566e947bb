"""Embeddings of prompts against transformers + peft: chunks, prefix hits, preemption, adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.engine.api import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.hosted import HostedEngine
from loraplex.kernels.gpu.launch import is_interpreted

Case = tuple[list[int], str | None, str]  # prompt, adapter, pooling


class Driver:
    def __init__(self, hosted: HostedEngine, digests: dict[str, str]) -> None:
        self.hosted = hosted
        self.digests = digests

    def embed(self, cases: list[Case], generate: int = 0) -> list[torch.Tensor]:
        """All at once, among `generate` requests that sample."""
        for i, (prompt, adapter, pooling) in enumerate(cases):
            self.add(str(i), prompt, adapter, pooling=pooling)
        for i in range(generate):
            self.add(f"other {i}", [5, 6, 7 + i], None, sampling=SamplingParams(max_tokens=6))
        found: dict[str, Any] = {}
        end = time.monotonic() + 60
        while self.hosted.engine.has_work():
            assert time.monotonic() < end, "the engine does not come to an end"
            for output in self.hosted.step():
                assert output.error is None, output.error
                if output.embedding is not None:
                    assert output.request_id not in found
                    assert output.finish_reason == FinishReason.STOP
                    assert output.token_ids == []
                    found[output.request_id] = np.frombuffer(output.embedding, "<f4").copy()
            self.hosted.engine.check_invariants()
            self.hosted.engine.idle_wait(1.0)
        return [torch.from_numpy(found[str(i)]) for i in range(len(cases))]

    def add(self, name: str, prompt: list[int], adapter: str | None, **fields: Any) -> None:
        uses = () if adapter is None else (AdapterUse(self.digests[adapter]),)
        self.hosted.engine.add(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=prompt,
                adapters=uses,
                **{"sampling": SamplingParams(), **fields},
            )
        )


@pytest.fixture
def make_driver(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Iterator[Callable[..., Driver]]:
    open_: list[HostedEngine] = []

    def make(family: str = "llama", *, model: Any = None, **settings: Any) -> Driver:
        model = model or tiny_model(family)
        digests = store_adapters(tmp_path / "store", model, tiny_adapters(model))
        defaults = {
            "model": str(model),
            "adapter_dir": tmp_path / "store",
            "backend": "torch",
            "num_threads": 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
            "max_model_len": 128,
            "kv_cache_memory": 16 << 20,
            "adapter_memory": 8 << 20,
        }
        hosted = build_engine(EngineConfig(**{**defaults, **settings}))
        open_.append(hosted)
        return Driver(hosted, digests)

    yield make
    for hosted in open_:
        hosted.close()


def expected(reference: Any, case: Case) -> torch.Tensor:
    prompt, adapter, pooling = case
    states = reference.hidden(prompt, adapter)
    return states.mean(0) if pooling == "mean" else states[-1]


def check(reference: Any, cases: list[Case], found: list[torch.Tensor]) -> None:
    for case, vector in zip(cases, found, strict=True):
        torch.testing.assert_close(vector, expected(reference, case), rtol=2e-4, atol=2e-4)


def test_embeddings_are_the_references_hidden_states(
    make_driver: Any, make_reference: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Prompts of one to five chunks, twice: the second time with a prefix in the cache."""
    driver, reference = make_driver("llama"), make_reference(tiny_model("llama"))
    cases: list[Case] = [
        (make_prompt(length, length), adapter, pooling)
        for length, adapter in ((1, "qv"), (25, "all"), (49, None), (100, "rank24"))
        for pooling in ("mean", "last")
    ]
    check(reference, cases, driver.embed(cases, generate=2))
    hits = driver.hosted.stats().prefix_cache_hits
    check(reference, cases, driver.embed(cases))
    assert driver.hosted.stats().prefix_cache_hits > hits  # "last" may use them
    wrong = [(prompt, "qv" if adapter == "all" else "all", how) for prompt, adapter, how in cases]
    for case, vector in zip(wrong, driver.embed(cases[:4]), strict=False):
        assert not torch.allclose(vector, expected(reference, case), rtol=2e-2, atol=2e-2)


def test_a_preempted_prompt_is_added_up_anew(
    make_driver: Any, make_reference: Any, tiny_model: Any, make_prompt: Any
) -> None:
    from loraplex.engine.memory import kv_block_bytes
    from loraplex.engine.model_config import read_model_config

    model = tiny_model("llama")
    config = read_model_config(model)
    driver = make_driver(
        max_model_len=96,
        kv_cache_memory=7 * kv_block_bytes(config, 16, config.dtype),
        enable_prefix_cache=False,
        max_num_batched_tokens=8,
    )
    # Whoever decodes grows into the last free block; the prompt, last in order, gives way.
    for i in range(2):
        driver.add(f"old {i}", make_prompt(10, i), None, sampling=SamplingParams(max_tokens=30))
    cases: list[Case] = [(make_prompt(60, 9), None, "mean")]
    check(make_reference(model), cases, driver.embed(cases))
    assert driver.hosted.stats().num_preemptions > 0


@pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_the_gpus_runner_pools_alike(make_driver: Any, make_prompt: Any, tiny_model: Any) -> None:
    model = tiny_model(
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    cases: list[Case] = [
        (make_prompt(30), "all", "mean"),
        (make_prompt(30), "all", "last"),
        (make_prompt(3, 1), None, "mean"),
        (make_prompt(1, 2), "qv", "last"),
    ]
    settings = {"device": "cpu", "max_model_len": 64, "kv_cache_memory": 1 << 20,
                "adapter_memory": 2 << 20, "model": model}  # fmt: skip
    cpu = make_driver(**settings).embed(cases)
    gpu = make_driver(backend="triton", **settings).embed(cases, generate=1)
    for a, b in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_an_unknown_pooling_is_refused(make_driver: Any) -> None:
    with pytest.raises(InvalidRequest, match="pooling='max'"):
        make_driver().add("x", [1, 2], None, pooling="max")

"""The whole engine against transformers + peft: after prefix hits, preemption, eviction, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex.engine import api
from loraplex.engine.api import FinishReason, GenerationRequest, SamplingParams

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NUM_TOKENS = 10


def check(reference: Any, cases: list[tuple[list[int], str | None]], made: list[list[int]]) -> None:
    for (prompt, adapter), tokens in zip(cases, made, strict=True):
        assert len(tokens) == NUM_TOKENS
        assert reference.continues(prompt, tokens, adapter), adapter


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_burst_then_prefix_hits(
    family: str,
    backend: str,
    make_driver: Any,
    make_reference: Any,
    tiny_model: Any,
    make_prompt: Any,
) -> None:
    """The same prompts for every adapter: a hit on another adapter's blocks would show."""
    driver, reference = make_driver(family, backend=backend), make_reference(tiny_model(family))
    cases = [(make_prompt(35), adapter) for adapter in [None, *driver.digests]]
    check(reference, cases, driver.tokens(cases))
    before = driver.hosted.stats().prefix_cache_hits
    longer = [(prompt + make_prompt(5, 1), adapter) for prompt, adapter in cases]
    check(reference, longer, driver.tokens(longer))
    assert driver.hosted.stats().prefix_cache_hits - before == 32 * len(cases)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("adapter", [None, "all"])
def test_blocks_are_shared_in_the_step_that_fills_them(
    adapter: str | None,
    backend: str,
    make_driver: Any,
    make_reference: Any,
    tiny_model: Any,
    make_prompt: Any,
) -> None:
    """Equal prompts at once: one computes 49 tokens, the others only the last, like a decode."""
    driver = make_driver("llama", backend=backend, max_num_batched_tokens=64)
    cases = [(make_prompt(49), adapter)] * 3
    check(make_reference(tiny_model("llama")), cases, driver.tokens(cases))
    assert driver.hosted.stats().prefix_cache_hits == 2 * 48


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_changes_nothing(
    family: str,
    backend: str,
    make_driver: Any,
    make_reference: Any,
    tiny_model: Any,
    make_prompt: Any,
) -> None:
    """KV memory for two and a half of six sequences: some lose their blocks while they decode."""
    from loraplex.engine.memory import kv_block_bytes
    from loraplex.engine.model_config import read_model_config

    model = tiny_model(family)
    config = read_model_config(model)
    block = kv_block_bytes(config, 16, config.dtype)
    driver = make_driver(
        family,
        backend=backend,
        max_model_len=64,
        kv_cache_memory=7 * block,
        enable_prefix_cache=False,
    )
    driver.load_all()
    cases = [(make_prompt(26 + i, i), a) for i, a in enumerate([None, *driver.digests])]
    check(make_reference(model), cases, driver.tokens(cases))
    assert driver.hosted.stats().num_preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_adapters_come_back(
    family: str, make_driver: Any, make_reference: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Memory for a third of the adapters: they push each other out, through both tiers."""
    model = tiny_model(family)
    driver = make_driver(family)
    page_bytes = driver.hosted.memory().adapter_page_bytes
    driver = make_driver(family, adapter_memory=4 * page_bytes, host_adapter_memory=page_bytes)
    cases = [(make_prompt(9 + i, i), a) for i, a in enumerate([*driver.digests, None] * 2)]
    check(make_reference(model), cases, driver.tokens(cases))
    stats = driver.hosted.stats()
    assert stats.adapter_evictions > 0
    driver.evict(driver.digests["all"])
    again = [case for case in cases if case[1] == "all"]
    check(make_reference(model), again, driver.tokens(again))
    assert driver.hosted.stats().adapter_loads > stats.adapter_loads


def test_a_damaged_adapter_fails_its_requests_only(
    make_driver: Any, make_reference: Any, tiny_model: Any, make_prompt: Any, tmp_path: Path
) -> None:
    driver = make_driver("llama")
    digest = driver.digests["all"]
    file = tmp_path / "store" / digest[:2] / digest / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    broken, fine = driver.generate([(make_prompt(9), "all"), (make_prompt(9), "qv")])
    assert broken[-1].finish_reason == FinishReason.ERROR
    assert broken[-1].error is not None
    assert broken[-1].error.code == "adapter_corrupt"
    assert fine[-1].finish_reason == FinishReason.LENGTH


def test_seeded_sampling_does_not_depend_on_the_batch(make_driver: Any, make_prompt: Any) -> None:
    driver = make_driver("llama")
    prompt = make_prompt(12)
    params = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": 5, "max_tokens": 20}

    def tokens(outputs: list[api.SequenceOutput]) -> list[int]:
        return [token for output in outputs for token in output.token_ids]

    [alone] = driver.generate([(prompt, "all")], **params)
    crowd = driver.generate(
        [(prompt, "all"), (prompt, None), (make_prompt(30, 1), "qv"), (prompt, "rank24")], **params
    )
    assert tokens(crowd[0]) == tokens(alone)
    assert tokens(crowd[1]) != tokens(alone)


def test_prompt_logprobs_equal_the_reference(
    make_driver: Any, make_reference: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """In chunks of 24; a seed of prefix blocks from the first request must not swallow any."""
    driver, reference = make_driver("llama"), make_reference(tiny_model("llama"))
    prompt = make_prompt(60)
    for _ in range(2):
        [outputs] = driver.generate([(prompt, "all")], prompt_logprobs=3, logprobs=2)
        entries = outputs[0].prompt_logprobs
        assert entries is not None
        assert entries[0] is None
        assert len(entries) == len(prompt)
        expected = reference.logits(prompt, "all").log_softmax(-1)
        for i, entry in enumerate(entries[1:]):
            assert entry is not None
            row = expected[i]
            assert entry.token_id == prompt[i + 1]
            assert entry.logprob == pytest.approx(float(row[prompt[i + 1]]), abs=1e-3)
            assert entry.rank == int((row > row[prompt[i + 1]]).sum()) + 1
            assert entry.top_ids == row.topk(3).indices.tolist()
        assert outputs[0].logprobs is not None
        assert outputs[0].logprobs[0].rank == 1
        assert len(outputs[0].logprobs[0].top_ids) == 2


SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 11},
    "penalties": {
        "temperature": 0.7,
        "seed": 3,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
    },
    "ends": {"temperature": 0.9, "seed": 5, "min_tokens": 6, "stop_token_ids": tuple(range(90))},
}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_request_goes_on_in_another_engine_as_it_would_have(
    kind: str, backend: str, make_driver: Any, make_prompt: Any
) -> None:
    """What a supervisor does after a crash: the prompt, and what came of it, to a new engine."""
    prompt = make_prompt(20)
    sampling = {"max_tokens": 16, "logprobs": 0, **SAMPLERS[kind]}
    [whole] = make_driver("llama", backend=backend).generate([(prompt, "all")], **sampling)
    tokens = [token for output in whole for token in output.token_ids]
    driver = make_driver("llama", backend=backend)
    for done in sorted({1, len(tokens) // 2, len(tokens) - 1}):
        [rest] = driver.generate([(prompt, "all")], output_token_ids=tokens[:done], **sampling)
        assert [token for output in rest for token in output.token_ids] == tokens[done:]
        assert rest[-1].finish_reason == whole[-1].finish_reason
        assert rest[-1].stop_token_id == whole[-1].stop_token_id
        assert rest[0].num_cached_tokens is None, "its first output was given by another engine"
        for mine, theirs in zip(rest, whole[done:], strict=True):
            assert mine.logprobs is not None
            assert theirs.logprobs is not None
            assert mine.logprobs[0].logprob == pytest.approx(theirs.logprobs[0].logprob, abs=1e-4)
    [wrong] = driver.generate([(prompt, "all")], output_token_ids=[*tokens[:1], 7], **sampling)
    assert [t for output in wrong for t in output.token_ids] != tokens[2:], "it looks at nothing"


def test_an_output_that_is_complete_cannot_go_on(make_driver: Any, make_prompt: Any) -> None:
    hosted = make_driver("llama").hosted
    hosted.add(
        GenerationRequest(
            request_id="r",
            prompt_token_ids=make_prompt(9),
            sampling=SamplingParams(max_tokens=10),
            output_token_ids=[1] * 10,
        )
    )
    [refused] = hosted.step()
    assert refused.error is not None
    assert "output_token_ids: 10 given, at most 9" in refused.error.message

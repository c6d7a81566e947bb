"""Adapters of every format through the whole engine: from files, preempted, evicted, reloaded."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.api import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from loraplex.engine.memory import kv_block_bytes
from loraplex.engine.model_config import read_model_config

cases = sys.modules["lane_cases"]
BACKENDS = ("torch", "auto")


def check(formats: Any, wanted: list[tuple[list[int], Any]], made: list[list[int]]) -> None:
    for (prompt, adapter), tokens in zip(wanted, made, strict=True):
        if adapter in formats:
            assert formats[adapter].peft.continues(prompt, tokens), adapter


def folders(formats: Any) -> dict[str, Path]:
    return {name: case.folder for name, case in formats.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_preemption_changes_nothing(
    backend: str, make_formats: Any, make_driver: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """KV memory for two and a half of five sequences."""
    config = read_model_config(tiny_model("llama"))
    formats = {name: make_formats("llama")[name] for name in ("dora", "several", "tokens")}
    driver = make_driver(
        "llama",
        folders(formats),
        backend=backend,
        max_model_len=64,
        kv_cache_memory=7 * kv_block_bytes(config, 16, config.dtype),
        enable_prefix_cache=False,
    )
    driver.load_all()
    wanted = [(make_prompt(26 + i, i), name) for i, name in enumerate([*formats, None, "several"])]
    check(formats, wanted, driver.tokens(wanted))
    assert driver.hosted.stats().num_preemptions > 0


def test_adapters_share_no_prefix(
    make_formats: Any, make_driver: Any, make_reference: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """The same prompt for every adapter, twice: a hit on another's blocks would show."""
    model, formats = tiny_model("llama"), make_formats("llama")
    driver = make_driver("llama", folders(formats))
    wanted = [(make_prompt(35), name) for name in [None, *formats]]
    for _ in range(2):
        made = driver.tokens(wanted)
        check(formats, wanted, made)
        assert make_reference(model).continues(wanted[0][0], made[0], None)
    assert driver.hosted.stats().prefix_cache_hits == 32 * len(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evicted_then_read_from_their_page_files(
    backend: str, make_formats: Any, make_driver: Any, make_prompt: Any, tmp_path: Path
) -> None:
    """Room for a third of them, so they push each other out; then an engine that finds the files
    and no weights.
    """
    formats = make_formats("llama")
    room = {"adapter_memory": 1 << 20, "host_adapter_memory": 512 << 10}
    wanted = [(make_prompt(9 + i, i), name) for i, name in enumerate([*formats, "dora", "tokens"])]
    driver = make_driver("llama", folders(formats), backend=backend, **room)
    check(formats, wanted, driver.tokens(wanted))
    assert driver.hosted.stats().adapter_evictions > 0
    resident = [r for r in driver.hosted.engine.adapters() if r.state == "device"]
    used = driver.hosted.memory().adapter_bytes_used
    assert used == sum(r.device_bytes for r in resident)
    store, num_files = tmp_path / "store", 0
    deadline = time.monotonic() + 20
    while num_files < len(formats):  # written when the loader has nothing else to do
        assert time.monotonic() < deadline, "no page files"
        driver.load_all()
        num_files = len(list(store.glob("*/*/pages-*.bin")))
    driver = make_driver("llama", folders(formats), backend=backend, **room)
    for file in store.glob("*/*/adapter_model.safetensors"):
        file.unlink()
    check(formats, wanted, driver.tokens(wanted))


def test_two_checkpoints_of_one_shape_share_no_gains(
    make_formats: Any, make_driver: Any, make_prompt: Any, tiny_model: Any
) -> None:
    """One store, one adapter: what DoRA makes of it depends on the base model's weights."""
    case, prompt = make_formats("llama")["dora"], make_prompt(20)
    other = tiny_model("llama", rms_norm_eps=2e-6)
    for model, peft in (
        (tiny_model("llama"), case.peft),
        (other, cases.Peft(other, case.folder)),
        (tiny_model("llama"), case.peft),
    ):
        driver = make_driver(model, {"dora": case.folder})
        [tokens] = driver.tokens([(prompt, "dora")])
        assert peft.continues(prompt, tokens)
        driver.hosted.close()


def test_what_has_no_weight_but_one_says_so(
    make_formats: Any, make_driver: Any, make_prompt: Any
) -> None:
    formats = make_formats("llama")
    driver = make_driver("llama", folders(formats))

    def answer(**weights: float) -> Any:
        uses = tuple(
            AdapterUse(driver.digests[name.replace("_", " ")], weight)
            for name, weight in weights.items()
        )
        driver.count += 1
        name = str(driver.count)
        driver.hosted.add(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=make_prompt(5),
                sampling=SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
                adapters=uses,
            )
        )
        last = None
        while driver.hosted.engine.has_work() or last is None:
            for output in driver.hosted.step():
                last = output
            driver.hosted.engine.idle_wait(1.0)
        return last

    for refused in (answer(dora=0.5), answer(dora=1.0, biases_of_B=1.0), answer(tokens=2.0)):
        assert refused.finish_reason == FinishReason.ERROR
        assert refused.error.code == "invalid_request"
        assert "alone with weight 1" in refused.error.message
    for served in (
        answer(dora=1.0),
        answer(dora=1.0, biases_of_B=0.0),
        answer(biases_of_B=0.5, LoRA_of_the_tables=-1.0),
    ):
        assert served.finish_reason == FinishReason.LENGTH, served

"""A composition equals peft's weighted adapter of kind "cat", beside others in one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.engine.api import AdapterUse

WEIGHTS: dict[str, dict[str, float]] = {
    "two": {"qv": 1.0, "all": 1.0},
    "below, above and under nought": {"all": 0.25, "patterns": 1.75, "rank24": -0.5},
    "one of them for nothing": {"all": 1.0, "qv": 0.0},
    "all of them": {"qv": 0.3, "all": 0.3, "rank24": 0.3, "patterns": 0.3, "layer0": 0.3},
}


@pytest.fixture(scope="module")
def weighted(
    tiny_model: Any, tiny_adapters: Any
) -> Callable[[dict[str, float], list[int]], Tensor]:
    """`weighted(weights, tokens) -> [T, vocab]` by transformers + peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    adapters: dict[str, Path] = tiny_adapters(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    first, *others = adapters
    peft_model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
    for name in others:
        peft_model.load_adapter(adapters[name], adapter_name=name)

    def logits(weights: dict[str, float], tokens: list[int]) -> Tensor:
        name = "+".join(f"{adapter}={weight}" for adapter, weight in weights.items())
        name = name.replace(".", "_")
        peft_model.add_weighted_adapter(
            list(weights), list(weights.values()), name, combination_type="cat"
        )
        peft_model.set_adapter(name)
        with torch.inference_mode():
            found: Tensor = peft_model(torch.tensor([tokens])).logits[0]
        peft_model.delete_adapter(name)
        return found

    return logits


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_each_equals_peft_in_one_batch(
    backend: str,
    make_bench: Any,
    make_prompt: Any,
    tiny_model: Any,
    weighted: Callable[[dict[str, float], list[int]], Tensor],
) -> None:
    bench = make_bench(tiny_model("llama"), backend)
    wanted = {}
    for number, (name, weights) in enumerate(WEIGHTS.items()):
        uses = tuple(AdapterUse(bench.digests[a], weight) for a, weight in weights.items())
        prompt = make_prompt(9 + number, number)
        wanted[name] = (bench.composed(prompt, uses), prompt)
    found = bench.logits([(seq, len(prompt)) for seq, prompt in wanted.values()])
    for name, (seq, prompt) in wanted.items():
        expected = weighted(WEIGHTS[name], prompt)
        torch.testing.assert_close(found[seq.seq_id], expected, rtol=1e-3, atol=2e-3)
        other = weighted(dict.fromkeys(WEIGHTS[name], 0.9), prompt)
        assert (other - expected).abs().max() > 0.05, f"{name}: other weights would pass, too"

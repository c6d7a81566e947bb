"""The golden rule: logits and greedy text equal transformers + peft, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraplex.engine.api import AdapterUse

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
BACKENDS = ("torch", "native")
# fp32 on both sides; what remains is the order of summation over three layers (logits of size ~5).
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 3e-4}
# Longer than the tiny models' sliding window of 24.
LENGTHS = (37, 5, 30, 1, 18, 26, 44)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    from loraplex.kernels.select import select_ops

    name: str = request.param
    try:
        select_ops(name, torch.device("cpu"), torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    return name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [100, 7])
def test_logits_of_a_mixed_batch_equal_the_reference(
    family: str,
    chunk: int,
    backend: str,
    tiny_model: Any,
    make_bench: Any,
    make_reference: Any,
    make_prompt: Callable[..., list[int]],
) -> None:
    model = tiny_model(family)
    bench, reference = make_bench(model, backend), make_reference(model)
    adapters = [None, *bench.digests]
    prompts = [make_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    sequences = [
        bench.sequence(prompt, adapter) for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    got = bench.all_logits(sequences, chunk)
    for seq, prompt, adapter in zip(sequences, prompts, adapters, strict=True):
        expected = reference.logits(prompt, adapter)
        torch.testing.assert_close(
            got[seq.seq_id], expected, **TOLERANCE, msg=lambda m, a=adapter: f"{a}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_a_mixed_batch_equals_the_reference(
    family: str,
    backend: str,
    tiny_model: Any,
    make_bench: Any,
    make_reference: Any,
    make_prompt: Callable[..., list[int]],
) -> None:
    """Chunks of 9: long prompts still prefill while short ones decode, adapters side by side."""
    model = tiny_model(family)
    bench, reference = make_bench(model, backend), make_reference(model)
    cases = [(make_prompt(4 + 5 * i, i), a) for i, a in enumerate([None, *bench.digests, "qv"])]
    sequences = [bench.sequence(prompt, adapter) for prompt, adapter in cases]
    made = bench.generate(sequences, num_tokens=12, chunk=9)
    for (prompt, adapter), tokens in zip(cases, made, strict=True):
        assert len(tokens) == 12
        assert reference.continues(prompt, tokens, adapter), adapter


def test_the_comparison_can_fail(
    tiny_model: Any,
    make_bench: Any,
    make_reference: Any,
    make_prompt: Callable[..., list[int]],
) -> None:
    """A swapped adapter, a wrong scaling or no adapter is far outside the tolerance."""
    model = tiny_model("llama")
    bench, reference = make_bench(model), make_reference(model)
    prompt = make_prompt(20)
    for adapter in bench.digests:
        expected = reference.logits(prompt, adapter)
        others = [other for other in [None, *bench.digests] if other != adapter]
        wrong = [bench.sequence(prompt, other) for other in others]
        wrong.append(bench.composed(prompt, (AdapterUse(bench.digests[adapter], 1.1),)))
        got = bench.all_logits(wrong, chunk=100)
        for seq in wrong:
            distance = (got[seq.seq_id] - expected).abs().max()
            assert distance > 100 * TOLERANCE["atol"], (adapter, seq.adapters)


def test_a_composition_adds_its_adapters_with_their_weights(
    tiny_model: Any,
    tiny_adapters: Any,
    make_bench: Any,
    make_prompt: Callable[..., list[int]],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = tiny_model("llama")
    bench, folders = make_bench(path), tiny_adapters(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(model, folders["all"], adapter_name="all")
    model.load_adapter(folders["rank24"], adapter_name="rank24")
    for name, weight in (("all", 0.75), ("rank24", -0.5)):
        for layer in model.modules():
            if hasattr(layer, "lora_A") and name in layer.lora_A:
                layer.scaling[name] *= weight
    model.base_model.set_adapter(["all", "rank24"])
    prompt = make_prompt(20)
    uses = (
        AdapterUse(bench.digests["all"], 0.75),
        AdapterUse(bench.digests["rank24"], -0.5),
    )
    seq = bench.composed(prompt, uses)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(bench.all_logits([seq], 100)[seq.seq_id], expected, **TOLERANCE)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3_ROPE,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_scaled_rope_equals_the_reference(
    rope: dict[str, Any],
    tiny_model: Any,
    make_bench: Any,
    make_reference: Any,
    make_prompt: Callable[..., list[int]],
) -> None:
    """The companion claim, that the scaling matters at all: plain rope is far off."""
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=256)
    bench, reference = make_bench(model), make_reference(model)
    seq = bench.sequence(make_prompt(90))
    got = bench.all_logits([seq], 100)[seq.seq_id]
    torch.testing.assert_close(got, reference.logits(seq.token_ids, None), **TOLERANCE)
    if rope["rope_type"] == "dynamic":
        return  # does nothing before the model's own length
    plain = [1.0 / 10000.0 ** (i / 16) for i in range(0, 16, 2)]
    used = bench.decoder.config.rope.inv_freq
    assert max(abs(a / b - 1) for a, b in zip(plain, used, strict=True)) > 0.1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    ],
)
def test_variants_of_a_family_equal_the_reference(
    family: str,
    changes: dict[str, Any],
    backend: str,
    tiny_model: Any,
    make_bench: Any,
    make_reference: Any,
    make_prompt: Callable[..., list[int]],
) -> None:
    model = tiny_model(family, **changes)
    bench, reference = make_bench(model, backend), make_reference(model)
    for adapter in (None, "all"):
        seq = bench.sequence(make_prompt(40), adapter)
        got = bench.all_logits([seq], 16)[seq.seq_id]
        torch.testing.assert_close(got, reference.logits(seq.token_ids, adapter), **TOLERANCE)

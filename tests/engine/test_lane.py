"""Every format beyond A and B equals peft, beside plain adapters and the base model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.extras import Extras
from loraplex.adapters.extras_parts import ExtrasShape
from loraplex.adapters.pool import PagePool
from loraplex.adapters.weights import LoadedAdapter
from loraplex.engine.api import AdapterProbe, AdapterUse
from loraplex.engine.base_weights import BaseWeights
from loraplex.engine.errors import InvalidRequest
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model import load_decoder
from loraplex.engine.model_config import read_model_config
from loraplex.engine.probe import AdapterProber, FromFiles
from loraplex.engine.reference import dora_norms
from loraplex.engine.validation import check_composition
from loraplex.kernels.select import select_ops

cases = sys.modules["lane_cases"]

CPU = torch.device("cpu")
BACKENDS = ("torch", "native")
FAMILIES = ("llama", "qwen2", "qwen3", "phi3")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 3e-4}


@contextmanager
def installed(bench: Any, *adapters: LoadedAdapter) -> Iterator[None]:
    """In its pool for as long as the block runs."""
    base = BaseWeights(bench.decoder)
    for loaded in adapters:
        prepared = base.prepare(loaded)
        image = bench.pool.build_image(prepared.loaded, parts=prepared.parts)
        bench.pool.install(loaded.digest, image)
    bench.pool.check_invariants()
    try:
        yield
    finally:
        for loaded in adapters:
            bench.pool.remove(loaded.digest)


def uses(loaded: LoadedAdapter, weight: float = 1.0) -> tuple[AdapterUse, ...]:
    return (AdapterUse(loaded.digest, weight),)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_size_is_known_before_it_is_read(family: str, make_formats: Any) -> None:
    for name, case in make_formats(family).items():
        assert ExtrasShape.of_manifest(case.manifest) == ExtrasShape.of(case.loaded.extras), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_mixed_batch_equal_peft(
    family: str,
    backend: str,
    make_formats: Any,
    tiny_model: Any,
    make_bench: Any,
    make_reference: Any,
    make_prompt: Any,
) -> None:
    """In chunks, so that a step holds rows of all of them at different places."""
    model = tiny_model(family)
    bench, plain = make_bench(model, backend), make_reference(model)
    formats = make_formats(family)
    prompts = {name: make_prompt(9 + 3 * i, i) for i, name in enumerate(formats)}
    others = {None: make_prompt(20, 50), "all": make_prompt(13, 51), "qv": make_prompt(8, 52)}
    with installed(bench, *(case.loaded for case in formats.values())):
        sequences = {n: bench.composed(prompts[n], uses(formats[n].loaded)) for n in formats}
        beside = {n: bench.sequence(prompt, n) for n, prompt in others.items()}
        got = bench.all_logits([*sequences.values(), *beside.values()], chunk=16)
    for name, seq in sequences.items():
        expected = formats[name].peft.logits(prompts[name])
        torch.testing.assert_close(
            got[seq.seq_id], expected, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, seq in beside.items():
        expected = plain.logits(others[name], name)
        torch.testing.assert_close(got[seq.seq_id], expected, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_text_of_a_mixed_batch_equals_peft(
    backend: str, make_formats: Any, tiny_model: Any, make_bench: Any, make_prompt: Any
) -> None:
    """The runner's own way to the logits: some rows of a step, and prompt log-probabilities."""
    bench, formats = make_bench(tiny_model("llama"), backend), make_formats("llama")
    with installed(bench, *(case.loaded for case in formats.values())):
        sequences = {
            name: bench.composed(make_prompt(4 + 2 * i, i), uses(case.loaded))
            for i, (name, case) in enumerate(formats.items())
        }
        tokens_made = bench.generate([*sequences.values(), bench.sequence([5, 6])], 6, chunk=9)
        asking = bench.composed(make_prompt(20), uses(formats["several"].loaded), prompt_logprobs=0)
        bench.step([(bench.sequence([5, 6, 7]), 3), (bench.sequence([9], "qv"), 1)])
        [entries] = [
            sample.prompt_logprobs
            for sample in bench.step([(bench.sequence([5, 6, 7]), 3), (asking, 20)]).values()
            if sample.prompt_logprobs
        ]
    for (name, seq), tokens in zip(sequences.items(), tokens_made, strict=False):
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        assert formats[name].peft.continues(prompt, tokens), name
    prompt = make_prompt(20)
    expected = formats["several"].peft.logits(prompt).log_softmax(-1)
    found = torch.tensor([entry.logprob for entry in entries])
    picked = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, picked, rtol=1e-4, atol=1e-3)


def test_on_the_kernels_of_the_gpu(
    tiny_model: Any, make_bench: Any, take_in: Any, make_prompt: Any, tmp_path: Path
) -> None:
    """Interpreted, which is slow: a small model and few tokens."""
    model = tiny_model("qwen2", **SMALL)
    bench = make_bench(model, "triton")
    cases.make(model, cases.CASES["several"], tmp_path, 7)
    case = take_in(model, tmp_path)
    with installed(bench, case.loaded):
        seq = bench.composed(make_prompt(7), uses(case.loaded))
        got = bench.all_logits([seq, bench.sequence([1, 2, 3], "qv")], chunk=6)
    torch.testing.assert_close(got[seq.seq_id], case.peft.logits(make_prompt(7)), **TOLERANCE)


def test_the_comparison_can_fail(
    make_formats: Any, tiny_model: Any, make_bench: Any, make_prompt: Any
) -> None:
    """Each format, left out or swapped or scaled wrongly, is far outside the tolerance."""
    bench, formats = make_bench(tiny_model("llama")), make_formats("llama")
    prompt = make_prompt(12)

    def distance(name: str, extras: Extras, digest: str = "wrong") -> float:
        wrong = replace(formats[name].loaded, digest=digest, extras=extras)
        with installed(bench, wrong):
            seq = bench.composed(prompt, uses(wrong))
            got = bench.all_logits([seq], 100)[seq.seq_id]
        return float((got - formats[name].peft.logits(prompt)).abs().max())

    def scaled(values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: 1.05 * value for key, value in values.items()}

    dora = formats["dora"].loaded.extras
    swapped = dict(zip(dora.magnitudes, reversed([*dora.magnitudes.values()]), strict=True))
    swapped = {k: v for k, v in swapped.items() if v.shape == dora.magnitudes[k].shape}
    biases = formats["biases of B"].loaded.extras
    saved = formats["saved modules"].loaded.extras
    norms = formats["saved norms"].loaded.extras
    tables = formats["saved tables"].loaded.extras
    lora = formats["LoRA of the tables"].loaded.extras
    assert lora.head_lora is not None
    half = replace(lora.head_lora, scaling=lora.head_lora.scaling / 2)
    wrong = {
        "no gains": distance("dora", Extras()),
        "a wrong gain": distance("dora", Extras(magnitudes=scaled(dora.magnitudes))),
        "swapped gains": distance("dora", Extras(magnitudes=dora.magnitudes | swapped)),
        "a wrong shift": distance("biases of B", Extras(delta_biases=scaled(biases.delta_biases))),
        "no shift": distance("biases of B", Extras()),
        "another weight": distance("saved modules", replace(saved, linears=scaled(saved.linears))),
        "no norms": distance("saved norms", Extras()),
        "another norm": distance("saved norms", Extras(norms=scaled(norms.norms))),
        "no embedding": distance("saved tables", replace(tables, embedding=None)),
        "no head": distance("saved tables", replace(tables, head=None)),
        "no LoRA of the embedding": distance(
            "LoRA of the tables", replace(lora, embedding_lora=None)
        ),
        "half the LoRA of the head": distance("LoRA of the tables", replace(lora, head_lora=half)),
        "another adapter's": distance("several", formats["tokens"].loaded.extras),
    }
    for what, size in wrong.items():
        assert size > 100 * TOLERANCE["atol"], (what, size)
    assert distance("dora", dora) < 1e-3, "the harness itself"


def test_what_is_linear_in_its_weight_composes(
    make_formats: Any, tiny_model: Any, make_bench: Any, make_prompt: Any
) -> None:
    """Both at once, beside a plain adapter, each with its weight in peft's own scaling."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    bench, prompt, formats = make_bench(model), make_prompt(15), make_formats("llama")
    weights = {"biases of B": 0.75, "LoRA of the tables": -0.5}
    first, second = weights
    base = AutoModelForCausalLM.from_pretrained(model)
    peft_model = PeftModel.from_pretrained(base, formats[first].folder, adapter_name=first)
    peft_model.load_adapter(formats[second].folder, adapter_name=second)
    for name, weight in weights.items():
        for layer in peft_model.modules():
            if hasattr(layer, "lora_A") and name in layer.scaling:
                layer.scaling[name] *= weight
    peft_model.base_model.set_adapter(list(weights))
    peft_model.eval()
    with torch.inference_mode():
        expected = peft_model(torch.tensor([prompt])).logits[0]
    with installed(bench, *(formats[name].loaded for name in weights)):
        both = tuple(AdapterUse(formats[n].loaded.digest, w) for n, w in weights.items())
        seq, other = bench.composed(prompt, both), bench.sequence(prompt, "all")
        got = bench.all_logits([seq, other], 100)[seq.seq_id]
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_what_is_not_says_so_when_it_is_asked_for() -> None:
    one, two = AdapterUse("a" * 64), AdapterUse("b" * 64)
    check_composition((one,), [one.digest])
    check_composition((one, weighted(two, 0.0)), [one.digest])
    check_composition((one, weighted(two, 0.5)), [])
    with pytest.raises(InvalidRequest, match=r"aaaaaaaaaaaa has weight 0\.5.*weight 1"):
        check_composition((weighted(one, 0.5),), [one.digest])
    with pytest.raises(InvalidRequest, match="aaaaaaaaaaaa is combined with others"):
        check_composition((one, two), [one.digest])


def weighted(use: AdapterUse, weight: float) -> AdapterUse:
    return AdapterUse(use.digest, weight)


def test_a_row_without_length_is_refused(
    make_formats: Any, tiny_model: Any, make_bench: Any
) -> None:
    """DoRA would divide by it: `B A` is made to take W's row away."""
    bench, loaded = make_bench(tiny_model("llama")), make_formats("llama")["dora"].loaded
    linear, columns = bench.decoder.linear(0, 3)
    weight = linear.product(torch.eye(64)).t()[columns]
    module = loaded.modules[0, 3]
    a, bt = torch.zeros_like(module.a), torch.zeros_like(module.bt)
    a[0], bt[0, 5] = weight[5], -1 / module.scaling
    modules = loaded.modules | {(0, 3): replace(module, a=a, bt=bt)}
    with pytest.raises(AdapterError, match="row 5 of o_proj of layer 0") as refused:
        BaseWeights(bench.decoder).prepare(replace(loaded, modules=modules))
    assert refused.value.code == "adapter_degenerate"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_covers_every_format(
    family: str, make_formats: Any, tiny_model: Any, make_bench: Any
) -> None:
    bench = make_bench(tiny_model(family))
    for name, case in make_formats(family).items():
        with installed(bench, case.loaded):
            result = probe(bench, tiny_model(family), case.loaded)
        assert result.agrees, (name, result)
        assert result.effect > 100 * result.error, (name, result)


def test_the_proof_finds_what_is_wrong(make_formats: Any, tiny_model: Any, make_bench: Any) -> None:
    """The file says otherwise than what serves."""
    model = tiny_model("qwen2")
    bench, formats = make_bench(model), make_formats("qwen2")

    def agrees(name: str, **wrong: Any) -> bool:
        loaded = formats[name].loaded
        with installed(bench, loaded):
            said = replace(loaded, extras=replace(loaded.extras, **wrong))
            return bool(probe(bench, model, said).agrees)

    def first_changed(values: dict[Any, Any]) -> dict[Any, Any]:
        key = sorted(values)[0]
        return values | {key: 1.1 * values[key]}

    own = formats["own biases"].loaded.extras
    saved = formats["saved modules"].loaded.extras
    assert agrees("own biases")
    assert not agrees("own biases", magnitudes=first_changed(own.magnitudes))
    assert not agrees("own biases", biases=first_changed(own.biases))
    assert not agrees("own biases", biases={})
    assert not agrees("saved modules", linears=first_changed(saved.linears))


def test_in_bf16_it_is_as_exact_as_the_base_model(
    make_formats: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Gains and shifts are worked out and applied in fp32, so only B is rounded once more."""
    model = tiny_model("qwen2")
    config, dtype = read_model_config(model), torch.bfloat16
    with Checkpoint(model) as checkpoint:
        decoder = load_decoder(config, checkpoint, select_ops("torch", CPU, dtype), dtype, CPU)
    pool = PagePool(config.num_layers, config.module_shapes, 8 << 20, dtype, CPU)
    for name, case in make_formats("qwen2").items():
        loaded = in_dtype(case.loaded, dtype)
        prepared = BaseWeights(decoder).prepare(loaded)
        pool.install(loaded.digest, pool.build_image(prepared.loaded, parts=prepared.parts))
        result = probe(SimpleNamespace(decoder=decoder, pool=pool), model, loaded)
        assert result.agrees, (name, result)
        assert result.error < 2 * result.base_error, (name, result)


def in_dtype(loaded: LoadedAdapter, dtype: torch.dtype) -> LoadedAdapter:
    modules = {
        key: replace(m, a=m.a.to(dtype), bt=m.bt.to(dtype)) for key, m in loaded.modules.items()
    }
    linears = {key: weight.to(dtype) for key, weight in loaded.extras.linears.items()}
    return replace(loaded, modules=modules, extras=replace(loaded.extras, linears=linears))


def probe(bench: Any, model: Path, loaded: LoadedAdapter) -> AdapterProbe:
    prober = AdapterProber(bench.decoder, bench.pool, 16, Path(), model)
    with Checkpoint(model) as checkpoint:
        norms = dora_norms(loaded, checkpoint, bench.decoder.config, bench.pool.dtype)
    source = FromFiles(loaded, norms)
    return prober.compare(source, prober.run_paged(source))

"""The probe passes what is right on every backend, and finds each way of being silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.weights import LoadedAdapter
from loraplex.engine.probe import NUM_TOKENS, probe, probe_tokens, reference_logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK_SIZE = 16


@pytest.fixture
def make(
    make_bench: Callable[..., Any], tiny_model: Any, tiny_adapters: Any, load: Any
) -> Callable[..., tuple[Any, dict[str, LoadedAdapter]]]:
    """(bench, adapters as loaded from their files)."""

    def made(family: str, backend: str = "torch") -> tuple[Any, dict[str, LoadedAdapter]]:
        model = tiny_model(family)
        bench = make_bench(model, backend)
        return bench, {name: load(model, name) for name in bench.digests}

    return made


@pytest.fixture
def load(tiny_adapters: Any, store_adapters: Any, tmp_path: Path) -> Any:
    from loraplex.adapters.store import AdapterStore
    from loraplex.adapters.weights import load_weights

    stored: dict[Path, dict[str, str]] = {}

    def of(model: Path, name: str) -> LoadedAdapter:
        if model not in stored:
            stored[model] = store_adapters(tmp_path, model, tiny_adapters(model))
        return load_weights(AdapterStore(tmp_path).path(stored[model][name]), torch.float32)

    return of


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_agrees(make: Any, family: str, backend: str) -> None:
    bench, adapters = make(family, backend)
    for name, loaded in adapters.items():
        result = probe(bench.decoder, bench.pool, BLOCK_SIZE, loaded)
        assert result.agrees, (name, result)
        assert result.has_effect
        assert result.effect > 100 * result.error, (name, result)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_transformers_own_model(make: Any, tiny_model: Any, family: str) -> None:
    from transformers import AutoModelForCausalLM

    bench, _ = make(family)
    tokens = probe_tokens("d" * 64, bench.decoder.config.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
        found = reference_logits(bench.decoder, tokens, {})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def changed(loaded: LoadedAdapter, **change: Any) -> LoadedAdapter:
    """The file says otherwise than the pages, which is the same as pages other than the file."""
    key = sorted(loaded.modules)[0]
    return replace(loaded, modules=loaded.modules | {key: replace(loaded.modules[key], **change)})


def test_every_silent_mistake_is_found(make: Any) -> None:
    bench, adapters = make("llama")
    right = adapters["all"]
    first = right.modules[sorted(right.modules)[0]]
    without_one = dict(sorted(right.modules.items())[1:])
    wrong = {
        "scaling of one module doubled": changed(right, scaling=2 * first.scaling),
        "a module missing": replace(right, modules=without_one),
        "another adapter": replace(adapters["rslora"], digest=right.digest),
        "one rank lost": changed(right, a=torch.cat([first.a[:-1], 0 * first.a[-1:]])),
        "B not transposed": changed(right, bt=first.bt.flip(0)),
    }
    assert probe(bench.decoder, bench.pool, BLOCK_SIZE, right).agrees
    for what, loaded in wrong.items():
        assert not probe(bench.decoder, bench.pool, BLOCK_SIZE, loaded).agrees, what


def test_an_adapter_that_changes_nothing_is_seen(make: Any) -> None:
    bench, adapters = make("llama")
    nothing = {k: replace(m, bt=0 * m.bt) for k, m in adapters["qv"].modules.items()}
    idle = replace(adapters["qv"], digest="0" * 64, modules=nothing)
    bench.pool.install(idle.digest, bench.pool.build_image(idle))
    try:
        result = probe(bench.decoder, bench.pool, BLOCK_SIZE, idle)
    finally:
        bench.pool.remove(idle.digest)
    assert result.agrees
    assert not result.has_effect


def test_weights_that_are_no_numbers_do_not_agree(make: Any) -> None:
    bench, adapters = make("llama")
    key = sorted(adapters["qv"].modules)[0]
    module = adapters["qv"].modules[key]
    bad = replace(
        adapters["qv"],
        digest="1" * 64,
        modules=adapters["qv"].modules | {key: replace(module, a=module.a * torch.nan)},
    )
    bench.pool.install(bad.digest, bench.pool.build_image(bad))
    try:
        assert not probe(bench.decoder, bench.pool, BLOCK_SIZE, bad).agrees
    finally:
        bench.pool.remove(bad.digest)


def test_the_tokens_depend_on_the_digest_only() -> None:
    one, two = probe_tokens("a", 1000), probe_tokens("b", 1000)
    assert one.tolist() == probe_tokens("a", 1000).tolist() != two.tolist()
    assert one.shape == (NUM_TOKENS,)
    assert int(one.max()) < 1000

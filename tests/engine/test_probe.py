"""The probe passes what is right on every backend, and finds each way of being silently wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraplex.adapters.weights import LoadedAdapter
from loraplex.engine import api
from loraplex.engine.api import AdapterProbe
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.hosted import HostedEngine
from loraplex.engine.probe import ACTIVATED_AT, AdapterProber, FromFiles, probe_tokens
from loraplex.engine.reference import Adapter, reference_logits


def probe(bench: Any, loaded: LoadedAdapter) -> AdapterProbe:
    prober = AdapterProber(bench.decoder, bench.pool, BLOCK_SIZE, Path(), Path())
    source = FromFiles(loaded)
    return prober.compare(source, prober.run_paged(source))


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
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


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_agrees(make: Any, family: str, backend: str) -> None:
    bench, adapters = make(family, backend)
    if backend == "triton":  # in the interpreter, which is slow
        adapters = {"patterns": adapters["patterns"]}
    for name, loaded in adapters.items():
        result = probe(bench, loaded)
        assert result.agrees, (name, result)
        assert result.effect > 100 * result.error, (name, result)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_transformers_own_model(make: Any, tiny_model: Any, family: str) -> None:
    from transformers import AutoModelForCausalLM

    bench, _ = make(family)
    tokens = probe_tokens(bench.decoder.config.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
        found = reference_logits(bench.decoder, tokens, Adapter())
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
    assert probe(bench, right).agrees
    for what, loaded in wrong.items():
        assert not probe(bench, loaded).agrees, what


def test_a_strong_adapter_agrees_and_its_mistakes_are_still_found(make: Any) -> None:
    """Its activations dwarf the base's, so it rounds more than the base does."""
    bench, adapters = make("llama")
    loud = {k: replace(m, scaling=60 * m.scaling) for k, m in adapters["qv"].modules.items()}
    strong = replace(adapters["qv"], digest="2" * 64, modules=loud)
    bench.pool.install(strong.digest, bench.pool.build_image(strong))
    first = strong.modules[sorted(strong.modules)[0]]
    try:
        result = probe(bench, strong)
        wrong = {
            "scaling of one module 1 % off": changed(strong, scaling=1.01 * first.scaling),
            "one rank lost": changed(strong, a=torch.cat([first.a[:-1], 0 * first.a[-1:]])),
        }
        found = {what: probe(bench, loaded) for what, loaded in wrong.items()}
    finally:
        bench.pool.remove(strong.digest)
    assert result.agrees, result
    assert result.effect > 1
    # How much more it rounds depends on the machine; that it may is what is new here.
    assert result.tolerance > 4 * result.base_error
    for what, mistaken in found.items():
        assert not mistaken.agrees, (what, mistaken)


def test_an_adapter_that_changes_nothing_is_seen(make: Any) -> None:
    bench, adapters = make("llama")
    nothing = {k: replace(m, bt=0 * m.bt) for k, m in adapters["qv"].modules.items()}
    idle = replace(adapters["qv"], digest="0" * 64, modules=nothing)
    bench.pool.install(idle.digest, bench.pool.build_image(idle))
    try:
        result = probe(bench, idle)
    finally:
        bench.pool.remove(idle.digest)
    assert result.agrees
    assert result.effect == 0


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
        assert not probe(bench, bad).agrees
    finally:
        bench.pool.remove(bad.digest)


@pytest.fixture
def hosted(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Iterator[tuple[HostedEngine, dict[str, str]]]:
    model = tiny_model("llama")
    digests = store_adapters(tmp_path, model, tiny_adapters(model))
    engine = build_engine(
        EngineConfig(
            model=str(model),
            adapter_dir=tmp_path,
            backend="torch",
            num_threads=1,
            max_model_len=128,
            kv_cache_memory=16 << 20,
            adapter_memory=8 << 20,
        )
    )
    yield engine, digests
    engine.close()


def ask(hosted: HostedEngine, digest: str, outputs: list[api.SequenceOutput]) -> api.Answer:
    hosted.call(api.Call(call_id=7, method="probe", digest=digest))
    deadline = time.monotonic() + 60
    while not (answers := hosted.take_answers()):
        assert time.monotonic() < deadline, "no answer"
        outputs += hosted.step()
        time.sleep(0.001)
    return answers[0]


def test_an_operator_asks_while_a_request_runs(
    hosted: tuple[HostedEngine, dict[str, str]],
) -> None:
    engine, digests = hosted
    request = api.GenerationRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        sampling=api.SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True),
    )
    engine.add(request)
    outputs: list[api.SequenceOutput] = []
    for name in ("rank24", "patterns"):
        answer = ask(engine, digests[name], outputs)
        assert answer.error is None, answer.error
        found = msgspec.msgpack.decode(answer.result, type=AdapterProbe)
        assert found.digest == digests[name]
        assert found.agrees
        assert found.effect > found.tolerance
    while not any(output.finish_reason for output in outputs):
        outputs += engine.step()
    assert sum(len(output.token_ids) for output in outputs) == 100, "the request went on"


def test_what_cannot_be_probed_says_why_and_the_engine_lives(
    hosted: tuple[HostedEngine, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, digests = hosted
    answer = ask(engine, "0" * 64, [])
    assert answer.error is not None
    assert answer.error.code == "adapter_not_found"
    (tmp_path / digests["qv"][:2] / digests["qv"] / "adapter_model.safetensors").unlink()
    answer = ask(engine, digests["qv"], [])
    assert answer.error is not None
    assert answer.error.code == "adapter_corrupt"

    def broken(self: AdapterProber, source: FromFiles) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AdapterProber, "run_paged", broken)
    answer = ask(engine, digests["all"], [])
    assert answer.error is not None
    assert answer.error.code == "probe_failed"
    assert "out of memory" in answer.error.message
    monkeypatch.undo()
    assert ask(engine, digests["all"], []).error is None


def test_an_activated_lora_is_proven_from_where_it_begins(
    make_bench: Any,
    tiny_model: Any,
    store_adapters: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraplex.adapters.store import AdapterStore
    from loraplex.adapters.weights import load_weights
    from loraplex.engine import probe as probe_module

    model = tiny_model("llama")
    folders = sys.modules["alora_cases"].save_adapters(model, tmp_path)
    digest = store_adapters(tmp_path / "store", model, folders)["call"]
    activated = load_weights(AdapterStore(tmp_path / "store").path(digest), torch.float32)
    assert activated.invocation_tokens
    for backend in ("torch", "native"):
        bench = make_bench(model, backend, folders)
        prober = AdapterProber(bench.decoder, bench.pool, BLOCK_SIZE, Path(), Path())
        source = FromFiles(activated)
        paged = prober.run_paged(source)
        result = prober.compare(source, paged)
        assert result.agrees
        assert result.effect > 100 * result.error
        everywhere = FromFiles(replace(activated, invocation_tokens=()))
        assert not prober.compare(everywhere, paged).agrees
        for shift in (-1, 1):  # a token early, a token late
            with monkeypatch.context() as patch:
                patch.setattr(probe_module, "ACTIVATED_AT", ACTIVATED_AT + shift)
                assert not prober.compare(source, paged).agrees

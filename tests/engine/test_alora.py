"""Activated LoRAs (aLoRA) against peft's own: logits, tokens, shared K/V, moved activations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine import api
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.hosted import HostedEngine

cases = sys.modules["alora_cases"]
CALL, CHECK = cases.CALL, cases.CHECK
CLOSE = {"rtol": 1e-3, "atol": 2e-3}
BLOCK = 16
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def adapters(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`adapters(model) -> {name: folder}`."""
    made: dict[Path, dict[str, Path]] = {}

    def of(model: Path) -> dict[str, Path]:
        if model not in made:
            made[model] = cases.save_adapters(model, tmp_path_factory.mktemp("alora"))
        return made[model]

    return of


@pytest.fixture(scope="module")
def peft(adapters: Any) -> Callable[[Path], Any]:
    made: dict[Path, Any] = {}

    def of(model: Path) -> Any:
        if model not in made:
            made[model] = cases.Peft(model, adapters(model))
        return made[model]

    return of


@pytest.fixture(scope="module")
def activated_bench(tiny_model: Any, adapters: Any, make_bench: Any) -> Callable[..., Any]:
    def of(family: str, backend: str, **changes: Any) -> Any:
        model = tiny_model(family, **changes)
        return make_bench(model, backend, adapters(model))

    return of


# --- one batch ----------------------------------------------------------------------------------


def composed(bench: Any, prompt: list[int], *names: str) -> Any:
    return bench.composed(prompt, tuple(AdapterUse(bench.digests[name]) for name in names))


def random_prompt(make_prompt: Any, length: int, seed: int) -> list[int]:
    """Without tokens that invoke."""
    return [20 + token % 200 for token in make_prompt(length, seed)]


@pytest.mark.parametrize(
    ("backend", "family", "chunk"),
    [
        ("torch", "llama", 100),
        ("torch", "mistral", 7),
        ("native", "llama", 7),
        ("native", "qwen3", 100),
        ("triton", "llama", 100),  # in the interpreter
    ],
)
def test_a_mixed_batch_equals_peft(
    backend: str,
    family: str,
    chunk: int,
    activated_bench: Any,
    peft: Any,
    tiny_model: Any,
    make_prompt: Any,
) -> None:
    """Base, plain LoRA and two activated ones, invoked early, late, at once, twice and never."""
    is_slow = backend == "triton"
    changes = SMALL if is_slow else {}
    bench = activated_bench(family, backend, **changes)
    reference = peft(tiny_model(family, **changes))
    words = [random_prompt(make_prompt, 6 + i, i) for i in range(7)]
    wanted: list[tuple[str | None, list[int], bool]] = [
        (None, words[0] + CALL + words[1], False),
        ("plain", words[1] + CALL, True),
        ("call", words[2] + CALL + words[3], True),
        ("call", CALL + words[4], True),
        ("call", CALL + words[5] + CALL + words[0], True),
        ("check", words[6] + words[0] + CHECK, True),
        ("call", words[6] + CHECK, False),
    ]
    wanted = wanted[:5:2] if is_slow else wanted
    sequences = [bench.sequence(prompt, adapter) for adapter, prompt, _ in wanted]
    found = bench.all_logits(sequences, chunk)
    for seq, (adapter, prompt, is_changed) in zip(sequences, wanted, strict=True):
        expected, base = reference.logits(prompt, adapter), reference.logits(prompt, None)
        torch.testing.assert_close(found[seq.seq_id], expected, **CLOSE)
        assert ((expected - base).abs().max() > 0.5) == is_changed, (adapter, prompt)


@pytest.mark.parametrize("shift", [-1, 1])
def test_one_token_early_or_late_is_found_out(
    shift: int, activated_bench: Any, peft: Any, tiny_model: Any, make_prompt: Any
) -> None:
    bench, reference = activated_bench("llama", "torch"), peft(tiny_model("llama"))
    prompt = random_prompt(make_prompt, 9, 3) + CALL + random_prompt(make_prompt, 4, 4)
    seq = bench.sequence(prompt, "call")
    assert seq.spans[1][0] == 9
    found = bench.all_logits([seq], 100)[seq.seq_id]
    torch.testing.assert_close(found, reference.logits(prompt, "call", len(prompt) - 9), **CLOSE)
    other = reference.logits(prompt, "call", len(prompt) - 9 - shift)
    assert (other - found).abs().max() > 0.05


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_plain_and_an_activated_adapter_together(
    backend: str, activated_bench: Any, peft: Any, tiny_model: Any, make_prompt: Any
) -> None:
    bench, reference = activated_bench("llama", backend), peft(tiny_model("llama"))
    prompt = random_prompt(make_prompt, 8, 1) + CALL + random_prompt(make_prompt, 5, 2)
    seq = composed(bench, prompt, "plain", "call")
    found = bench.all_logits([seq], 6)[seq.seq_id]
    expected = reference.both(prompt, "plain", "call")
    torch.testing.assert_close(found, expected, **CLOSE)
    for alone in ("plain", "call"):
        assert (reference.logits(prompt, alone) - expected).abs().max() > 0.5


def test_two_activated_adapters_begin_each_at_its_place(
    activated_bench: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """peft cannot search for two; the composition from either place on is the plain one."""
    bench = activated_bench("llama", "torch")
    words = [random_prompt(make_prompt, 6, i) for i in range(3)]
    prompt = words[0] + CHECK + words[1] + CALL + words[2]
    both, check = composed(bench, prompt, "call", "check"), bench.sequence(prompt, "check")
    found = bench.all_logits([both, check], 5)
    call_at = len(words[0] + CHECK + words[1])
    assert [first for first, _ in both.spans] == [0, 6, call_at]
    until, after = slice(0, call_at), slice(call_at, None)
    torch.testing.assert_close(found[both.seq_id][until], found[check.seq_id][until], **CLOSE)
    assert (found[both.seq_id][after] - found[check.seq_id][after]).abs().max() > 0.5


# --- the engine ---------------------------------------------------------------------------------

NUM_TOKENS = 6
Case = tuple[list[int], str | None]


class Driver:
    """An engine whose invariants are checked after every step."""

    def __init__(self, hosted: HostedEngine, digests: dict[str, str]) -> None:
        self.hosted = hosted
        self.digests = digests
        self.num_tokens = NUM_TOKENS
        self.count = 0

    def start(self, prompt: list[int], adapter: str | None, salt: str = "") -> str:
        self.count += 1
        uses = () if adapter is None else (AdapterUse(self.digests[adapter]),)
        params = SamplingParams(temperature=0.0, max_tokens=self.num_tokens, ignore_eos=True)
        request = GenerationRequest(
            request_id=str(self.count),
            prompt_token_ids=prompt,
            sampling=params,
            adapters=uses,
            cache_salt=salt,
        )
        self.hosted.add(request)
        return request.request_id

    def finish(self) -> dict[str, list[api.SequenceOutput]]:
        outputs: dict[str, list[api.SequenceOutput]] = {}
        while self.hosted.engine.has_work():
            for output in self.hosted.step():
                assert output.error is None, output.error
                outputs.setdefault(output.request_id, []).append(output)
            self.hosted.engine.check_invariants()
            self.hosted.engine.idle_wait(1.0)
        return outputs

    def one(self, prompt: list[int], adapter: str | None, salt: str = "") -> tuple[list[int], int]:
        """Its tokens, and how many of the prompt's were in the cache."""
        name = self.start(prompt, adapter, salt)
        news = self.finish()[name]
        assert news[0].num_cached_tokens is not None
        return [token for output in news for token in output.token_ids], news[0].num_cached_tokens

    def all(self, wanted: list[Case]) -> list[list[int]]:
        names = [self.start(*case) for case in wanted]
        outputs = self.finish()
        return [[t for output in outputs[name] for t in output.token_ids] for name in names]


@pytest.fixture
def make_driver(
    tiny_model: Any, adapters: Any, store_adapters: Any, tmp_path: Path
) -> Iterator[Callable[..., Driver]]:
    open_: list[HostedEngine] = []

    def make(model: Path, **settings: Any) -> Driver:
        digests = store_adapters(tmp_path / "store", model, adapters(model))
        defaults = {
            "model": str(model),
            "adapter_dir": tmp_path / "store",
            "backend": "torch",
            "num_threads": 1,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 24,
            "kv_cache_memory": 16 << 20,
            "adapter_memory": 8 << 20,
        }
        hosted = build_engine(EngineConfig(**{**defaults, **settings}))
        open_.append(hosted)
        return Driver(hosted, digests)

    yield make
    for hosted in open_:
        hosted.close()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_conversation_goes_from_base_to_adapter_and_back(
    backend: str, make_driver: Any, peft: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Each turn finds all full blocks of what the turns before computed alike, and no more."""
    model = tiny_model("llama")
    driver, reference = make_driver(model, backend=backend), peft(model)
    chat = random_prompt(make_prompt, 50, 1)

    def turn(prompt: list[int], adapter: str | None, shared: int) -> list[int]:
        tokens, cached = driver.one(prompt, adapter)
        assert tokens == reference.generate(prompt, adapter, NUM_TOKENS), (adapter, shared)
        assert cached == shared, adapter
        return tokens

    chat = chat + turn(chat, None, 0)
    assert len(chat) == 56
    turn(chat + CALL, "call", 48)  # begins inside the fourth block
    turn(chat + CHECK, "check", 48)  # another adapter, as well
    turn(chat + CALL, None, 48)  # the same tokens by the base model: not the block with the call
    turn(chat + CALL, "call", 48)
    chat = chat + CALL + random_prompt(make_prompt, 40, 2)
    answer = turn(chat, "call", 48)
    turn(chat + answer, "call", 96)  # goes on without another call
    again = chat + answer + CALL
    turn(again, "call", 48)  # called again: what ran with the adapter is history, the base's
    turn(again, "call", 96)
    turn(again, None, 96)
    turn(again, "plain", 0)


def test_a_thousand_tokens_of_base_conversation_are_not_computed_again(
    make_driver: Any, peft: Any, tiny_model: Any, make_prompt: Any
) -> None:
    model = tiny_model("llama", max_position_embeddings=2048)
    driver, reference = make_driver(model, max_num_batched_tokens=256), peft(model)
    chat = random_prompt(make_prompt, 1000, 1)
    answer, _ = driver.one(chat, None)
    prompt = chat + answer + random_prompt(make_prompt, 10, 2) + CALL
    before = driver.hosted.stats().step_tokens
    tokens, cached = driver.one(prompt, "call")
    computed = driver.hosted.stats().step_tokens - before - (NUM_TOKENS - 1)
    assert len(prompt) == 1019
    assert cached == 992  # 62 full blocks: the last token of an answer never runs
    assert computed == 27
    assert tokens == reference.generate(prompt, "call", NUM_TOKENS)
    _, cached = driver.one(prompt, "plain")
    assert cached == 0, "a plain LoRA has to compute them all"
    _, cached = driver.one(prompt, "call", "another salt")
    assert cached == 0


def test_without_a_call_it_is_the_base_model_and_says_so(
    make_driver: Any, tiny_model: Any, peft: Any, make_prompt: Any
) -> None:
    driver, reference = make_driver(tiny_model("llama")), peft(tiny_model("llama"))
    prompt = random_prompt(make_prompt, 40, 1)
    driver.one(prompt, None)
    name = driver.start(prompt, "call")
    news = driver.finish()[name]
    tokens = [token for output in news for token in output.token_ids]
    assert tokens == reference.generate(prompt, "call", NUM_TOKENS)
    assert tokens == reference.generate(prompt, None, NUM_TOKENS)
    assert [output.not_invoked for output in news] == [[driver.digests["call"]], *[[]] * 5]
    assert news[0].num_cached_tokens == 32
    name = driver.start(prompt + CALL, "call")
    assert not any(output.not_invoked for output in driver.finish()[name])


def test_preempted_it_is_recomputed_with_its_activation(
    make_driver: Any, peft: Any, tiny_model: Any, make_prompt: Any
) -> None:
    from loraplex.engine.memory import kv_block_bytes
    from loraplex.engine.model_config import read_model_config

    model = tiny_model("llama")
    config = read_model_config(model)
    block = kv_block_bytes(config, BLOCK, config.dtype)
    driver = make_driver(model, kv_cache_memory=7 * block, max_model_len=64)
    driver.num_tokens = 12
    wanted: list[Case] = []
    for i, adapter in enumerate(["call", "plain", "check", None, "call"]):
        words = random_prompt(make_prompt, 24 + i, i)
        called = {"call": CALL, "check": CHECK}.get(adapter or "", [])
        wanted.append((words[: 8 + 4 * i] + called + words[8 + 4 * i :], adapter))
    made = driver.all(wanted)
    assert driver.hosted.stats().num_preemptions > 0
    for (prompt, adapter), tokens in zip(wanted, made, strict=True):
        assert tokens == peft(model).generate(prompt, adapter, 12), adapter


def test_many_choices_and_an_abort_beside_them(
    make_driver: Any, peft: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Choices of one prompt share blocks in the very step that fills them."""
    model = tiny_model("llama")
    driver = make_driver(model)
    prompt = random_prompt(make_prompt, 37, 1) + CALL + random_prompt(make_prompt, 9, 2)
    base = prompt[:36] + random_prompt(make_prompt, 3, 5)
    names = [driver.start(prompt, "call") for _ in range(3)]
    gone, other = driver.start(prompt, "call"), driver.start(base, None)
    early = [output for _ in range(3) for output in driver.hosted.step()]
    driver.hosted.cancel(gone)
    outputs = driver.finish()
    tokens = {
        name: [t for o in early for t in o.token_ids if o.request_id == name] for name in outputs
    }
    for name, news in outputs.items():
        tokens[name] += [token for output in news for token in output.token_ids]
    expected = peft(model).generate(prompt, "call", NUM_TOKENS)
    assert [tokens[name] for name in names] == [expected] * 3
    assert tokens[gone] == expected[: len(tokens[gone])]
    assert outputs[gone][-1].finish_reason == api.FinishReason.ABORT
    assert tokens[other] == peft(model).generate(base, None, NUM_TOKENS)

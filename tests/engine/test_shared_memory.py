"""One process, one start: first many adapters, then long contexts, both more than fixed shares of
the same memory hold; every token as transformers + peft say.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.engine import api, build, memory_exchange
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.hosted import HostedEngine
from loraplex.engine.machine import Memory
from loraplex.engine.memory import weights_bytes, workspace_bytes
from loraplex.engine.model_config import read_model_config

MAX_LEN = 512
NUM_ADAPTERS = 12
NUM_TOKENS = 4
DEADLINE_S = 120


@pytest.fixture(scope="module")
def many_adapters(
    tiny_model: Any, tiny_adapters: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Of rank 8 on all modules, each with weights of its own."""
    source = tiny_adapters(tiny_model("llama"))["all"]
    tensors = load_file(source / "adapter_model.safetensors")
    root, made = tmp_path_factory.mktemp("many"), {}
    for number in range(NUM_ADAPTERS):
        made[f"n{number}"] = folder = root / f"n{number}"
        folder.mkdir()
        config = (source / "adapter_config.json").read_bytes()
        (folder / "adapter_config.json").write_bytes(config)
        generator = torch.Generator().manual_seed(number)
        other = {
            name: torch.randn(tensor.shape, generator=generator) * 0.12
            for name, tensor in tensors.items()
        }
        save_file(other, folder / "adapter_model.safetensors")
    return made


def build_small(
    monkeypatch: pytest.MonkeyPatch, model: Path, store: Path, **settings: Any
) -> HostedEngine:
    """On a machine that has 8 MB beside the model and its workspace."""
    defaults = {
        "model": str(model),
        "adapter_dir": store,
        "num_threads": 1,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 12 * MAX_LEN,
        "max_model_len": MAX_LEN,
    }
    config, decoder = EngineConfig(**{**defaults, **settings}), read_model_config(model)
    dtype = torch.float32
    free = (8 << 20) + weights_bytes(decoder, dtype) + workspace_bytes(config, decoder, dtype)
    monkeypatch.setattr(build, "device_memory", lambda device: Memory(total=free, free=free))
    monkeypatch.setattr(memory_exchange, "HOLD_S", 0.0)
    return build_engine(config)


def generate(
    hosted: HostedEngine, cases: list[tuple[list[int], str | None]]
) -> tuple[list[list[int]], int]:
    """The tokens of each, all asked at once, and how many KV blocks were in use at most."""
    tokens: dict[str, list[int]] = {}
    for prompt, digest in cases:
        name = f"r{time.monotonic_ns()}"
        tokens[name] = []
        hosted.add(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
                adapters=() if digest is None else (AdapterUse(digest),),
            )
        )
    most, end = 0, time.monotonic() + DEADLINE_S
    while hosted.engine.has_work():
        assert time.monotonic() < end, "the engine does not come to an end"
        for output in hosted.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
        hosted.engine.check_invariants()
        most = max(most, hosted.engine.memory().kv_blocks_used)
        hosted.engine.idle_wait(1.0)
    return list(tokens.values()), most


def resident(hosted: HostedEngine) -> list[api.AdapterResidencyInfo]:
    return [r for r in hosted.engine.adapters() if r.state == api.AdapterState.DEVICE]


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_adapters_and_long_contexts_take_turns(
    backend: str,
    tiny_model: Any,
    many_adapters: dict[str, Path],
    store_adapters: Any,
    make_prompt: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference_of_many: Callable[[], Any],
) -> None:
    model = tiny_model("llama")
    digests = store_adapters(tmp_path, model, many_adapters)
    hosted = build_small(monkeypatch, model, tmp_path, backend=backend)
    reference = reference_of_many()
    try:
        fixed = hosted.engine.memory()
        assert fixed.static_because == ""
        assert fixed.superblock_bytes > 0

        short = [(make_prompt(9, seed), name) for seed, name in enumerate(digests)]
        made, _ = generate(hosted, [(prompt, digests[name]) for prompt, name in short])
        for (prompt, name), tokens in zip(short, made, strict=True):
            assert reference.continues(prompt, tokens, name), name
        assert len(resident(hosted)) == NUM_ADAPTERS
        after = hosted.engine.memory()
        assert after.adapter_bytes_used > fixed.adapter_bytes_total, "fixed shares hold fewer"
        assert after.superblocks_to_adapters > 0

        long = [
            (make_prompt(MAX_LEN - NUM_TOKENS - 4, seed), name)
            for seed, name in enumerate([None, "n0", None, "n1", *[None] * 8])
        ]
        cases = [(prompt, name and digests[name]) for prompt, name in long]
        made, most = generate(hosted, cases)
        assert most > fixed.kv_blocks_total, "fixed shares hold fewer"
        assert hosted.engine.memory().superblocks_to_kv > 0
        for (prompt, name), tokens in zip(long, made, strict=True):
            assert reference.continues(prompt, tokens, name), name

        made, _ = generate(hosted, [(prompt, digests[name]) for prompt, name in short])
        for (prompt, name), tokens in zip(short, made, strict=True):
            assert reference.continues(prompt, tokens, name), f"{name}, again"
        assert hosted.engine.memory().shared_bytes == fixed.shared_bytes
    finally:
        hosted.close()


@pytest.fixture(scope="module")
def reference_of_many(
    tiny_model: Any, many_adapters: dict[str, Path], make_reference: Any
) -> Callable[[], Any]:
    kind = type(make_reference(tiny_model("llama")))
    made: list[Any] = []

    def make() -> Any:
        if not made:
            made.append(kind(tiny_model("llama"), many_adapters))
        return made[0]

    return make


def test_another_adapters_weights_would_be_found_out(
    reference_of_many: Callable[[], Any], make_prompt: Any
) -> None:
    reference = reference_of_many()
    prompt = make_prompt(9, 0)
    tokens: list[int] = []
    for _ in range(NUM_TOKENS):
        tokens.append(int(reference.logits(prompt + tokens, "n0")[-1].argmax()))
    assert reference.continues(prompt, tokens, "n0")
    assert not any(reference.continues(prompt, tokens, f"n{i}") for i in range(1, NUM_ADAPTERS))


@pytest.mark.parametrize("flag", ["kv_cache_memory", "adapter_memory"])
def test_what_a_flag_fixes_stays(
    flag: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {flag: 2 << 20, "backend": "torch"}
    hosted = build_small(monkeypatch, tiny_model("llama"), tmp_path, **settings)
    memory = hosted.engine.memory()
    hosted.close()
    assert memory.static_because == f"fixed by --{flag.replace('_', '-')}"
    assert memory.superblock_bytes == 0
    assert memory.kv_blocks_min == memory.kv_blocks_max == memory.kv_blocks_total
    assert memory.adapter_bytes_max == memory.adapter_bytes_total

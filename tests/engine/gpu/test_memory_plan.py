"""A GPU's memory: all that may be used is, given sizes are kept, and refusals name the flag."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from loraplex.adapters.pool import PagePool
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError
from loraplex.engine.gpu import memory_profile
from loraplex.engine.gpu.memory_plan import (
    MAX_PINNED_BYTES,
    MeasuredGpu,
    check_weights_fit,
    plan_gpu_memory,
)
from loraplex.engine.gpu.memory_profile import largest_runs, measure_gpu
from loraplex.engine.machine import Memory
from loraplex.engine.memory import MemoryPlan
from loraplex.engine.model_config import DecoderConfig, decoder_config

GIB = 1 << 30
CPU = torch.device("cpu")


def llama_8b() -> DecoderConfig:
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072,
    )  # fmt: skip
    return decoder_config(config)


def plan(total: float = 140, weights: float = 15, **settings: Any) -> MemoryPlan:
    config = EngineConfig(model="m", adapter_dir=Path("a"), **settings).for_device("cuda")
    before = Memory(total=int(total * GIB), free=int((total - 0.5) * GIB))
    gpu = MeasuredGpu(
        before=before,
        now=Memory(before.total, before.free - int(weights * GIB)),
        weights=int(weights * GIB),
        step=GIB,
        graphs=GIB // 4,
    )
    host = Memory(total=128 * GIB, free=100 * GIB)
    return plan_gpu_memory(config, llama_8b(), torch.bfloat16, gpu, host)


@pytest.mark.parametrize("total", [24, 48, 80, 140])
@pytest.mark.parametrize("utilization", [0.8, 0.95])
def test_all_that_may_be_used_is_used(total: int, utilization: float) -> None:
    p = plan(total, gpu_memory_utilization=utilization)
    others = GIB // 2  # used by others before
    limit = total * GIB * utilization - others
    used = p.weights_bytes + p.workspace_bytes + p.kv_cache_bytes + p.adapter_bytes
    assert limit - p.kv_block_bytes <= used <= limit
    table = {purpose: num_bytes for purpose, num_bytes, _ in p.table()}
    assert table.pop("adapters on the host") == p.host_adapter_bytes <= MAX_PINNED_BYTES
    assert sum(table.values()) == p.device_bytes_free
    assert p.max_model_len <= p.num_kv_blocks * 16


def test_every_sequence_has_room_for_its_own_adapter_on_a_large_gpu() -> None:
    p = plan(140)
    assert p.adapter_bytes == 256 * p.adapter_page_bytes
    assert p.max_model_len == 131072
    assert plan(24).adapter_bytes < plan(48).adapter_bytes < p.adapter_bytes


def test_the_table_says_why() -> None:
    reasons = {purpose: reason for purpose, _, reason in plan().table()}
    assert "all that is left" in reasons["kv cache"]
    assert "one a sequence" in reasons["adapters on the device"]
    assert "2048 tokens, 256 sequences" in reasons["workspace"]
    assert "--gpu-memory-utilization 0.9" in reasons["left to others"]
    reasons = {purpose: reason for purpose, _, reason in plan(48).table()}
    assert "20% of what is left" in reasons["adapters on the device"]
    given = plan(kv_cache_memory=GIB, adapter_memory=GIB, host_adapter_memory=0)
    reasons = {purpose: reason for purpose, _, reason in given.table()}
    assert reasons["kv cache"] == reasons["adapters on the device"] == ""
    assert (given.adapter_bytes, given.host_adapter_bytes) == (GIB, 0)
    assert GIB - given.kv_block_bytes < given.kv_cache_bytes <= GIB


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="raise --gpu-memory-utilization") as caught:
        plan(18)
    assert caught.value.code == "model_too_large"
    with pytest.raises(ModelError, match="lower --kv-cache-memory or --adapter-memory"):
        plan(24, kv_cache_memory=9 * GIB)
    with pytest.raises(ModelError, match="lower --kv-cache-memory or --adapter-memory"):
        plan(24, adapter_memory=9 * GIB)
    with pytest.raises(ModelError, match=r"--kv-cache-memory \d+ or more, or --max-model-len"):
        plan(24, max_model_len=131072)
    config = EngineConfig(model="m", adapter_dir=Path("a")).for_device("cuda")
    with pytest.raises(ModelError, match=r"15\.0 GiB of weights"):
        check_weights_fit(config, llama_8b(), torch.bfloat16, Memory(16 * GIB, 15 * GIB))
    check_weights_fit(config, llama_8b(), torch.bfloat16, Memory(24 * GIB, 23 * GIB))


@pytest.mark.parametrize(
    ("seqs", "tokens", "length"), [(1, 1, 9), (256, 2048, 131072), (8, 8, 64), (4, 100, 30)]
)
def test_the_largest_step_is_as_large_as_can_be(seqs: int, tokens: int, length: int) -> None:
    runs = largest_runs(seqs, tokens, length)
    assert len(runs) == seqs
    assert sum(new for new, _ in runs) == min(tokens, seqs * length)
    assert all(1 <= new <= total <= length for new, total in runs)


def test_measuring_runs_that_step(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def peak(run: Any, device: torch.device) -> int:
        run()
        return 1000

    monkeypatch.setattr(memory_profile, "peak_bytes", peak)
    runner, _, _ = make_runner(capture=False)
    launch = runner.launch

    def launched(schedule: Any) -> Any:
        steps.append(schedule.num_tokens)
        assert len(schedule.scheduled) == 8
        return launch(schedule)

    monkeypatch.setattr(runner, "launch", launched)
    config = EngineConfig(
        model="m", adapter_dir=Path("a"), max_num_seqs=8, max_num_batched_tokens=40
    )
    pool: PagePool = runner._pool
    gpu = measure_gpu(config, Memory(9, 8), pool, lambda *_: runner, 64, CPU)
    assert steps == [40]
    assert (gpu.step, gpu.before) == (1000, Memory(9, 8))
    assert gpu.weights == gpu.before.free - gpu.now.free
    assert gpu.graphs > 4 * memory_profile.GRAPH_BYTES
    assert sys.modules["loraplex.engine.gpu.dummy_steps"].DIGEST not in pool
    runner.states.check_invariants()
    assert len(runner.states._free) == 8

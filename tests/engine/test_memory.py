"""Memory plans: sane defaults on small and large machines, and refusals that name the flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ModelError
from loraplex.engine.machine import Memory, available_cpus, device_memory
from loraplex.engine.memory import MemoryPlan, plan_memory, size
from loraplex.engine.model_config import DecoderConfig, decoder_config

GIB = 1 << 30
CPU = torch.device("cpu")


def llama(**changes: Any) -> DecoderConfig:
    """0.5 billion parameters, 1 GB in bf16, unless changed."""
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    return decoder_config(AutoConfig.for_model("llama", **{**defaults, **changes}))


def plan(free: float, model: DecoderConfig | None = None, **settings: Any) -> MemoryPlan:
    config = EngineConfig(model="m", adapter_dir=Path("a"), **settings).for_device("cpu")
    memory = Memory(total=int(2 * free * GIB), free=int(free * GIB))
    return plan_memory(config, model or llama(), torch.bfloat16, CPU, memory)


@pytest.mark.parametrize("free", [2, 3, 8, 32, 256])
def test_defaults_leave_room_on_every_machine(free: int) -> None:
    p = plan(free)
    used = p.weights_bytes + p.kv_cache_bytes + p.adapter_bytes + p.workspace_bytes
    assert used + p.host_adapter_bytes < free * GIB
    rest = free * GIB - p.weights_bytes - p.workspace_bytes
    assert p.kv_cache_bytes <= 0.4 * rest
    assert 1 <= p.max_model_len <= p.num_kv_blocks * 16
    assert p.adapter_bytes >= p.adapter_page_bytes
    table = {purpose: num_bytes for purpose, num_bytes, _ in p.table()}
    assert table["left to others"] > 0
    assert sum(table.values()) == p.device_bytes_free


def test_a_large_machine_is_not_filled_up() -> None:
    """A long context counts once, typical lengths for everybody."""
    p = plan(256)
    assert p.max_model_len == 131072
    assert p.num_kv_blocks == max(64 * 2048, 131072) // 16
    assert p.adapter_bytes == 64 * p.adapter_page_bytes


def test_the_length_shrinks_to_what_fits_when_nobody_asked_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    p = plan(4)
    assert p.max_model_len == p.num_kv_blocks * 16 < 131072
    assert "--kv-cache-memory" in caplog.text


def test_a_length_asked_for_is_kept_or_refused() -> None:
    assert plan(4, max_model_len=4096).max_model_len == 4096
    with pytest.raises(ModelError, match=r"--kv-cache-memory \d+ or more, or --max-model-len"):
        plan(4, max_model_len=100_000)
    with pytest.raises(ModelError, match=r"--kv-cache-memory \d+ or more"):
        plan(32, max_model_len=4096, kv_cache_memory=1 << 20)


def test_the_flag_in_the_refusal_helps() -> None:
    with pytest.raises(ModelError) as caught:
        plan(8, max_model_len=20_000, kv_cache_memory=1 << 20)
    needed = int(caught.value.message.split("--kv-cache-memory ")[1].split()[0])
    assert plan(8, max_model_len=20_000, kv_cache_memory=needed).max_model_len == 20_000
    with pytest.raises(ModelError):
        plan(8, max_model_len=20_000, kv_cache_memory=needed - 1)


def test_a_model_too_large_is_refused() -> None:
    with pytest.raises(ModelError, match="does not fit") as caught:
        plan(1)
    assert caught.value.code == "model_too_large"


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(ModelError, match="--max-model-len 2048 or less"):
        plan(32, llama(max_position_embeddings=2048), max_model_len=4096)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ModelError, match="lower --kv-cache-memory or --adapter-memory"):
        plan(8, kv_cache_memory=4 * GIB, adapter_memory=4 * GIB)


def test_settings_that_fit_are_kept() -> None:
    p = plan(8, kv_cache_memory=GIB, adapter_memory=GIB // 2, host_adapter_memory=0)
    assert GIB - p.kv_block_bytes < p.kv_cache_bytes <= GIB
    assert (p.adapter_bytes, p.host_adapter_bytes) == (GIB // 2, 0)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert device_memory(CPU, tmp_path) == Memory(total=1_000_000, free=500_000)


def test_no_limit_means_the_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    memory = device_memory(CPU, tmp_path)
    assert 0 < memory.free <= memory.total
    assert device_memory(CPU, tmp_path / "absent").total == memory.total


@pytest.mark.parametrize(("quota", "count"), [("150000 100000", 2), ("10000 100000", 1)])
def test_processors_follow_the_quota(
    tmp_path: Path, quota: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota)
    assert available_cpus(tmp_path) == count
    (tmp_path / "cpu.max").write_text("max 100000")
    assert available_cpus(tmp_path) == 8


def test_sizes_read_well() -> None:
    assert [size(n) for n in (5, 1536, 3 << 20, 5 << 29)] == [
        "5 bytes",
        "1.5 KiB",
        "3.0 MiB",
        "2.5 GiB",
    ]

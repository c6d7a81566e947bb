"""`plan`: the start's own arithmetic, and adapters that take their ranks' bytes and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.page_layout import FUSED_GROUPS
from loraplex.adapters.pool import PagePool
from loraplex.engine import plan
from loraplex.engine.errors import ModelError
from loraplex.engine.memory_bench import compare
from loraplex.engine.model_config import read_model_config
from loraplex.engine.plan import Layouts, Question, answer

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    """Its config and no weights: nothing else may be needed."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def test_a_gpu_is_divided_without_one(llama_8b: str) -> None:
    found = answer(Question(model=llama_8b, gpu_gb=80, ram_gb=64, ranks=(100,)))
    parts = {part["purpose"]: part["bytes"] for part in found["memory"]}
    assert parts["weights"] == 8_030_261_248 * 2
    on_host = parts.pop("adapters on the host")
    assert sum(parts.values()) == 80 << 30
    assert parts["left to others"] >= (80 << 30) // 10 - 1
    assert found["kv_tokens"] == parts["kv cache"] // (2 * 32 * 1024 * 2)
    assert [room["rank"] for room in found["adapters"]] == [8, 16, 32, 64, 100]
    frames = parts["adapters on the device"] // found["shared"]["superblock_bytes"] * 51
    for room in found["adapters"]:
        assert room["on_device"] == frames // (room["adapter_bytes"] // (5 << 19))
        assert room["on_host"] == on_host // room["adapter_bytes"]
    by_rank = {room["rank"]: room["adapter_bytes"] for room in found["adapters"]}
    page = 80 << 20  # 16 ranks of all modules of 32 layers, in bf16
    assert by_rank == {8: page, 16: page, 32: 2 * page, 64: 4 * page, 100: 7 * page}


def test_what_is_shared_is_told_and_what_is_fixed_is_not(llama_8b: str) -> None:
    found = answer(Question(model=llama_8b, gpu_gb=80, ram_gb=64))
    shared = found["shared"]
    parts = {part["purpose"]: part["bytes"] for part in found["memory"]}
    assert parts["kv cache"] + parts["adapters on the device"] == shared["bytes"]
    assert found["kv_tokens"] < found["kv_tokens_at_most"]
    assert shared["kv_cache_bytes_min"] >= found["max_model_len"] * 2 * 32 * 1024 * 2
    most = shared["bytes"] - shared["kv_cache_bytes_min"]
    for room in found["adapters"]:
        assert room["on_device"] < room["at_most"] <= most // room["adapter_bytes"]
    fixed = {"adapter_memory": 8 << 30}
    found = answer(Question(model=llama_8b, gpu_gb=80, ram_gb=64, settings=fixed))
    assert found["shared"] is None
    assert found["kv_tokens_at_most"] == found["kv_tokens"]
    assert all(room["at_most"] == room["on_device"] for room in found["adapters"])


def test_more_fits_in_shared_memory_than_in_fixed_shares(llama_8b: str) -> None:
    found = compare(llama_8b, gpu_gb=24, rank=16, max_model_len=2048)
    fixed, shared = found["fixed"], found["shared"]
    assert shared.adapters > 2 * fixed.adapters
    assert shared.tokens > fixed.tokens + 2048, "one sequence more at least"
    assert shared.adapters_again == shared.adapters
    assert (fixed.to_kv, fixed.to_adapters) == (0, 0) != (shared.to_kv, shared.to_adapters)


def test_settings_and_machine_count(llama_8b: str) -> None:
    small = answer(Question(model=llama_8b, gpu_gb=24, ram_gb=64))
    large = answer(Question(model=llama_8b, gpu_gb=80, ram_gb=64))
    assert small["kv_tokens"] < large["kv_tokens"]
    settings = {"max_model_len": 4096, "adapter_memory": 1 << 30}
    mine = answer(Question(model=llama_8b, gpu_gb=24, ram_gb=64, settings=settings))
    assert mine["max_model_len"] == 4096
    assert [room["on_device"] for room in mine["adapters"]] == [12, 12, 6, 3]
    cpu = answer(Question(model=llama_8b, ram_gb=64))
    assert (cpu["device"], cpu["estimated"]) == ("cpu", False)
    with pytest.raises(ModelError, match="does not fit"):
        answer(Question(model=llama_8b, gpu_gb=8, ram_gb=64))


def test_mixed_ranks_take_their_bytes_rounded_to_16_ranks(llama_8b: str) -> None:
    rows = answer(Question(model=llama_8b, gpu_gb=80, ram_gb=64))["mixes"]
    whole = [row for row in rows if row["modules"] == "all"]
    assert len(whole) >= 3
    for row in whole:
        assert row["own"] <= row["here"] == row["rounded"] <= row["padded"]
    # A sparse adapter's tiles do not always fill their frames.
    (sparse,) = [row for row in rows if row["modules"] != "all"]
    assert sparse["rounded"] <= sparse["here"] < 1.1 * sparse["rounded"]
    assert whole[0]["here"] == whole[0]["padded"] / 2


@pytest.mark.parametrize("rank", [1, 16, 17, 64])
def test_the_bytes_are_those_the_pool_takes(tiny_model: Callable[..., Path], rank: int) -> None:
    model = read_model_config(tiny_model("llama"))
    cpu = torch.device("cpu")
    pool = PagePool(model.num_layers, model.module_shapes, 1 << 26, torch.float32, cpu)
    layouts = Layouts(model, torch.float32)
    for modules in (layouts.all_modules, FUSED_GROUPS[0], (6,)):
        ranks = {(layer, m): rank for layer in range(model.num_layers) for m in modules}
        assert layouts.here(rank, modules) == pool.device_bytes(pool.layout(ranks))


def test_a_refusal_is_an_answer(capsys: pytest.CaptureFixture[str], llama_8b: str) -> None:
    def ask(**question: Any) -> dict[str, Any]:
        plan.main(json.dumps({"model": llama_8b, "ram_gb": 64, **question}))
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    assert "kv_tokens" in ask(gpu_gb=80)
    assert "does not fit" in ask(gpu_gb=8)["error"]
    assert "no such directory" in ask(model="/nowhere")["error"]
    assert "max_num_seqs=0" in ask(settings={"max_num_seqs": 0})["error"]

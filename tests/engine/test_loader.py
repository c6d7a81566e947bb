"""Checkpoints on disk: whole ones load, sharded or not; broken ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.engine.errors import ModelError
from loraplex.engine.loader import Checkpoint, choose_dtype, find_model
from loraplex.engine.model import load_decoder
from loraplex.engine.model_config import read_model_config
from loraplex.kernels.torch_ops import TorchOps

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model: Any, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def load(directory: Path) -> Any:
    with Checkpoint(directory) as checkpoint:
        return load_decoder(
            read_model_config(directory), checkpoint, TorchOps(), torch.float32, CPU
        )


def rewrite(directory: Path, change: Any) -> None:
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_shards_load_like_one_file(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    sharded = Path(shutil.copytree(model, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, sharded / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    x = torch.randn(3, 64)
    one, many = load(model), load(sharded)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert torch.equal(a.qkv(x), b.qkv(x))
        assert torch.equal(a.next_norm, b.next_norm)
    assert torch.equal(one.embedding, many.embedding)

    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks the file model-00002-of-00002\.safetensors"):
        load(sharded)


def test_progress_reaches_its_end(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Checkpoint(model) as checkpoint:
        load_decoder(
            read_model_config(model),
            checkpoint,
            TorchOps(),
            torch.float32,
            CPU,
            lambda done, total: seen.append((done, total)),
        )
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


def test_missing_tensors_are_named(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(model)


def test_wrong_shapes_are_named(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 64)

    rewrite(model, change)
    with pytest.raises(ModelError, match=r"k_proj\.weight is \[64, 64\].* \[32, 64\]"):
        load(model)


def test_tensors_nobody_expects_are_named(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Except the frequencies that old checkpoints carry."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    rewrite(model, change)
    load(model)
    assert "unused tensors: model.layers.0.self_attn.q_proj.bias" in caplog.text
    assert "inv_freq" not in caplog.text


def test_a_truncated_file_is_refused(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        load(model)


def test_pickles_are_refused_with_advice(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle: convert it"):
        load(model)


def test_an_index_cannot_point_outside(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside"):
        load(model)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/nothing-here"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such directory") as caught:
        find_model(name)
    assert caught.value.code == "model_not_found"


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="Cannot reach the hub; give the path") as caught:
        find_model("somebody/some-model")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("requested", "checkpoint", "has_bf16", "chosen"),
    [
        ("auto", torch.float32, True, torch.float32),
        ("auto", torch.bfloat16, True, torch.bfloat16),
        ("auto", torch.bfloat16, False, torch.float32),
        ("auto", torch.float16, True, torch.bfloat16),
        ("auto", torch.float16, False, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
        ("float32", torch.bfloat16, True, torch.float32),
    ],
)
def test_dtype_on_a_cpu(
    requested: str,
    checkpoint: torch.dtype,
    has_bf16: bool,
    chosen: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex.engine.loader._cpu_has_bf16", lambda: has_bf16)
    assert choose_dtype(requested, checkpoint, CPU) == chosen


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="--dtype bfloat16"):
        choose_dtype("float16", torch.float16, CPU)


def test_checkpoints_of_one_shape_are_told_apart(model: Path, tiny_model: Any) -> None:
    """By their weights, wherever they lie."""

    def fingerprint(directory: Path) -> str:
        with Checkpoint(directory) as checkpoint:
            return checkpoint.fingerprint()

    before = fingerprint(tiny_model("llama"))
    assert fingerprint(model) == before
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.001
    save_file(tensors, model / "model.safetensors")
    assert fingerprint(model) != before

"""Adapters that PEFT saved: they validate, and load as the very numbers PEFT computes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.adapters.errors import AdapterCorrupt, AdapterError
from loraplex.adapters.intake import inspect
from loraplex.adapters.manifest import MANIFEST_FILE
from loraplex.adapters.weights import MODULE_KINDS, load_weights, locate
from loraplex.engine.api import ModuleShape


def manifested(folder: Path, modules: list[ModuleShape]) -> Path:
    (folder / MANIFEST_FILE).write_bytes(inspect(folder, modules).to_json())
    return folder


@pytest.fixture(scope="module")
def llama(
    tiny_model: Callable[..., Path], tiny_adapters: Callable[..., dict[str, Path]]
) -> tuple[list[ModuleShape], dict[str, Path], Path]:
    from loraplex.engine.model_config import read_model_config

    model = tiny_model("llama")
    return read_model_config(model).modules(), tiny_adapters(model), model


def test_what_peft_saved_loads_as_peft_has_it(llama: Any) -> None:
    """Per module: the delta of PEFT's own layer equals scaling * (B A) of what was loaded."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    modules, adapters, model = llama
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, folder in adapters.items():
        loaded = load_weights(manifested(folder, modules), torch.float32)
        adapted = PeftModel.from_pretrained(base, folder, adapter_name=name)
        seen = 0
        for path, layer in adapted.named_modules():
            if not hasattr(layer, "get_delta_weight") or name not in layer.lora_A:
                continue
            key = locate(path.removeprefix("base_model.model."))
            assert key is not None
            entry = loaded.modules[key]
            assert entry.a.is_contiguous()
            assert entry.bt.is_contiguous()
            assert entry.a.shape[0] == entry.bt.shape[0] == entry.rank
            delta = entry.scaling * (entry.bt.T @ entry.a)
            torch.testing.assert_close(delta, layer.get_delta_weight(name))
            seen += 1
        assert seen == len(loaded.modules), name
        assert loaded.rank == max(m.rank for m in loaded.modules.values())
        base = adapted.unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_comes_in_the_models_dtype(
    dtype: torch.dtype, draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    loaded = load_weights(manifested(draft.write(tmp_path), modules), dtype)
    entry = loaded.modules[1, MODULE_KINDS.index("v_proj")]
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert entry.bt.dtype == entry.a.dtype == dtype
    assert torch.equal(entry.bt, torch.from_numpy(draft.tensors[name]).T.to(dtype))
    assert loaded.nbytes == sum(t.size for t in draft.tensors.values()) * dtype.itemsize


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model.layers.0.self_attn.q_proj", (0, 0)),
        ("model.layers.12.mlp.down_proj", (12, 6)),
        ("layers.3.self_attn.o_proj", (3, 3)),
        ("model.layers.0.self_attn", None),
        ("lm_head", None),
        ("model.layers.0.self_attn.q_proj.base", None),
    ],
)
def test_locate(path: str, key: tuple[int, int] | None) -> None:
    assert locate(path) == key


def test_a_weight_beyond_float16_is_told(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    next(iter(draft.tensors.values()))[0, 0] = 1e6
    folder = manifested(draft.write(tmp_path), modules)
    with pytest.raises(AdapterError, match="beyond the range of float16") as error:
        load_weights(folder, torch.float16)
    assert error.value.code == "adapter_overflow"
    load_weights(folder, torch.bfloat16)


def test_a_module_the_model_lacks(draft: Any, tmp_path: Path, modules: list[ModuleShape]) -> None:
    folder = manifested(draft.write(tmp_path), modules)
    with pytest.raises(AdapterError) as error:
        load_weights(folder, torch.float32, lambda path: None)
    assert error.value.code == "adapter_mismatch"


def test_files_that_are_not_what_the_manifest_says(
    draft: Any, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    folder = manifested(draft.write(tmp_path), modules)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    first = next(iter(draft.tensors))
    for damage in (
        lambda: weights.write_bytes(whole[:-1]),
        lambda: draft.tensors.update({first: np.ones((2, 32), "f4")}) or draft.write(tmp_path),
        lambda: draft.tensors.pop(first) is None or draft.write(tmp_path),
        weights.unlink,
        lambda: (folder / MANIFEST_FILE).write_bytes(b"{}"),
    ):
        damage()
        with pytest.raises(AdapterCorrupt):
            load_weights(folder, torch.float32)

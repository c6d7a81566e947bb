"""Which modules a config selects, their ranks and scalings: PEFT itself is the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.config import parse_config
from loraplex.engine.api import ModuleShape

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"

CONFIGS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all by name": {"target_modules": ALL},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "ALL-LINEAR"},
    "whole path": {"target_modules": [Q0]},
    "partial path": {"target_modules": ["0.self_attn.q_proj", "mlp.up_proj"]},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "regex of layers": {"target_modules": r"model\.layers\.[02]\.(self_attn|mlp)\.\w+_proj"},
    "regex, lazy": {"target_modules": r".*?(?:self_attn|mlp).*?(?:k_proj|up_proj).*?"},
    "regex, counted": {"target_modules": r"model\.layers\.\d{1,2}\.self_attn\.[qk]_proj"},
    "exclude list": {"target_modules": ALL, "exclude_modules": ["k_proj", "0.self_attn.q_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "exclude whole path": {"target_modules": ["q_proj"], "exclude_modules": [Q0]},
    "exclude nothing": {"target_modules": ["q_proj"], "exclude_modules": ["vision_tower"]},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "layer 0": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "no layers said": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers by names": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "layers by dotted name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["model.layers"],
    },
    "whole path past the layers": {
        "target_modules": [Q0, "v_proj"],
        "layers_to_transform": [1],
    },
    "rank_pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 16}},
    "rank_pattern, dotted": {
        "target_modules": ALL,
        "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 3, "mlp.up_proj": 5},
    },
    "rank_pattern, two match": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, "0.self_attn.q_proj": 2},
    },
    "rank_pattern, regex": {
        "target_modules": ALL,
        "rank_pattern": {r"layers\.[01]\.self_attn\.(q|k)_proj": 2, r".*mlp.*": 6},
    },
    "rank_pattern, anchored": {"target_modules": ALL, "rank_pattern": {"^q_proj": 2, "^" + Q0: 4}},
    "rank_pattern, part of a name": {"target_modules": ALL, "rank_pattern": {"proj": 2, "mlp": 3}},
    "rank_pattern, whole path": {"target_modules": ALL, "rank_pattern": {Q0: 2}},
    "alpha_pattern": {"target_modules": ALL, "alpha_pattern": {"v_proj": 3, r"[^.]*_proj": 64}},
    "both, rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 5.5, "down_proj": 1},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dot in a name": {"target_modules": ALL, "rank_pattern": {"self.attn.q_proj": 2}},
}


def peft_says(settings: dict[str, Any], folder: Path) -> dict[str, tuple[int, float]]:
    """{module path: (rank, scaling)} of the model that PEFT makes of the config saved in `folder`.

    Of the saved one: PEFT sorts the keys of the file, and with them those of rank_pattern, of which
    the first that matches counts. A file can mean something else than the object it was made from.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny)
    config = LoraConfig(r=8, lora_alpha=12, task_type="CAUSAL_LM", **settings)
    config.save_pretrained(str(folder))
    saved = LoraConfig.from_pretrained(str(folder))
    adapted = get_peft_model(model, saved, low_cpu_mem_usage=True)
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_modules_ranks_and_scalings(
    kind: str, tmp_path: Path, modules: list[ModuleShape]
) -> None:
    expected = peft_says(CONFIGS[kind], tmp_path)
    config = parse_config((tmp_path / "adapter_config.json").read_bytes())
    resolved = config.resolve(modules)
    assert set(resolved) == set(expected)
    for path, lora in resolved.items():
        rank, scaling = expected[path]
        assert lora.rank == rank, path
        assert math.isclose(lora.scaling, scaling, rel_tol=1e-12), path


def test_the_oracle_can_disagree(tmp_path: Path, modules: list[ModuleShape]) -> None:
    """The comparison above would notice another alpha."""
    expected = peft_says({"target_modules": ["q_proj"]}, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    resolved = parse_config({**raw, "lora_alpha": 13}).resolve(modules)
    assert any(lora.scaling != expected[path][1] for path, lora in resolved.items())

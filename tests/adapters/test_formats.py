"""Every format that PEFT saves: taken in, loaded, and each module compared with PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these tests are about

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),  # biases of q, k, v
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {}),  # tied, norms of q and k
}

# name -> models, settings of LoraConfig, features of the manifest, needs_weight_one
FORMATS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "dora": ("llama qwen2", {"target_modules": ALL, "use_dora": True}, {"dora"}),
    "dora, patterns": (
        "llama",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True,
         "rank_pattern": {"q_proj": 20}, "alpha_pattern": {"v_proj": 3}},
        {"dora"},
    ),
    "lora_bias": ("llama", {"target_modules": ALL, "lora_bias": True}, {"lora_bias"}),
    "bias all": ("qwen2 biased", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}, {"bias"}),
    "bias all of a model without": ("llama", {"target_modules": ["q_proj"], "bias": "all"}, set()),
    "bias lora_only": ("biased", {"target_modules": ["k_proj"], "bias": "lora_only"}, {"bias"}),
    "bias, lora_bias": (
        "qwen2",
        {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
        {"bias", "lora_bias"},
    ),
    "bias, dora": (
        "biased",
        {"target_modules": ["q_proj"], "bias": "all", "use_dora": True},
        {"bias", "dora"},
    ),
    "bias, saved": (
        "biased",
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["k_proj"]},
        {"bias", "full_linear"},
    ),
    "head": (
        "llama tied",
        {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 7}},
        {"lm_head_lora"},
    ),
    "embedding": (
        "llama tied",
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
        {"embed_tokens_lora"},
    ),
    "both tables": (
        "llama tied",
        {"target_modules": r".*(q_proj|embed_tokens|lm_head)"},
        {"embed_tokens_lora", "lm_head_lora"},
    ),
    "tables alone": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"embed_tokens_lora", "lm_head_lora"},
    ),
    "embedding, tied by PEFT": (
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"embed_tokens_lora", "lm_head_lora"},
    ),
    "head, tied by PEFT": (
        "tied",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"embed_tokens_lora", "lm_head_lora"},
    ),
    "head, nothing to tie": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"lm_head_lora"},
    ),
    "saved tables": (
        "llama tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"full_embed_tokens", "full_lm_head"},
    ),
    "saved head": (
        "llama tied",
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"full_lm_head"},
    ),
    "saved embedding": (
        "llama tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"]},
        {"full_embed_tokens"},
    ),
    "saved tables, tied by PEFT": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"full_embed_tokens", "full_lm_head"},
    ),
    "saved norms": (
        "llama qwen3",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"full_norm"},
    ),
    "saved norms of layers": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["1.input_layernorm", "model.norm"]},
        {"full_norm"},
    ),
    "saved linears": (
        "llama qwen2",
        {"target_modules": ["v_proj", "up_proj"], "modules_to_save": ["q_proj", "0.mlp.up_proj"]},
        {"full_linear"},
    ),
    "saved blocks": (
        "qwen3",
        {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]},
        {"full_linear", "full_norm"},
    ),
    "saved instead of adapted": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["q_proj"]},
        {"full_linear"},
    ),
    "tokens": (
        "llama tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [250, 3, 97]},
        {"token_rows"},
    ),
    "tokens by module": (
        "llama tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 4]}},
        {"token_rows"},
    ),
    "tokens of both": (
        "tied",
        {"target_modules": ["q_proj"],
         "trainable_token_indices": {"lm_head": [9, 4], "embed_tokens": [9, 4]}},
        {"token_rows"},
    ),
    "tokens, head": (
        "llama tied",
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [9, 4]},
        {"token_rows", "lm_head_lora"},
    ),
    "tokens, saved head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
         "trainable_token_indices": [9, 4]},
        {"token_rows", "full_lm_head"},
    ),
    "everything": (
        "qwen2",
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "bias": "all",
         "trainable_token_indices": [5], "modules_to_save": ["lm_head", "norm", "k_proj"]},
        {"dora", "bias", "token_rows", "full_lm_head", "full_norm", "full_linear"},
    ),
}  # fmt: skip
LINEAR = {"lora_bias", "lm_head_lora", "embed_tokens_lora", "fused_projections"}
CASES = [(kind, model) for kind, entry in FORMATS.items() for model in entry[0].split()]


class Models:
    """The tiny base models, loaded once; `fresh` ones are for PEFT to wrap."""

    def __init__(self, tiny_model: Callable[..., Path]) -> None:
        self._make = tiny_model
        self._loaded: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        family, changes = MODELS[name]
        return self._make(family, num_hidden_layers=2, **changes)

    def base(self, name: str) -> Any:
        from transformers import AutoModelForCausalLM

        if name not in self._loaded:
            self._loaded[name] = AutoModelForCausalLM.from_pretrained(self.path(name)).eval()
        return self._loaded[name]

    def fresh(self, name: str) -> Any:
        return copy.deepcopy(self.base(name))

    def save(self, name: str, folder: Path, settings: dict[str, Any], **how: Any) -> None:
        """An adapter as after training: every trainable parameter has moved."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings})
        adapted = get_peft_model(self.fresh(name), config)
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        adapted.save_pretrained(folder, **how)

    def adapted(self, name: str, folder: Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self.fresh(name), folder).eval()


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> Models:
    return Models(tiny_model)


@pytest.mark.parametrize(("kind", "model"), CASES)
def test_what_peft_saves_is_loaded_as_peft_has_it(
    kind: str, model: str, models: Models, tmp_path: Path, peft_effects: Any
) -> None:
    _, settings, features = FORMATS[kind]
    models.save(model, tmp_path, settings)
    manifest, loaded = peft_effects.take_in(tmp_path, models.path(model))
    assert set(manifest.features) == features
    assert manifest.needs_weight_one == bool(features - LINEAR)
    adapted = models.adapted(model, tmp_path)
    peft_effects.assert_same(adapted, models.base(model), loaded)

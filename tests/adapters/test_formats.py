"""Every format that PEFT saves: taken in, loaded, and each module compared with PEFT's own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.digest import values_digest
from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.header import read_header
from loraplex.adapters.intake import inspect
from loraplex.adapters.manifest import MANIFEST_FILE
from loraplex.adapters.weights import load_weights
from loraplex.engine.model_config import read_model_config
from loraplex.engine.table_digests import table_digest

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these tests are about

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),  # biases of q, k, v
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {}),  # tied, norms of q and k
    "phi3": ("phi3", {}),  # fused projections
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
        "llama",
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
        "biased",
        {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]},
        {"full_linear"},
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
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, {"fused_projections"}),
    "fused, all-linear, dora": (
        "phi3",
        {
            "target_modules": "all-linear",
            "use_dora": True,
            "rank_pattern": {"qkv_proj": 20, "o_proj": 2},
        },
        {"fused_projections", "dora"},
    ),
    "fused, lora_bias": (
        "phi3",
        {"target_modules": ["qkv_proj"], "lora_bias": True},
        {"fused_projections", "lora_bias"},
    ),
    "fused, saved": (
        "phi3",
        {"target_modules": ["gate_up_proj"], "modules_to_save": ["0.self_attn.qkv_proj"]},
        {"fused_projections", "full_linear"},
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


def test_the_comparison_can_fail(models: Models, tmp_path: Path, peft_effects: Any) -> None:
    """Another adapter of the same format, or one number off, is far outside the tolerance."""
    for kind, changed in {
        "dora": "lora_magnitude_vector",
        "lora_bias": "lora_B.bias",
        "saved norms": "model.norm.weight",
        "saved head": "lm_head.weight",
        "embedding": "lora_embedding_B",
        "tokens": "trainable_tokens_delta",
    }.items():
        folder = tmp_path / kind
        models.save("llama", folder, FORMATS[kind][1])
        adapted = models.adapted("llama", folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if changed in name)
        tensors[name].view(-1)[3] += 0.05
        save_file(tensors, file)
        _, loaded = peft_effects.take_in(folder, models.path("llama"))
        with pytest.raises(AssertionError):
            peft_effects.assert_same(adapted, models.base("llama"), loaded)


# --- the base model's own tables, which PEFT writes along ---------------------------------------

COPIES: dict[str, dict[str, Any]] = {
    "no table is adapted": {"target_modules": ["q_proj"]},
    "the head is": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding is": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head is saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the embedding is saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens are": {"target_modules": ["q_proj"], "trainable_token_indices": [8, 2]},
}


@pytest.mark.parametrize("model", ["llama", "tied"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_base_table_is_dropped_if_it_is_the_models_own_and_kept_if_not(
    kind: str, model: str, models: Models, tmp_path: Path, peft_effects: Any
) -> None:
    models.save(model, tmp_path, COPIES[kind], save_embedding_layers=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    manifest, loaded = peft_effects.take_in(tmp_path, models.path(model))
    peft_effects.assert_same(models.adapted(model, tmp_path), models.base(model), loaded)
    assert manifest.base_tables
    saved = {f"full_{name}" for name in COPIES[kind].get("modules_to_save", ())}
    assert {name for name in manifest.features if name.startswith("full_")} == saved

    copies = [n for n in tensors if "lora" not in n and tensors[n].shape == (272, 64)]
    assert copies
    for name in copies:
        changed = {**tensors, name: tensors[name] + 0.5}
        save_file(changed, file)
        manifest, loaded = peft_effects.take_in(tmp_path, models.path(model))
        peft_effects.assert_same(models.adapted(model, tmp_path), models.base(model), loaded)


def test_a_base_table_is_kept_where_the_models_own_is_not_known(
    models: Models, tmp_path: Path
) -> None:
    models.save("llama", tmp_path, {"target_modules": ["lm_head"]})
    modules = read_model_config(models.path("llama")).modules()
    assert inspect(tmp_path, modules).features == ("lm_head_lora", "full_lm_head")


def test_a_dropped_table_ties_the_adapter_to_the_model_it_is_a_copy_of(
    models: Models, tmp_path: Path, peft_effects: Any
) -> None:
    models.save("llama", tmp_path, {"target_modules": ["lm_head"]})
    modules = peft_effects.modules_of(models.path("llama"))
    manifest = inspect(tmp_path, modules)
    assert manifest.features == ("lm_head_lora",)
    assert manifest.mismatches(modules) == []
    others = read_model_config(models.path("llama")).modules({"lm_head": "0123"})
    assert [p.code for p in manifest.mismatches(others)] == ["base_model_mismatch"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_table_has_one_digest_in_every_type_that_holds_it(dtype: str, tmp_path: Path) -> None:
    table = torch.randn(3000, 7, generator=torch.Generator().manual_seed(1)).to(
        getattr(torch, dtype)
    )
    digest = table_digest(table)
    assert digest == table_digest(table.float())
    assert digest != table_digest(table.float() + 1e-3)
    for stored in (table, table.float()):
        save_file({"t": stored}, tmp_path / "t.safetensors")
        info = read_header(tmp_path / "t.safetensors").tensors["t"]
        assert values_digest(tmp_path / "t.safetensors", info) == digest


# --- what PEFT itself cannot do, or nobody can serve yet ----------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms of q and k": ("qwen3", {"modules_to_save": ["norm"]}, "feature_unsupported"),
    "tokens of the head": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
        "feature_unsupported",
    ),
    "other tokens of the head": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
        "feature_unsupported",
    ),
    "dora of the head": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        "feature_unsupported",
    ),
    "lora_bias of the head": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "lora_bias": True},
        "feature_unsupported",
    ),
    "a saved head under trained tokens": (
        "tied",
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]},
        "module_conflict",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, models: Models, tmp_path: Path, peft_effects: Any) -> None:
    model, settings, code = REFUSED[kind]
    models.save(model, tmp_path, {"target_modules": ["q_proj"], **settings})
    with pytest.raises(AdapterRefused) as refused:
        inspect(tmp_path, peft_effects.modules_of(models.path(model)))
    assert code in {p.code for p in refused.value.problems}


# --- fused projections of a model that has them apart -------------------------------------------


@pytest.mark.parametrize("kind", ["fused", "fused, all-linear, dora", "fused, saved"])
def test_a_fused_adapter_loads_alike_for_a_model_with_the_parts_apart(
    kind: str, models: Models, tmp_path: Path, peft_effects: Any
) -> None:
    """Phi-3 saved as a Llama: no oracle in PEFT, but the same parts as for Phi-3 itself."""
    models.save("phi3", tmp_path, FORMATS[kind][1])
    manifest, fused = peft_effects.take_in(tmp_path, models.path("phi3"))
    config = dataclasses.replace(read_model_config(models.path("phi3")), fused=False)
    apart = inspect(tmp_path, config.modules())
    assert apart.digest == manifest.digest
    assert apart.modules == manifest.modules
    assert apart.mismatches(config.modules()) == []
    (tmp_path / MANIFEST_FILE).write_bytes(apart.to_json())
    loaded = load_weights(tmp_path, torch.float32)
    assert loaded.modules.keys() == fused.modules.keys()
    for key, module in loaded.modules.items():
        assert torch.equal(module.bt, fused.modules[key].bt)

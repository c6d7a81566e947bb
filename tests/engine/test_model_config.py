"""Configs are read closed: what the decoder does not compute is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from loraplex.engine.errors import ModelError
from loraplex.engine.model_config import decoder_config, read_model_config

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(family: str, **changes: Any) -> Any:
    if family == "phi3":  # whose own special tokens lie beyond such a vocabulary
        changes = {"pad_token_id": 0, "eos_token_id": 0, **changes}
    return AutoConfig.for_model(family, **{**TINY, **changes})


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma2", {"head_dim": 16}, "Gemma2|gemma2"),
        ("mixtral", {}, "mixtral"),
        ("qwen3_moe", {}, "qwen3_moe"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"num_attention_heads": 3, "hidden_size": 96}, "3 query heads"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "long_factor": [1.0] * 8,
                    "short_factor": [1.0] * 8,
                    "original_max_position_embeddings": 32,
                }
            },
            "longrope",
        ),
        ("llama", {"dtype": "float64"}, "float64"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor",
        ),
        (
            "phi3",
            {
                "max_position_embeddings": 128,
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "long_factor": [1.0] * 8,
                    "short_factor": [1.0] * 8,
                },
            },
            "longrope",
        ),
    ],
)
def test_what_is_not_understood_is_named(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        decoder_config(make(family, **changes))


def test_features_of_the_families() -> None:
    llama = decoder_config(make("llama"))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (False,) * 4
    assert llama.sliding_windows == (None,) * 4
    qwen2 = decoder_config(
        make("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    )
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)
    assert qwen2.sliding_windows == (None, None, None, 8)
    assert decoder_config(make("mistral", sliding_window=7)).sliding_windows == (7,) * 4
    phi3 = decoder_config(make("phi3", sliding_window=9))
    assert phi3.sliding_windows == (9,) * 4
    qkv = phi3.modules()[1]
    assert (qkv.path, qkv.parts) == ("model.layers.0.self_attn.qkv_proj", (64, 32, 32))
    assert phi3.tensor_shapes()["model.layers.3.mlp.gate_up_proj.weight"] == (192, 64)
    qwen3 = decoder_config(make("qwen3", head_dim=32))
    assert qwen3.qk_norm
    assert (qwen3.head_dim, qwen3.q_size) == (32, 128)


def test_a_config_of_the_older_form_reads_the_same(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` at the top, `torch_dtype`: as published checkpoints have."""
    scaling = {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = {
        **TINY,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    read = read_model_config(tmp_path)
    new = decoder_config(
        make(
            "llama",
            rope_parameters={**scaling, "rope_theta": 500000.0},
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            dtype="bfloat16",
        )
    )
    assert read == new
    assert read.dtype == torch.bfloat16
    assert read.rope != decoder_config(make("llama")).rope


def test_no_config_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_modules_carry_the_names_adapters_use() -> None:
    modules = decoder_config(make("llama")).modules()
    assert [m.kind for m in modules].count("linear") == 4 * 7
    assert [m.path for m in modules if m.kind != "linear" and ".layers." not in m.path] == [
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    ]
    shapes = {m.path: (m.in_features, m.out_features) for m in modules}
    assert shapes["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert shapes["model.layers.3.self_attn.k_proj"] == (64, 32)
    assert shapes["model.layers.2.mlp.down_proj"] == (96, 64)

"""Random models and adapters on disk, for benchmarks: shapes of real ones, weights of none. numpy,
no torch.

Files are what transformers and peft read: config.json and bf16 safetensors, adapter_config.json and
adapter_model.safetensors with a non-zero B (a fresh peft adapter's B is zero, and would measure
nothing).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RANKS = (8, 16, 32, 64)
_SCALE = 0.02  # transformers' initializer_range


@dataclass(frozen=True, slots=True)
class LlamaShape:
    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    max_model_len: int = 2048
    attention_bias: bool = False  # of all four projections

    def config(self) -> dict[str, Any]:
        """As in a Hugging Face config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_model_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": _SCALE,
            "torch_dtype": "bfloat16",
        }


# Issue 2's benchmark models: about 28 M and 300 M parameters.
SMALL = LlamaShape("small", 8, 512, 8, 4, 64, 1408, 4096)
MEDIUM = LlamaShape("medium", 24, 1024, 16, 8, 64, 2816, 8192)
SHAPES = {shape.name: shape for shape in (SMALL, MEDIUM)}


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module path inside a layer -> (out, in), for any config of the Llama kind."""
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads) * head_dim
    mlp = int(config["intermediate_size"])
    return {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def write_model(folder: Path, shape: LlamaShape, seed: int = 0, scale: float = _SCALE) -> Path:
    """A random bf16 Llama of this shape; returns `folder`, which is made.

    scale: standard deviation of the weights. The usual one leaves the answers of a small model to
    its embeddings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config()
    rng = np.random.default_rng(seed)
    hidden = shape.hidden_size
    tensors: dict[str, NDArray[np.uint16]] = {
        "model.embed_tokens.weight": _random(rng, shape.vocab_size, hidden, scale=scale),
        "model.norm.weight": _bf16(np.ones(hidden, np.float32)),
        "lm_head.weight": _random(rng, shape.vocab_size, hidden, scale=scale),
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = _bf16(np.ones(hidden, np.float32))
        for path, (out_size, in_size) in linear_shapes(config).items():
            tensors[f"{prefix}{path}.weight"] = _random(rng, out_size, in_size, scale=scale)
            if shape.attention_bias and path.startswith("self_attn"):
                tensors[f"{prefix}{path}.bias"] = _random(rng, out_size, scale=scale)
    write_safetensors(folder / "model.safetensors", tensors)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_json(folder / "tokenizer.json", _tokenizer(shape.vocab_size))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    )
    return folder


def write_adapter(folder: Path, config: Mapping[str, Any], rank: int, seed: int) -> Path:
    """A random adapter of all seven linear modules for the model with this config; returns
    `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = linear_shapes(config)
    tensors = {}
    for layer in range(int(config["num_hidden_layers"])):
        for path, (out_size, in_size) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{key}.lora_A.weight"] = _random(rng, rank, in_size)
            tensors[f"{key}.lora_B.weight"] = _random(rng, out_size, rank)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    _write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(path.rpartition(".")[2] for path in shapes),
            "inference_mode": True,
        },
    )
    return folder


def write_adapters(
    root: Path,
    config: Mapping[str, Any],
    count: int,
    ranks: Sequence[int] = RANKS,
    prefix: str = "bench",
) -> dict[str, Path]:
    """`count` adapters, ranks taken in turn; name -> folder. Folders that are there already are
    kept.
    """
    found = {}
    for i in range(count):
        rank = ranks[i % len(ranks)]
        name = f"{prefix}-{i:04d}-r{rank}"
        folder = root / name
        found[name] = (
            folder if folder.exists() else write_adapter(folder, config, rank, seed=1000 + i)
        )
    return found


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.uint16]]) -> None:
    """bf16 tensors, held as uint16. safetensors' own numpy writer has no bf16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.astype("<u2", copy=False).tobytes())


def _random(rng: np.random.Generator, *shape: int, scale: float = _SCALE) -> NDArray[np.uint16]:
    return _bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even: the upper half of the float's bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """One plain word per id, so that every token is visible text and makes one event of its own."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {
        w: i for i, w in enumerate(special + [f"t{i}" for i in range(len(special), vocab_size)])
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocab[word],
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for word in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")

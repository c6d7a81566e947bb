"""What a Hugging Face config says about a decoder, reduced to what `model.py` computes.

Closed reading: a config that asks for anything the decoder does not do is refused by name, never
approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from loraplex.engine.api import ModuleShape
from loraplex.engine.errors import ModelError
from loraplex.engine.rope import Rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# In the order of kernels.ops.Module: the names that adapters use, relative to a layer.
MODULE_NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear module of a layer, as the checkpoint has it. parts: the outputs of the modules of
    `MODULE_NAMES` that it is one of, empty if it is one of them.
    """

    name: str  # relative to the layer
    in_features: int
    out_features: int
    bias: bool
    parts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A Llama-family decoder. `sliding_windows`: per layer, None = sees everything before it.

    fused: the checkpoint holds q, k and v as one projection, gate and up as another.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: torch.dtype  # of the checkpoint
    fused: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def module_shapes(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of one layer's modules, in the order of `MODULE_NAMES`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            (hidden, self.q_size),
            (hidden, self.kv_size),
            (hidden, self.kv_size),
            (self.q_size, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        )

    def modules(self, weight_digests: Mapping[str, str] | None = None) -> list[ModuleShape]:
        """Every module adapters may change, in the model's order.

        weight_digests: of embedding and head, by path; see `table_digests.py`.
        """
        digests = weight_digests or {}
        embedding_digest = digests.get("model.embed_tokens", "")
        vocab, hidden = self.vocab_size, self.hidden_size
        found = [
            ModuleShape(
                "model.embed_tokens", vocab, hidden, "embedding", weight_digest=embedding_digest
            )
        ]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            found += [
                ModuleShape(
                    prefix + p.name, p.in_features, p.out_features, bias=p.bias, parts=p.parts
                )
                for p in self.projections
            ]
            for name, size in self.norm_sizes:
                kind = "qk_norm" if name.startswith("self_attn.") else "norm"
                found.append(ModuleShape(prefix + name, size, size, kind))
        found.append(ModuleShape("model.norm", hidden, hidden, "norm"))
        tied = self.tie_word_embeddings
        digest = embedding_digest if tied else digests.get("lm_head", "")
        head = ModuleShape("lm_head", hidden, vocab, "head", tied=tied, weight_digest=digest)
        found.append(head)
        return found

    @property
    def projections(self) -> list[Projection]:
        """The linear modules of one layer."""
        biases = (self.qkv_bias,) * 3 + (self.o_bias,) + (self.mlp_bias,) * 3
        single = [
            Projection(name, inputs, outputs, bias)
            for name, (inputs, outputs), bias in zip(
                MODULE_NAMES, self.module_shapes, biases, strict=True
            )
        ]
        if not self.fused:
            return single
        qkv, gate_up = single[:3], single[4:6]
        return [
            _fuse("self_attn.qkv_proj", qkv),
            single[3],
            _fuse("mlp.gate_up_proj", gate_up),
            single[6],
        ]

    @property
    def norm_sizes(self) -> list[tuple[str, int]]:
        """The norms of one layer, by name relative to it."""
        names = [
            ("input_layernorm", self.hidden_size),
            ("post_attention_layernorm", self.hidden_size),
        ]
        if self.qk_norm:
            names += [("self_attn.q_norm", self.head_dim), ("self_attn.k_norm", self.head_dim)]
        return names

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the checkpoint must hold."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": hidden,
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, size in self.norm_sizes:
                shapes[f"{prefix}{name}.weight"] = (size,)
            for p in self.projections:
                shapes[f"{prefix}{p.name}.weight"] = (p.out_features, p.in_features)
                if p.bias:
                    shapes[f"{prefix}{p.name}.bias"] = (p.out_features,)
        return shapes


def _fuse(name: str, parts: list[Projection]) -> Projection:
    sizes = tuple(part.out_features for part in parts)
    return Projection(name, parts[0].in_features, sum(sizes), parts[0].bias, sizes)


def read_model_config(directory: Path) -> DecoderConfig:
    """Raises: ModelError: no config, or it asks for what this decoder does not compute."""
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{directory}: no config.json that transformers can read: {error}"
        ) from error
    return decoder_config(config)


def decoder_config(config: Any) -> DecoderConfig:
    """`config`: a transformers config object."""
    family = config.model_type
    named = list(config.architectures or [ARCHITECTURES.get(family, family)])
    if family not in ARCHITECTURES or named != [ARCHITECTURES[family]]:
        raise ModelError(
            f"architecture {', '.join(named)} (model_type {family!r}) is not supported; "
            f"supported: {', '.join(ARCHITECTURES.values())}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "quantized checkpoints (quantization_config) are not supported; use the bf16 original"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"{num_heads} query heads do not divide among {num_kv_heads} kv heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    attention_bias = bool(getattr(config, "attention_bias", False))
    return DecoderConfig(
        architecture=ARCHITECTURES[family],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope=Rope.from_hf(config, head_dim),
        sliding_windows=_sliding_windows(config),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        tie_word_embeddings=bool(config.tie_word_embeddings),
        max_position_embeddings=config.max_position_embeddings,
        dtype=_dtype(config),
        fused=family == "phi3",
    )


def _sliding_windows(config: Any) -> tuple[int | None, ...]:
    window: int | None = getattr(config, "sliding_window", None)
    layer_types: list[str] | None = getattr(config, "layer_types", None)
    if layer_types is None:
        return (window,) * int(config.num_hidden_layers)
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in known:
            raise ModelError(
                f"attention layer type {kind!r} is not supported; supported: {', '.join(known)}"
            )
    return tuple([known[str(kind)] for kind in layer_types])


def _dtype(config: Any) -> torch.dtype:
    named = config.dtype
    if named is None:
        return torch.float32
    dtype = getattr(torch, named) if isinstance(named, str) else named
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(
            f"checkpoint dtype {dtype} is not supported; supported: float32, float16, bfloat16"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype

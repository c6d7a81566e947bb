"""Rotary position embedding: the frequencies of a checkpoint, cos and sin of a step.

The frequencies of the scaled kinds (linear, dynamic, yarn, llama3) come from transformers' own
functions, so they agree with the reference by construction. RoPE: arXiv 2104.09864; YaRN:
2309.00071.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.engine.errors import ModelError

# Kinds whose frequencies do not change with the length of the sequence. "dynamic" is among them
# because the engine never serves past `max_position_embeddings`, where it starts to change.
STATIC_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class Rope:
    """`inv_freq`: head_dim / 2, radians per token; `scale` multiplies cos and sin (yarn)."""

    inv_freq: tuple[float, ...]
    scale: float

    @classmethod
    def from_hf(cls, config: Any, head_dim: int) -> Rope:
        """Raises: ModelError for a kind of rope that this decoder does not compute."""
        parameters: dict[str, Any] = config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind not in STATIC_ROPE_TYPES:
            raise ModelError(
                f"rope type {kind!r} is not supported; supported: {', '.join(STATIC_ROPE_TYPES)}"
            )
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("partial_rotary_factor other than 1 is not supported")
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            return cls(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0)
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config)
        return cls(tuple(inv_freq.tolist()), float(scale))


class RotaryEmbedding:
    """cos and sin for a step. Computed, not looked up: no table of `max_model_len` rows to keep."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._inv_freq = torch.tensor(rope.inv_freq * 2, dtype=torch.float32, device=device)
        self._scale = rope.scale

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`[T] int64 -> cos, sin [T, head_dim] fp32`, the two halves alike."""
        angles = positions[:, None] * self._inv_freq
        cos, sin = angles.cos(), angles.sin_()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return cos, sin

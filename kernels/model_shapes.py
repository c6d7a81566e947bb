"""Shapes of the models that the benches, the offline compile and the self-test are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.kernels.ops import Module

ALL_MODULES = tuple(Module)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model's configuration decides the work of its operations."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.q_width + 2 * self.kv_width

    def widths(self, module: int) -> tuple[int, int]:
        """(in, out) of a module."""
        q, kv, h, i = self.q_width, self.kv_width, self.hidden, self.intermediate
        return ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h))[module]

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the four fused base linears of a layer."""
        return {
            "qkv": (self.hidden, self.qkv_width),
            "o": (self.q_width, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    def layer_parameters(self) -> int:
        return sum(a * b for a, b in self.linears().values())

    def rank_parameters(self, modules: Sequence[Module] = ALL_MODULES) -> int:
        """Parameters of one rank of one layer of an adapter."""
        return sum(sum(self.widths(module)) for module in modules)


LLAMA_3_8B = ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_3_2_1B = ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256)
QWEN_2_5_0_5B = ModelShape("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, qkv_bias=True)
QWEN_3_0_6B = ModelShape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, qk_norm=True)
# For interpreters and tests: odd on purpose, and too small to time.
TINY = ModelShape("tiny", 2, 48, 6, 2, 16, 80, 270)
SHAPES = {
    shape.name: shape for shape in (LLAMA_3_8B, LLAMA_3_2_1B, QWEN_2_5_0_5B, QWEN_3_0_6B, TINY)
}

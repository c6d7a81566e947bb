"""How fast the machine could do it at all: bytes and operations that cannot be avoided.

A kernel is judged by `floor / measured`. Bytes count once what has to cross the memory bus: weights
of every distinct adapter, weights of the model, live keys and values. Activations of a decode stay
in the cache and are left out, so a floor is never met exactly. All times in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.kernels.model_shapes import ALL_MODULES, ModelShape
from loraplex.kernels.ops import GATE_UP, QKV, Module

GROUPS: dict[str, tuple[Module, ...]] = {
    "qkv": QKV,
    "o": (Module.O,),
    "gate_up": GATE_UP,
    "down": (Module.DOWN,),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """bytes_per_us: of a large copy, read and written bytes counted. flops_per_us: bf16 matmul."""

    bytes_per_us: float
    flops_per_us: float

    def floor_us(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.bytes_per_us, flops / self.flops_per_us)


# Copy bandwidth and bf16 matrix rate of one H200; case `machine` measures the one at hand.
H200 = Machine(bytes_per_us=4.3e6, flops_per_us=790e6)


def shrink_bytes(
    shape: ModelShape, modules: Sequence[Module], ranks: Sequence[int], itemsize: int = 2
) -> int:
    """A of the given modules of one layer. ranks: of each distinct adapter in the step."""
    return sum(ranks) * sum(shape.widths(module)[0] for module in modules) * itemsize


def expand_bytes(
    shape: ModelShape, modules: Sequence[Module], ranks: Sequence[int], itemsize: int = 2
) -> int:
    return sum(ranks) * sum(shape.widths(module)[1] for module in modules) * itemsize


def lora_bytes(shape: ModelShape, ranks: Sequence[int], itemsize: int = 2) -> int:
    """A and B of all modules of one layer."""
    return sum(ranks) * shape.rank_parameters(ALL_MODULES) * itemsize


def base_bytes(shape: ModelShape, itemsize: int = 2) -> int:
    """Weights that a step reads: all layers and the output head (embeddings are a gather)."""
    head = shape.vocab_size * shape.hidden
    return (shape.num_layers * shape.layer_parameters() + head) * itemsize


def kv_bytes(shape: ModelShape, contexts: Sequence[int], itemsize: int = 2) -> int:
    """Keys and values one layer's decode attention reads."""
    window = shape.sliding_window
    tokens = sum(context if window is None else min(context, window) for context in contexts)
    return tokens * 2 * shape.kv_width * itemsize


def linear_flops(shape: ModelShape, rows: int) -> int:
    """The four base linears of one layer."""
    return 2 * rows * shape.layer_parameters()


def lora_flops(shape: ModelShape, rows: int, rank: int) -> int:
    """Shrinks and expands of one layer, every row with one adapter of this rank."""
    return 2 * rows * rank * shape.rank_parameters(ALL_MODULES)


def attention_flops(shape: ModelShape, context: int, queries: int) -> int:
    """Causal attention of the last `queries` of `context` tokens in one layer, masked part left
    out."""
    window = shape.sliding_window or context
    past = sum(min(position + 1, window) for position in range(context - queries, context))
    return 4 * past * shape.num_heads * shape.head_dim


def decode_step_us(
    machine: Machine,
    shape: ModelShape,
    contexts: Sequence[int],
    ranks: Sequence[int] = (),
    itemsize: int = 2,
) -> float:
    """The floor of a whole step. ranks: of each distinct adapter in it."""
    rows = len(contexts)
    head = shape.vocab_size * shape.hidden
    flops = shape.num_layers * linear_flops(shape, rows) + 2 * rows * head
    base = machine.floor_us(base_bytes(shape, itemsize), flops)
    moved = kv_bytes(shape, contexts, itemsize) + lora_bytes(shape, ranks, itemsize)
    return base + shape.num_layers * machine.floor_us(moved)

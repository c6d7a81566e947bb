"""Which module a tensor of an adapter file belongs to, and what it is there: PEFT's key naming.

`base_model.model.<path>.<part>`, where the prefix may be missing and the adapter's name (`default`)
may stand in the part. Anything else is said by name: it belongs to a feature that is not served,
or to nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

PREFIX = "base_model.model."


class Part(StrEnum):
    """What a tensor is to its module; the value is its name there."""

    A = "lora_A.weight"
    B = "lora_B.weight"
    B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    ROWS = "token_adapter.trainable_tokens_delta"
    WEIGHT = "weight"  # of a module in modules_to_save, or not wrapped at all
    BIAS = "bias"
    BASE_WEIGHT = "base_layer.weight"  # of a module that has LoRA or trained tokens around it
    BASE_BIAS = "base_layer.bias"
    ORIGINAL_WEIGHT = "original_module.weight"  # of a module in modules_to_save, untrained
    ORIGINAL_BIAS = "original_module.bias"
    SAVED_WEIGHT = "modules_to_save.weight"  # a second copy of the trained one, never read
    SAVED_BIAS = "modules_to_save.bias"


_ENDINGS = {part.value: part for part in Part} | {
    "lora_A.default.weight": Part.A,
    "lora_B.default.weight": Part.B,
    "lora_B.default.bias": Part.B_BIAS,
    "lora_embedding_A.default": Part.EMBEDDING_A,
    "lora_embedding_B.default": Part.EMBEDDING_B,
    "lora_magnitude_vector.weight": Part.MAGNITUDE,  # PEFT's own module; files have the bare name
    "lora_magnitude_vector.default": Part.MAGNITUDE,
    "lora_magnitude_vector.default.weight": Part.MAGNITUDE,
    "token_adapter.trainable_tokens_delta.default": Part.ROWS,
    "token_adapter.base_layer.weight": Part.BASE_WEIGHT,
}
_LONGEST_FIRST = sorted(_ENDINGS, key=len, reverse=True)

# What other tensors an adapter file may hold, by a part of their name.
_FOREIGN = (
    (".lora_A.", "a named adapter; save one adapter alone, with save_pretrained"),
    (".lora_B.", "a named adapter; save one adapter alone, with save_pretrained"),
    (".lora_embedding_", "a named adapter; save one adapter alone, with save_pretrained"),
    (".lora_magnitude_vector", "a named adapter; save one adapter alone, with save_pretrained"),
    (".lora_", "a part of a kind of LoRA that is not supported"),
    (".modules_to_save", "a named adapter; save one adapter alone, with save_pretrained"),
    (".original_module", "a part of a module in modules_to_save that cannot be replaced"),
    (".token_adapter", "a named adapter's trained tokens; save one adapter alone"),
    (".base_layer", "a part of the base model that cannot be replaced"),
)


class TensorKey(NamedTuple):
    path: str  # of the module, relative to the causal LM
    part: Part

    @property
    def canonical(self) -> str:
        return f"{self.path}.{self.part}"


def parse_key(name: str) -> TensorKey | None:
    """None if PEFT gives no tensor of the kinds that are known such a name."""
    short = name.removeprefix(PREFIX)
    for ending in _LONGEST_FIRST:
        if short.endswith(f".{ending}"):
            path = short[: -len(ending) - 1]
            # A rest such as `q_proj.lora_A.mine` is no module.
            return TensorKey(path, _ENDINGS[ending]) if _foreign(f".{path}.") is None else None
    return None


def describe_foreign(name: str) -> str | None:
    """What a tensor that `parse_key` does not know is, as far as its name tells."""
    return _foreign(f".{name}.")


def _foreign(name: str) -> str | None:
    return next((what for part, what in _FOREIGN if part in name), None)

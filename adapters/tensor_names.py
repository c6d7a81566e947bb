"""Which module a tensor of an adapter file belongs to: PEFT's key naming.

`base_model.model.<path>.lora_A.weight`, where the prefix may be missing and the adapter's name
(`default`) may stand before `weight`. Anything else is said by name: it belongs to a feature that
is not served, or to nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "base_model.model."

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)

# What other tensors an adapter file may hold, by a part of their name.
_FOREIGN = (
    (".lora_magnitude_vector", "a DoRA magnitude"),
    (".lora_embedding_", "an adapted embedding"),
    (".modules_to_save", "a whole copy of a base module"),
    (".trainable_tokens", "replaced rows of the embedding"),
    (".token_adapter", "replaced rows of the embedding"),
    (".lora_A.", "a named adapter; save one adapter alone, with save_pretrained"),
    (".lora_B.", "a bias of B, or a named adapter"),
    ("embed_tokens.", "weights of the embedding; save with save_embedding_layers=False"),
    ("lm_head.", "weights of the output head; save with save_embedding_layers=False"),
    (".bias", "a bias of the base model"),
)


class TensorKey(NamedTuple):
    path: str  # of the module, relative to the causal LM
    side: str  # "A" | "B"

    @property
    def canonical(self) -> str:
        return f"{self.path}.lora_{self.side}.weight"


def parse_key(name: str) -> TensorKey | None:
    """None if the name is not that of a LoRA factor."""
    match = _KEY.fullmatch(name)
    return match and TensorKey(match["path"], match["side"])


def describe_foreign(name: str) -> str | None:
    """What a tensor that `parse_key` does not know is, as far as its name tells."""
    return next((what for part, what in _FOREIGN if part in name), None)

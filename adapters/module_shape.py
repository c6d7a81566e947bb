"""What adapters have to know of a base model's modules; `engine.api.ModuleShape` says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
TABLE_NAMES = ("embed_tokens", "lm_head")  # EMBEDDING_LAYER_NAMES of PEFT


class ModuleShape(Protocol):
    """A module of the base model that adapters may change."""

    @property
    def path(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def kind(self) -> str: ...  # linear (of a layer) | norm | qk_norm | embedding | head
    @property
    def bias(self) -> bool: ...
    @property
    def parts(self) -> tuple[int, ...]: ...  # out_features of what a fused projection consists of
    @property
    def tied(self) -> bool: ...  # of the head: its weight is the embedding's
    @property
    def weight_digest(self) -> str: ...  # of embedding and head: `ValuesDigest`; "" = unknown


def names_table(name: str) -> bool:
    """Whether a name in a config is that of the embedding or the head, by PEFT's measure."""
    return name.rpartition(".")[2] in TABLE_NAMES


def containers(modules: Sequence[ModuleShape]) -> list[str]:
    """Paths of what the modules lie in, such as `model.layers.0.mlp`, from the outside in."""
    found: dict[str, None] = {}
    for module in modules:
        parts = module.path.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            found[".".join(parts[:end])] = None
    return list(found)

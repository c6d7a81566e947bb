"""What adapters have to know of a base model's modules; `engine.api.ModuleShape` says it."""

from __future__ import annotations

from typing import Protocol

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


class ModuleShape(Protocol):
    """A module of the base model that adapters may change."""

    @property
    def path(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def kind(self) -> str: ...  # linear (of a layer) | norm | embedding | head
    @property
    def bias(self) -> bool: ...
    @property
    def parts(self) -> tuple[int, ...]: ...  # out_features of what a fused projection consists of
    @property
    def tied(self) -> bool: ...  # of the head: its weight is the embedding's

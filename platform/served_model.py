"""The base model as the platform serves it: its name in the API, its module shapes, its text side.

Made once the engine is ready, from `ModelInfo` alone; the API process never opens the model's
directory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.engine.api import ModelInfo, ModuleShape
from loraplex.engine.chat_template import ChatTemplate
from loraplex.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    signature: str  # sha256 over the modules: adapters validated against the same one fit
    created_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def public_name(self) -> str:
        """What the base model is, without a path of this server."""
        return served_name(self.info.name, None)

    @classmethod
    def from_info(cls, info: ModelInfo, tokenizer: Tokenizer, name: str) -> ServedModel:
        return cls(
            name=name,
            info=info,
            tokenizer=tokenizer,
            chat_template=ChatTemplate.from_info(info),
            signature=module_signature(info.modules),
        )


def served_name(model: str, served_model_name: str | None) -> str:
    """The base model's name in the API: as told, else the directory's own name, else the hub id."""
    if served_model_name:
        return served_model_name
    return Path(model).resolve().name if Path(model).is_dir() else model


def module_signature(modules: Sequence[ModuleShape]) -> str:
    lines = sorted(
        f"{m.path} {m.in_features} {m.out_features} {m.kind} {m.bias} {list(m.parts)} {m.tied} "
        f"{m.weight_digest}"
        for m in modules
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

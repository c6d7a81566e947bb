"""What a PEFT config means: which modules an adapter changes, and how strongly.

PEFT's rules (peft 0.21): `utils/other.py`, `get_pattern_key`, for rank_pattern and alpha_pattern.
Scaling: alpha/r (2106.09685), or alpha/sqrt(r) for rsLoRA (2312.03732). `config.py` reads it from
a file; of the adapter's tensors neither knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.adapters.module_shape import ModuleShape, names_table
from loraplex.adapters.patterns import tail_matcher
from loraplex.adapters.targets import Targets


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """How one module is adapted. Its output gains `scaling * B A x`."""

    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The keys of the file that have a meaning at inference.

    invocation_tokens: of an activated LoRA (aLoRA, 2504.12397), which applies from the last place
    in the prompt on where they stand; empty for one that applies everywhere.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    targets: Targets
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_model: str | None
    invocation_tokens: tuple[int, ...] = ()
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"  # which biases of the base model it replaces: none | all | lora_only
    modules_to_save: tuple[str, ...] = ()
    token_ids: dict[str | None, tuple[int, ...]] = field(default_factory=dict)  # None: embedding
    ensure_weight_tying: bool = False

    @property
    def scaling(self) -> float:
        """Of the modules that no pattern singles out."""
        return self._scale(self.r, self.lora_alpha)

    def canonical(self) -> dict[str, Any]:
        """What of this config changes the adapter's meaning, in one spelling, for the digest."""
        # Only where it is set, so that adapters keep the digests they had before it was known.
        invocation = {"alora_invocation_tokens": list(self.invocation_tokens)}
        return {
            **(invocation if self.invocation_tokens else {}),
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            # The first key that matches counts, so the order is part of the meaning.
            "rank_pattern": list(self.rank_pattern.items()),
            "alpha_pattern": list(self.alpha_pattern.items()),
            **self.targets.canonical(),
            # Only where they are used: digests of adapters without them are in registries.
            **{key: value for key, value in self._beyond_lora().items() if value},
        }

    def _beyond_lora(self) -> dict[str, Any]:
        return {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "bias": self.bias if self.bias != "none" else None,
            "modules_to_save": sorted(set(self.modules_to_save)),
            "trainable_token_indices": [[name, list(ids)] for name, ids in self.token_ids.items()],
            # Says whose factors both tables have, where the two have LoRA.
            "ensure_weight_tying": self.ensure_weight_tying and self._names_tables,
        }

    @property
    def _names_tables(self) -> bool:
        return self.targets.names_tables or any(map(names_table, self.modules_to_save))

    def resolve(
        self,
        modules: Sequence[ModuleShape],
        saved: Callable[[str], bool] = lambda path: False,
        more: Iterable[str] = (),
    ) -> dict[str, ModuleLora]:
        """Which of the model's modules have LoRA, and how: {path: ModuleLora} in model order.

        modules: what adapters of the base model may change.
        saved: whether a path is taken out because modules_to_save names it.
        more: paths that have LoRA because others have it.

        Raises: AdapterRefused if a target means nothing here, or something that cannot be adapted.
        """
        rank_keys = [(tail_matcher(key), rank) for key, rank in self.rank_pattern.items()]
        alpha_keys = [(tail_matcher(key), alpha) for key, alpha in self.alpha_pattern.items()]
        resolved = {}
        selected = self.targets.select(modules, saved)
        for path in dict.fromkeys([*selected, *more]):
            rank = next((rank for hits, rank in rank_keys if hits(path)), self.r)
            alpha = next((alpha for hits, alpha in alpha_keys if hits(path)), self.lora_alpha)
            resolved[path] = ModuleLora(rank, alpha, self._scale(rank, alpha))
        return resolved

    def idle_patterns(self, paths: Iterable[str]) -> list[str]:
        """Keys of rank_pattern and alpha_pattern that match none of these paths: misspelt?"""
        paths = list(paths)
        keys = {**self.rank_pattern, **self.alpha_pattern}
        return [key for key in keys if not any(map(tail_matcher(key), paths))]

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

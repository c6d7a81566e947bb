"""The entries of an adapter's manifest: what it changes, and which tensors do it. Only data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.fused import Rows
from loraplex.adapters.module_shape import ModuleShape


@dataclass(frozen=True, slots=True)
class ManifestModule:
    """One module adapted by A and B: a linear module of a layer, the embedding or the output head.

    lora_a: [rank, in], lora_b: [out, rank], names of tensors.
    rows: set where lora_b, magnitude and bias are a fused projection's, of which this is a part.
    magnitude: DoRA's m [out]; delta_bias: the bias of B [out], without the scaling.
    tied: of the embedding's, its tensors are the output head's (ensure_weight_tying):
        lora_a [in, rank], lora_b [rank, out].
    """

    path: str
    rank: int
    alpha: float
    scaling: float
    in_features: int
    out_features: int
    lora_a: str
    lora_b: str
    rows: Rows | None = None
    magnitude: str | None = None
    delta_bias: str | None = None
    tied: bool = False

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> ManifestModule:
        return cls(**{**fields, "rows": _rows(fields.get("rows"))})


@dataclass(frozen=True, slots=True)
class Replacement:
    """A parameter of the base model for which a tensor of the adapter stands.

    path: of the module. parameter: "weight" or "bias".
    kind: "linear" (of a layer), "norm", "embedding" or "head".
    shape: of the parameter. rows: set where it is a part of a fused projection's tensor.
    """

    path: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    tensor: str
    rows: Rows | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shape_in(self, module: ModuleShape, num_rows: int) -> tuple[int, ...] | None:
        """The parameter's shape in a model, where `module` has or contains it; None: there is none.

        num_rows: how many of the module's outputs are of this path.
        """
        if self.parameter == "bias":
            return (num_rows,) if module.bias else None
        if module.kind != self.kind:
            return None
        if module.kind == "norm":
            return (module.out_features,)
        if module.kind == "embedding":
            return (module.in_features, module.out_features)
        return (num_rows, module.in_features)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Replacement:
        shape, rows = tuple(fields["shape"]), _rows(fields.get("rows"))
        return cls(**{**fields, "shape": shape, "rows": rows})


@dataclass(frozen=True, slots=True)
class ManifestRows:
    """Trained rows of the embedding: row `order[i]` of the tensor stands for token `ids[i]`.

    ids: ascending. in_head: they stand in the output head, too, which is tied to the embedding.
    """

    ids: tuple[int, ...]
    order: tuple[int, ...]
    hidden_size: int
    tensor: str
    in_head: bool

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> ManifestRows:
        return cls(**{**fields, "ids": tuple(fields["ids"]), "order": tuple(fields["order"])})


def _rows(fields: Mapping[str, Any] | None) -> Rows | None:
    return None if fields is None else Rows(**fields)

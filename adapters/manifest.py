"""What is known of a validated adapter: `manifest.json` beside its two files in the store.

The engine needs nothing else to load it, the platform nothing else to describe it. Knows no disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex.adapters import strict_json
from loraplex.adapters.errors import AdapterCorrupt, Problem

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"

FORMAT = 1
PAGE_RANKS = 16  # ranks of one device page (ARCHITECTURE 4)


class ModuleShape(Protocol):
    """A linear module of the base model; `engine.api.ModuleShape` is one."""

    @property
    def path(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ManifestModule:
    """One adapted module. `lora_a` [rank, in] and `lora_b` [out, rank] are names of tensors."""

    path: str
    rank: int
    alpha: float
    scaling: float
    in_features: int
    out_features: int
    lora_a: str
    lora_b: str


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Size and sha256 (hex) of a stored file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    digest: str  # sha256 of meaning, hex: see digest.py
    rank: int  # the largest of all modules
    alpha: float  # as configured; a module's own value is in `modules`
    scaling: float  # as configured: alpha/r, or alpha/sqrt(r) for rsLoRA
    target_modules: tuple[str, ...]  # last names of the adapted modules, sorted
    num_parameters: int
    size_bytes: int  # of all tensors as stored
    dtype: str  # "float32" | "float16" | "bfloat16" | "float64" | "mixed"
    base_model: str | None  # what the config says it was trained on
    modules: tuple[ManifestModule, ...]  # sorted by path
    files: dict[str, FileStamp]
    warnings: tuple[Problem, ...] = ()

    @property
    def pages(self) -> int:
        """Device pages it needs."""
        return -(-self.rank // PAGE_RANKS)

    def mismatches(self, modules: Iterable[ModuleShape]) -> list[Problem]:
        """Why this adapter cannot run on a model with these modules; empty if it can.

        A store outlives the model it was filled for, so this is asked again at every start.
        """
        shapes = {m.path: (m.in_features, m.out_features) for m in modules}
        problems = []
        for m in self.modules:
            if shapes.get(m.path) != (m.in_features, m.out_features):
                actual = shapes.get(m.path)
                problems.append(
                    Problem(
                        "base_model_mismatch",
                        f"{m.path} is not in this base model"
                        if actual is None
                        else f"{m.path} has another shape in this base model",
                        expected=f"in {m.in_features}, out {m.out_features}",
                        actual=actual and f"in {actual[0]}, out {actual[1]}",
                    )
                )
        return problems

    def to_json(self) -> bytes:
        return strict_json.canonical({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, raw: bytes) -> AdapterManifest:
        """Raises: AdapterCorrupt if it is not what `to_json` wrote."""
        try:
            fields: dict[str, Any] = strict_json.loads(raw)
            if fields.pop("format") != FORMAT:
                raise ValueError("written by another version of Loraplex")
            fields["target_modules"] = tuple(fields["target_modules"])
            fields["modules"] = tuple(ManifestModule(**m) for m in fields["modules"])
            fields["files"] = {name: FileStamp(**f) for name, f in fields["files"].items()}
            fields["warnings"] = tuple(Problem(**p) for p in fields["warnings"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterCorrupt(f"{MANIFEST_FILE} cannot be read: {error}") from None

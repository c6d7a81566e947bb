"""What is known of a validated adapter: `manifest.json` beside its two files in the store.

The engine needs nothing else to load it, the platform nothing else to describe it. Knows no disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraplex.adapters import strict_json
from loraplex.adapters.errors import AdapterCorrupt, Problem
from loraplex.adapters.fused import split
from loraplex.adapters.manifest_parts import ManifestModule, ManifestRows, Replacement
from loraplex.adapters.module_shape import EMBEDDING, HEAD, ModuleShape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"

FORMAT = 1
PAGE_RANKS = 16  # ranks of one device page (ARCHITECTURE 4)
# Features that are not linear in the adapter's weight: they norm weights or stand for parts of the
# base model.
WHOLE_FEATURES = frozenset(
    {
        "dora",
        "bias",
        "full_linear",
        "full_norm",
        "full_embed_tokens",
        "full_lm_head",
        "token_rows",
    }
)


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
    modules: tuple[ManifestModule, ...]  # linear modules of layers, sorted by path
    files: dict[str, FileStamp]
    warnings: tuple[Problem, ...] = ()
    # What `extras.Extras` holds of it, beside the magnitudes and biases in `modules`.
    embedding_lora: ManifestModule | None = None
    head_lora: ManifestModule | None = None
    replacements: tuple[Replacement, ...] = ()  # sorted by path, weight before bias
    token_rows: ManifestRows | None = None
    # Whether the model's head is tied to its embedding; None: no matter, it changes neither.
    tied_head: bool | None = None
    # Of an activated LoRA: it applies from the last place in the prompt on where they stand.
    invocation_tokens: tuple[int, ...] = ()
    # path -> digest of tables that its file has and that are the base model's own: nothing to load.
    base_tables: dict[str, str] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """Device pages it needs: none if it adapts no linear module of a layer."""
        return -(-max((m.rank for m in self.modules), default=0) // PAGE_RANKS)

    @property
    def needs_weight_one(self) -> bool:
        """Whether it is not linear in its weight, so that it can neither be scaled nor be composed:
        it norms weights (DoRA) or stands for parts of the base model.
        """
        return not WHOLE_FEATURES.isdisjoint(self.features)

    @property
    def features(self) -> tuple[str, ...]:
        """What it uses beyond A and B of linear modules, for people."""
        weights = [r for r in self.replacements if r.parameter == "weight"]
        kinds, whole = {r.kind for r in weights}, {r.path for r in weights}
        found = {
            "alora": bool(self.invocation_tokens),
            "dora": any(m.magnitude is not None for m in self.modules),
            "lora_bias": any(m.delta_bias is not None for m in self.modules),
            "fused_projections": any(m.rows is not None for m in self.modules),
            "embed_tokens_lora": self.embedding_lora is not None,
            "lm_head_lora": self.head_lora is not None,
            "bias": any(r.parameter == "bias" and r.path not in whole for r in self.replacements),
            "full_linear": "linear" in kinds,
            "full_norm": "norm" in kinds,
            "full_embed_tokens": "embedding" in kinds,
            "full_lm_head": "head" in kinds,
            "token_rows": self.token_rows is not None,
        }
        return tuple(name for name, used in found.items() if used)

    def extras_bytes(self, itemsize: int) -> int:
        """`Extras.nbytes` of what `load_weights` gives for a model dtype of that many bytes."""
        vectors = sum(
            m.out_features * ((m.magnitude is not None) + (m.delta_bias is not None))
            for m in self.modules
        )
        vectors += sum(r.numel for r in self.replacements if r.parameter == "bias")
        weights = sum(r.numel for r in self.replacements if r.parameter == "weight")
        for lora in (self.embedding_lora, self.head_lora):
            if lora is not None:
                weights += lora.rank * (lora.in_features + lora.out_features)
        num_rows = 0
        if self.token_rows is not None:
            num_rows = len(self.token_rows.ids)
            weights += num_rows * self.token_rows.hidden_size
        return 4 * vectors + itemsize * weights + 8 * num_rows

    def mismatches(self, modules: Iterable[ModuleShape]) -> list[Problem]:
        """Why this adapter cannot run on a model with these modules; empty if it can.

        A store outlives the model it was filled for, so this is asked again at every start.
        """
        there: dict[str, tuple[ModuleShape, int]] = {}  # path -> module, its rows
        for module in modules:
            for path, rows in split(module):
                there[path] = (module, module.out_features if rows is None else rows.count)
        problems = []

        def compare(path: str, expected: str, actual: str | None) -> None:
            if actual != expected:
                how = "is not" if actual is None else "is another"
                message = f"{path} {how} in this base model"
                problem = Problem("base_model_mismatch", message, expected=expected, actual=actual)
                problems.append(problem)

        loras = [*self.modules, self.embedding_lora, self.head_lora]
        for m in filter(None, loras):
            found = there.get(m.path)
            actual = found and f"in {found[0].in_features}, out {found[1]}"
            compare(m.path, f"in {m.in_features}, out {m.out_features}", actual)
        for r in self.replacements:
            found = there.get(r.path)
            shape = None if found is None else r.shape_in(*found)
            actual = None if shape is None else str(list(shape))
            compare(f"{r.path}.{r.parameter}", str(list(r.shape)), actual)
        if self.token_rows is not None:
            found = there.get(EMBEDDING)
            fits = found and self.token_rows.ids[-1] < found[0].in_features
            actual = found and f"rows of {found[1]}" + ("" if fits else ", too few")
            compare(EMBEDDING, f"rows of {self.token_rows.hidden_size}", actual)
        if self.tied_head is not None:
            tied = HEAD in there and there[HEAD][0].tied
            words = {True: "tied to the embedding", False: "not tied to the embedding"}
            compare(HEAD, words[self.tied_head], words[tied])
        for path, digest in self.base_tables.items():
            found = there.get(path)
            compare(f"the weight of {path}", digest, found and found[0].weight_digest)
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
            fields["modules"] = tuple(ManifestModule.read(m) for m in fields["modules"])
            for key in ("embedding_lora", "head_lora"):
                if fields.get(key) is not None:
                    fields[key] = ManifestModule.read(fields[key])
            replacements = fields.get("replacements", ())
            fields["replacements"] = tuple(Replacement.read(r) for r in replacements)
            if fields.get("token_rows") is not None:
                fields["token_rows"] = ManifestRows.read(fields["token_rows"])
            fields["files"] = {name: FileStamp(**f) for name, f in fields["files"].items()}
            fields["warnings"] = tuple(Problem(**p) for p in fields["warnings"])
            fields["invocation_tokens"] = tuple(fields.get("invocation_tokens", ()))
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterCorrupt(f"{MANIFEST_FILE} cannot be read: {error}") from None

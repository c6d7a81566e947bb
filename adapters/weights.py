"""A stored adapter's tensors, in the model's dtype and keyed as the page pool wants them, on CPU.

Reads the manifest and the weights file; PEFT's configuration is resolved in the manifest already.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterCorrupt, AdapterError, AdapterRefused
from loraplex.adapters.extras import Extras, Key, TableLora, TokenRows
from loraplex.adapters.manifest import MANIFEST_FILE, WEIGHTS_FILE, AdapterManifest
from loraplex.adapters.manifest_parts import ManifestModule, ManifestRows
from loraplex.adapters.weights_file import WeightsFile

# Columns of the page tables, in the order of `kernels.ops.Module`.
MODULE_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_PATH = re.compile(rf"(?:.+\.)?layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(MODULE_KINDS)})")
Locate = Callable[[str], Key | None]


@dataclass(frozen=True, slots=True)
class LoadedModule:
    """`a`: [rank, in], `bt`: [rank, out] (B transposed); both contiguous, model dtype, CPU."""

    a: Tensor
    bt: Tensor
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """`modules` is keyed by (layer, module kind); kind is an index into `MODULE_KINDS`."""

    digest: str
    rank: int  # the largest of all modules
    modules: dict[Key, LoadedModule]
    extras: Extras = field(default_factory=Extras)
    invocation_tokens: tuple[int, ...] = ()  # empty: it applies to every token

    @property
    def nbytes(self) -> int:
        return sum(m.a.nbytes + m.bt.nbytes for m in self.modules.values())


def locate(path: str) -> Key | None:
    """(layer, kind) of a Llama-style module path, None for any other path."""
    match = _PATH.fullmatch(path)
    return match and (int(match[1]), MODULE_KINDS.index(match[2]))


def load_weights(
    folder: Path,
    dtype: torch.dtype,
    locate: Locate = locate,
) -> LoadedAdapter:
    """Load an adapter from its folder in the store.

    folder: holds `manifest.json` and the weights file (`AdapterStore.path(digest)`).
    dtype: of the result, whatever the file has.
    locate: module path -> (layer, kind), None where this model has no such module.

    Raises: AdapterCorrupt if files and manifest disagree; AdapterError "adapter_mismatch" if a
    module is not in the model, "adapter_overflow" if a weight is beyond the range of dtype.
    """
    try:
        manifest = AdapterManifest.from_json((folder / MANIFEST_FILE).read_bytes())
        _check_bytes(folder / WEIGHTS_FILE, manifest)
        with WeightsFile(folder / WEIGHTS_FILE, dtype) as file:
            modules = {}
            for m in manifest.modules:
                a = file.read(m.lora_a, (m.rank, m.in_features))
                b = file.read(m.lora_b, (m.out_features, m.rank), m.rows)
                bt = file.cast(b.t(), m.lora_b)
                key = _find(m.path, locate, manifest)
                modules[key] = LoadedModule(file.cast(a, m.lora_a), bt, m.rank, m.scaling)
            extras = _load_extras(file, manifest, locate)
    except OSError as error:
        raise AdapterCorrupt(f"the adapter's files cannot be read: {error.strerror}") from None
    except AdapterRefused as error:
        raise AdapterCorrupt(f"the stored weights are damaged: {error.message}") from None
    return LoadedAdapter(
        manifest.digest,
        manifest.rank,
        modules,
        extras,
        invocation_tokens=manifest.invocation_tokens,
    )


def _check_bytes(path: Path, manifest: AdapterManifest) -> None:
    """Wrong bits make valid floats, so only the hash tells. It is taken once per adapter and model:
    later loads read the page file, which has checksums of its own.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != manifest.files[WEIGHTS_FILE].sha256:
        raise AdapterCorrupt(
            f"{WEIGHTS_FILE} of adapter {manifest.digest[:12]} has changed since it was stored; "
            "upload the same content again to mend it"
        )


def _find(path: str, locate: Locate, manifest: AdapterManifest) -> Key:
    key = locate(path)
    if key is None:
        raise AdapterError(
            f"adapter {manifest.digest[:12]} adapts {path}, which this model cannot",
            code="adapter_mismatch",
        )
    return key


def _load_extras(file: WeightsFile, manifest: AdapterManifest, locate: Locate) -> Extras:
    magnitudes, delta_biases, biases = {}, {}, {}
    linears, norms, tables = {}, {}, {}
    for m in manifest.modules:
        key = _find(m.path, locate, manifest)
        if m.magnitude is not None:
            magnitudes[key] = file.vector(m.magnitude, m.out_features, m.rows)
        if m.delta_bias is not None:
            delta_biases[key] = file.vector(m.delta_bias, m.out_features, m.rows, m.scaling)
    for r in manifest.replacements:
        if r.parameter == "bias":
            biases[_find(r.path, locate, manifest)] = file.vector(r.tensor, r.shape[0], r.rows)
            continue
        weight = file.cast(file.read(r.tensor, r.shape, r.rows), r.tensor)
        if r.kind == "linear":
            linears[_find(r.path, locate, manifest)] = weight
        elif r.kind == "norm":
            norms[r.path] = weight
        else:
            tables[r.kind] = weight
    return Extras(
        magnitudes=magnitudes,
        delta_biases=delta_biases,
        biases=biases,
        linears=linears,
        norms=norms,
        embedding=tables.get("embedding"),
        head=tables.get("head"),
        embedding_lora=_load_table(file, manifest.embedding_lora),
        head_lora=_load_table(file, manifest.head_lora),
        token_rows=_load_rows(file, manifest.token_rows),
    )


def _load_table(file: WeightsFile, m: ManifestModule | None) -> TableLora | None:
    if m is None:
        return None
    if m.tied:
        at = file.read(m.lora_a, (m.in_features, m.rank))
        bt = file.read(m.lora_b, (m.rank, m.out_features))
    else:
        at = file.read(m.lora_a, (m.rank, m.in_features)).t()
        bt = file.read(m.lora_b, (m.out_features, m.rank)).t()
    return TableLora(file.cast(at, m.lora_a), file.cast(bt, m.lora_b), m.rank, m.scaling)


def _load_rows(file: WeightsFile, m: ManifestRows | None) -> TokenRows | None:
    if m is None:
        return None
    rows = file.read(m.tensor, (len(m.ids), m.hidden_size))[list(m.order)]
    return TokenRows(torch.tensor(m.ids), file.cast(rows, m.tensor), m.in_head)

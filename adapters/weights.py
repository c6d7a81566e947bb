"""A stored adapter's tensors, in the model's dtype and keyed as the page pool wants them, on CPU.

Reads the manifest and the weights file; PEFT's configuration is resolved in the manifest already.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterCorrupt, AdapterError, AdapterRefused
from loraplex.adapters.extras import Extras
from loraplex.adapters.header import Header, read_header
from loraplex.adapters.manifest import MANIFEST_FILE, WEIGHTS_FILE, AdapterManifest

# Columns of the page tables, in the order of `kernels.ops.Module`.
MODULE_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_PATH = re.compile(rf"(?:.+\.)?layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(MODULE_KINDS)})")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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
    modules: dict[tuple[int, int], LoadedModule]
    extras: Extras = field(default_factory=Extras)
    invocation_tokens: tuple[int, ...] = ()  # empty: it applies to every token

    @property
    def nbytes(self) -> int:
        return sum(m.a.nbytes + m.bt.nbytes for m in self.modules.values())


def locate(path: str) -> tuple[int, int] | None:
    """(layer, kind) of a Llama-style module path, None for any other path."""
    match = _PATH.fullmatch(path)
    return match and (int(match[1]), MODULE_KINDS.index(match[2]))


def load_weights(
    folder: Path,
    dtype: torch.dtype,
    locate: Callable[[str], tuple[int, int] | None] = locate,
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
        header = read_header(folder / WEIGHTS_FILE)
        modules = {}
        with (folder / WEIGHTS_FILE).open("rb") as file:
            for m in manifest.modules:
                key = locate(m.path)
                if key is None:
                    raise AdapterError(
                        f"adapter {manifest.digest[:12]} adapts {m.path}, which this model cannot",
                        code="adapter_mismatch",
                    )
                a = _read(file, header, m.lora_a, (m.rank, m.in_features))
                b = _read(file, header, m.lora_b, (m.out_features, m.rank))
                modules[key] = LoadedModule(
                    _cast(a, dtype, m.lora_a), _cast(b.t(), dtype, m.lora_b), m.rank, m.scaling
                )
    except OSError as error:
        raise AdapterCorrupt(f"the adapter's files cannot be read: {error.strerror}") from None
    except AdapterRefused as error:
        raise AdapterCorrupt(f"the stored weights are damaged: {error.message}") from None
    return LoadedAdapter(
        manifest.digest,
        manifest.rank,
        modules,
        invocation_tokens=manifest.invocation_tokens,
    )


def _read(file: IO[bytes], header: Header, name: str, shape: tuple[int, int]) -> Tensor:
    info = header.tensors.get(name)
    if info is None or info.shape != shape or info.dtype not in _DTYPES:
        raise AdapterCorrupt(
            f"{name} of shape {shape} is in the manifest but not in {WEIGHTS_FILE}"
        )
    file.seek(info.offset)
    data = np.fromfile(file, dtype=np.uint8, count=info.nbytes)
    if len(data) != info.nbytes:
        raise AdapterCorrupt(f"{WEIGHTS_FILE} ends inside {name}")
    return torch.from_numpy(data).view(_DTYPES[info.dtype]).view(shape)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    out = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not out.isfinite().all():
        raise AdapterError(
            f"{name} holds weights beyond the range of float16; serve with --dtype bfloat16",
            code="adapter_overflow",
        )
    return out

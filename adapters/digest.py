"""The identity of an adapter: one sha256 over what it means.

Config and tensors in canonical form, so that key order, tensor order in the file, PEFT's optional
name parts, training-only settings and metadata do not matter, and one flipped bit of a weight does.
The same on every machine and for every base model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.adapters import strict_json
from loraplex.adapters.header import TensorInfo, read_chunks

_FORMAT = b"loraplex adapter 1"


def adapter_digest(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], weights: Path
) -> str:
    """Hex digest, streaming the weights file.

    config: `AdapterConfig.canonical()`.
    tensors: canonical name -> where its bytes lie in `weights`.
    """
    sha = hashlib.sha256()

    def put(data: bytes) -> None:  # with its length, so that no two inputs run together
        sha.update(struct.pack("<Q", len(data)))
        sha.update(data)

    put(_FORMAT)
    put(strict_json.canonical(config))
    with weights.open("rb") as file:
        for name, tensor in sorted(tensors.items()):
            put(strict_json.canonical([name, tensor.dtype, list(tensor.shape)]))
            for chunk in read_chunks(file, tensor):
                sha.update(chunk)
    return sha.hexdigest()


class ValuesDigest:
    """A digest of floating-point values that does not depend on the type they are kept in.

    Two hashes over the values as fp32: one of their upper halves, which is all there is to a bf16,
    one of their lower halves, unless they are all zero. So a table that was read in bf16 has the
    digest of its copy in fp32.
    """

    def __init__(self) -> None:
        self._upper, self._lower = hashlib.sha256(), hashlib.sha256()
        self._plain = True  # all lower halves are zero

    def update(self, values: np.ndarray[Any, Any]) -> None:
        """values: fp32 or fp16, or uint16 that are the bits of bf16; contiguous."""
        if values.dtype == np.uint16:
            self._upper.update(values.data)
            return
        halves = values.astype("<f4", copy=False).view("<u2")
        lower = halves.reshape(-1)[0::2].copy()
        self._upper.update(halves.reshape(-1)[1::2].copy().data)
        self._lower.update(lower.data)
        self._plain = self._plain and not lower.any()

    def hexdigest(self) -> str:
        upper = self._upper.hexdigest()
        return upper if self._plain else f"{upper}:{self._lower.hexdigest()}"


_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def values_digest(weights: Path, tensor: TensorInfo) -> str | None:
    """`ValuesDigest` of a tensor in a file; None for types that do not fit into fp32."""
    kind = _KINDS.get(tensor.dtype)
    if kind is None:
        return None
    digest = ValuesDigest()
    with weights.open("rb") as file:
        for chunk in read_chunks(file, tensor):
            digest.update(np.frombuffer(chunk, dtype=kind))
    return digest.hexdigest()

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

"""Tensors out of a stored weights file, by name and with the shape that the manifest promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterCorrupt, AdapterError
from loraplex.adapters.fused import Rows
from loraplex.adapters.header import ITEM_BYTES, read_header
from loraplex.adapters.manifest import WEIGHTS_FILE

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class WeightsFile:
    """dtype: what weights are cast to."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """Raises: AdapterRefused if the header is damaged; OSError."""
        self._dtype = dtype
        self._header = read_header(path)
        self._file = path.open("rb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, shape: tuple[int, ...], rows: Rows | None = None) -> Tensor:
        """A tensor as stored, or with `rows` (of a longer one) that part of it.

        Raises: AdapterCorrupt if the file has no such tensor.
        """
        info = self._header.tensors.get(name)
        stored = shape if rows is None else (rows.total, *shape[1:])
        if info is None or info.shape != stored or info.dtype not in _DTYPES:
            raise AdapterCorrupt(
                f"{name} of shape {stored} is in the manifest but not in {WEIGHTS_FILE}"
            )
        row_bytes = math.prod(shape[1:]) * ITEM_BYTES[info.dtype]
        self._file.seek(info.offset + (0 if rows is None else rows.start * row_bytes))
        nbytes = shape[0] * row_bytes
        data = np.fromfile(self._file, dtype=np.uint8, count=nbytes)
        if len(data) != nbytes:
            raise AdapterCorrupt(f"{WEIGHTS_FILE} ends inside {name}")
        return torch.from_numpy(data).view(_DTYPES[info.dtype]).view(shape)

    def cast(self, tensor: Tensor, name: str) -> Tensor:
        """In the file's dtype of choice, contiguous.

        Raises: AdapterError "adapter_overflow" if a weight is beyond its range.
        """
        return _cast(tensor, self._dtype, name)

    def vector(
        self, name: str, length: int, rows: Rows | None = None, scaling: float = 1.0
    ) -> Tensor:
        """Magnitudes and biases: fp32 whatever the model's dtype.

        Raises: AdapterError "adapter_overflow" if a number, scaled, is beyond its range.
        """
        vector = scaling * self.read(name, (length,), rows).to(torch.float32)
        return _finite(vector, name)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    out = tensor.to(dtype).contiguous()
    # What was stored is finite, see validation.
    return out if dtype == tensor.dtype else _finite(out, name)


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        hint = "; serve with --dtype bfloat16" if tensor.dtype == torch.float16 else ""
        raise AdapterError(
            f"{name} holds weights beyond the range of {kind}{hint}", code="adapter_overflow"
        )
    return tensor

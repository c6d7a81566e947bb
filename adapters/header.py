"""The header of a safetensors file, every lie found, and a scan of the numbers behind it. No torch.

Layout: 8 bytes little-endian header length, the header (a JSON object: name -> dtype, shape,
data_offsets), the data. A file passes only if its tensors tile the data exactly: no overlap, no
hole, nothing left over. Knows nothing of LoRA: which names and shapes make sense is
`validation.py`'s business.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from loraplex.adapters import strict_json
from loraplex.adapters.errors import AdapterCorrupt, AdapterRefused, Problem
from loraplex.adapters.limits import Limits
from loraplex.adapters.manifest import WEIGHTS_FILE

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
# dtype -> (unsigned type of its bits, mask of the exponent, all ones exactly in NaN and infinity)
_BITS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
FLOAT_DTYPES = tuple(_BITS)

_CHUNK_BYTES = 1 << 20
_MAX_NAME = 512
_MAX_DIMS = 8
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its bytes are `[offset, offset + nbytes)` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    tensors: dict[str, TensorInfo]  # sorted by offset
    metadata: dict[str, str]
    file_bytes: int


@dataclass(frozen=True, slots=True)
class TensorScan:
    first_nonfinite: int | None  # flat index of the first NaN or infinity
    all_zero: bool


def read_header(path: Path, limits: Limits | None = None) -> Header:
    """Parse and check the header of a safetensors file.

    Raises: AdapterRefused with every problem found; OSError if the file cannot be read.
    """
    limits = limits or Limits()
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        entries = _read_json(file, file_bytes, limits)
        data_start = file.tell()

    problems: list[Problem] = []
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(_problem("header_invalid", "__metadata__ must map strings to strings"))
    if len(entries) > limits.max_tensors:
        message = f"{len(entries)} tensors exceed the limit of {limits.max_tensors}"
        _refuse("too_many_tensors", message)
    tensors = []
    for name, entry in entries.items():
        found = _tensor(name, entry, data_start)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            tensors.append(found)
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    if not problems:  # where one entry is unreadable, holes are no news
        problems = _tiling(tensors, data_start, file_bytes)
    if problems:
        raise AdapterRefused(problems)
    return Header({t.name: t for t in tensors}, metadata, file_bytes)


def read_chunks(file: IO[bytes], tensor: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes in pieces of at most 1 MiB, each a whole number of items.

    Raises: AdapterCorrupt if the file is shorter than its header was.
    """
    file.seek(tensor.offset)
    left = tensor.nbytes
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk or len(chunk) % ITEM_BYTES[tensor.dtype]:
            raise AdapterCorrupt(f"the weights file ends inside {tensor.name}")
        left -= len(chunk)
        yield chunk


def scan_finite(path: Path, header: Header) -> dict[str, TensorScan]:
    """Look at every number of the float tensors, in bounded memory; other tensors are left out."""
    with path.open("rb") as file:
        return {t.name: _scan(file, t) for t in header.tensors.values() if t.dtype in _BITS}


def _scan(file: IO[bytes], tensor: TensorInfo) -> TensorScan:
    kind, exponent = _BITS[tensor.dtype]
    magnitude = np.iinfo(kind).max >> 1  # all bits but the sign: -0.0 is zero
    done, all_zero = 0, True
    for chunk in read_chunks(file, tensor):
        bits = np.frombuffer(chunk, dtype=kind)
        bad = (bits & exponent) == exponent
        if bad.any():
            return TensorScan(done + int(bad.argmax()), False)
        all_zero = all_zero and not (bits & magnitude).any()
        done += len(bits)
    return TensorScan(None, all_zero)


def _read_json(file: IO[bytes], file_bytes: int, limits: Limits) -> dict[str, Any]:
    prefix = file.read(8)
    if len(prefix) < 8:
        _refuse("header_truncated", f"{file_bytes} bytes are no safetensors file; upload it again")
    (size,) = struct.unpack("<Q", prefix)
    if size > file_bytes - 8:
        # A pickle's first bytes make an absurd length; a short header may begin with the same two.
        if prefix[:4] == b"PK\x03\x04" or (prefix[:1] == b"\x80" and prefix[1:2] <= b"\x05"):
            _refuse(
                "weights_pickle",
                "the weights are a pickle (torch.save), which can run code when read; "
                "save them with save_pretrained(..., safe_serialization=True)",
            )
        _refuse(
            "header_truncated",
            f"the header claims {size} bytes but only {file_bytes - 8} follow; "
            "the file is cut off or no safetensors file",
        )
    if size > limits.max_header_bytes:
        _refuse(
            "header_too_large",
            f"the header has {size} bytes, the limit is {limits.max_header_bytes}",
        )
    raw = file.read(size)
    if raw[:1] != b"{":
        _refuse("header_invalid", "the header does not begin with '{'; is it safetensors?")
    try:
        entries: dict[str, Any] = strict_json.loads(raw)  # padding is white space, as JSON allows
    except ValueError as error:
        _refuse("header_invalid", f"the header is not JSON: {error}")
    return entries


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo | Problem:
    shown = name if len(name) <= 80 else name[:77] + "..."

    def refuse(code: str, message: str, **more: str) -> Problem:
        return _problem(code, f"{shown}: {message}", tensor=shown, **more)

    if not 0 < len(name) <= _MAX_NAME:
        return refuse("header_invalid", f"a name must have 1 to {_MAX_NAME} characters")
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return refuse("header_invalid", "an entry must have dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return refuse("dtype_unknown", f"unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        return refuse("shape_invalid", f"shape {str(shape)[:80]} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return refuse("offsets_invalid", f"data_offsets {str(offsets)[:80]} are not [begin, end]")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        return refuse(
            "size_mismatch",
            f"{dtype} {shape} takes {nbytes} bytes, data_offsets span {offsets[1] - offsets[0]}",
            expected=str(nbytes),
            actual=str(offsets[1] - offsets[0]),
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _tiling(tensors: list[TensorInfo], data_start: int, file_bytes: int) -> list[Problem]:
    problems = []
    end = data_start
    for t in tensors:
        if t.offset != end:
            code, what = (
                ("offsets_hole", "a hole") if t.offset > end else ("offsets_overlap", "an overlap")
            )
            problems.append(
                _problem(
                    code,
                    f"{t.name}: {what} before this tensor's data",
                    tensor=t.name,
                    expected=str(end - data_start),
                    actual=str(t.offset - data_start),
                )
            )
        end = max(end, t.offset + t.nbytes)
    if end > file_bytes:
        problems.append(
            _problem(
                "file_truncated",
                f"the file is cut off: {end} bytes needed, {file_bytes} there; upload it again",
                expected=str(end),
                actual=str(file_bytes),
            )
        )
    if end < file_bytes:
        problems.append(
            _problem(
                "trailing_bytes",
                f"{file_bytes - end} bytes follow the last tensor",
                expected=str(end),
                actual=str(file_bytes),
            )
        )
    return problems


def _problem(code: str, message: str, **more: str) -> Problem:
    return Problem(code, message, file=WEIGHTS_FILE, **more)


def _refuse(code: str, message: str) -> NoReturn:
    raise AdapterRefused([_problem(code, message)])

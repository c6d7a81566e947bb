"""The safetensors header: the library's own files pass, every lie is told, no bytes crash it."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.adapters.header import Header, read_chunks, read_header, scan_finite
from loraplex.adapters.limits import Limits


def joined(header: Any, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(begin: int, end: int, dtype: str = "F32", shape: list[Any] | None = None) -> Any:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(data: bytes, folder: Path, limits: Limits | None = None) -> list[str]:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterRefused) as error:
        read_header(path, limits)
    return [p.code for p in error.value.problems]


def read(data: bytes, folder: Path) -> Header:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    return read_header(path)


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3)
arrays = st.tuples(st.sampled_from(["float16", "float32", "float64", "int32", "uint8"]), shapes)


@settings(max_examples=100, deadline=None)
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=9), arrays, max_size=6))
def test_reads_what_the_library_writes(
    tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from safetensors.numpy import load, save

    tensors.pop("__metadata__", None)
    rng = np.random.default_rng(0)
    made = {n: rng.integers(0, 9, shape).astype(kind) for n, (kind, shape) in tensors.items()}
    data = save(made, metadata={"format": "np"})
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    path.write_bytes(data)
    header = read_header(path)
    assert header.metadata == {"format": "np"}
    assert set(header.tensors) == set(load(data))
    with path.open("rb") as file:
        for name, array in made.items():
            info = header.tensors[name]
            assert info.shape == array.shape
            assert b"".join(read_chunks(file, info)) == array.tobytes()


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400),
)
def test_mutated_bytes_are_refused_or_harmless(
    changes: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never anything but AdapterError; and what passes here passes the library, equally."""
    from safetensors.numpy import load, save

    data = bytearray(save({"a.lora_A": np.ones((2, 3), "f4"), "b": np.zeros(4, "f2")}))
    for position, value in changes:
        data[position % len(data)] = value
    if cut < len(data) // 2:
        data = data[: len(data) - cut]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
        scan_finite(path, header)
    except AdapterError:
        return
    theirs = load(bytes(data))
    assert {n: i.shape for n, i in header.tensors.items()} == {
        n: a.shape for n, a in theirs.items()
    }


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=60), body=st.binary(max_size=16))
@example(raw=b"}", body=b"")
def test_random_headers_never_crash(
    raw: bytes, body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(joined(b"{" + raw, body))
    try:
        header = read_header(path)
    except AdapterError:
        return
    assert not header.tensors, "sixty bytes of noise hold no tensor; `{}` is a file of none"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(dtype=json_values, shape=json_values, offsets=json_values, metadata=json_values)
def test_any_json_in_an_entry_never_crashes(
    dtype: Any, shape: Any, offsets: Any, metadata: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "entry.safetensors"
    bad = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    path.write_bytes(joined({"a": bad, "__metadata__": metadata}, b"1234"))
    with pytest.raises(AdapterRefused):
        read_header(path)


PAIR = {"a": entry(0, 8), "b": entry(8, 16)}
BODY = bytes(16)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header_truncated"),
    "seven bytes": (b"1234567", "header_truncated"),
    "header beyond the end": (struct.pack("<Q", 2**62) + b"{}", "header_truncated"),
    "pickle": (pickle.dumps({"weights": [1, 2, 3]}), "weights_pickle"),
    "zipped pickle": (b"PK\x03\x04" + bytes(60), "weights_pickle"),
    "not JSON": (joined(b"{no json", BODY), "header_invalid"),
    "a list": (joined([1, 2], BODY), "header_invalid"),
    "leading space": (joined(b" {}", b""), "header_invalid"),
    "nested without end": (joined(b'{"a":' * 100_000, BODY), "header_invalid"),
    "a name twice": (
        joined(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), BODY),
        "header_invalid",
    ),
    "an empty name": (joined({"": entry(0, 16)}, BODY), "header_invalid"),
    "an endless name": (joined({"n" * 600: entry(0, 16)}, BODY), "header_invalid"),
    "entry a list": (joined({"a": [1]}, BODY), "header_invalid"),
    "entry with more": (joined({"a": {**entry(0, 16), "x": 1}}, BODY), "header_invalid"),
    "entry without dtype": (joined({"a": {"shape": [4]}}, BODY), "header_invalid"),
    "metadata a list": (joined({"__metadata__": [1], **PAIR}, BODY), "header_invalid"),
    "metadata of numbers": (joined({"__metadata__": {"a": 1}, **PAIR}, BODY), "header_invalid"),
    "unknown dtype": (joined({"a": entry(0, 16, "F13")}, BODY), "dtype_unknown"),
    "shape negative": (joined({"a": entry(0, 16, shape=[-4])}, BODY), "shape_invalid"),
    "shape of floats": (joined({"a": entry(0, 16, shape=[4.0])}, BODY), "shape_invalid"),
    "shape of truths": (joined({"a": entry(0, 4, shape=[True])}, BODY), "shape_invalid"),
    "shape deep": (joined({"a": entry(0, 16, shape=[1] * 99)}, BODY), "shape_invalid"),
    "shape overflows": (joined({"a": entry(0, 16, shape=[2**62] * 8)}, BODY), "size_mismatch"),
    "shape lies": (joined({"a": entry(0, 16, shape=[3])}, BODY), "size_mismatch"),
    "offsets negative": (joined({"a": entry(-4, 12, shape=[4])}, BODY), "offsets_invalid"),
    "offsets reversed": (joined({"a": entry(16, 0, shape=[4])}, BODY), "offsets_invalid"),
    "offsets alone": (
        joined({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, BODY),
        "offsets_invalid",
    ),
    "overlap": (joined({"a": entry(0, 12), "b": entry(8, 16)}, BODY), "offsets_overlap"),
    "the same bytes twice": (
        joined({"a": entry(0, 16), "b": entry(0, 16)}, BODY),
        "offsets_overlap",
    ),
    "hole": (joined({"a": entry(0, 4), "b": entry(8, 16)}, BODY), "offsets_hole"),
    "hole at the start": (joined({"a": entry(4, 16)}, BODY), "offsets_hole"),
    "cut off": (joined(PAIR, BODY)[:-1], "file_truncated"),
    "more behind": (joined(PAIR, BODY) + b"x", "trailing_bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(kind: str, tmp_path: Path) -> None:
    data, code = BROKEN[kind]
    assert refused(data, tmp_path) == [code]


def test_limits(tmp_path: Path) -> None:
    data = joined(PAIR, BODY)
    assert refused(data, tmp_path, Limits(max_header_bytes=20)) == ["header_too_large"]
    assert refused(data, tmp_path, Limits(max_tensors=1)) == ["too_many_tensors"]
    assert set(read(data, tmp_path).tensors) == {"a", "b"}


def test_every_bad_entry_is_told(tmp_path: Path) -> None:
    header = {"a": entry(0, 16, "F13"), "b": entry(0, 16, shape=[-1]), "c": entry(0, 16)}
    assert refused(joined(header, BODY), tmp_path) == ["dtype_unknown", "shape_invalid"]


def test_a_thousand_problems_are_told_as_a_hundred(tmp_path: Path) -> None:
    codes = refused(joined({str(i): entry(0, 4, "F13") for i in range(1000)}, BODY), tmp_path)
    assert len(codes) == 101
    assert codes[-1] == "more_problems"


@pytest.mark.parametrize("size", [0x180, 0x280, 0x580])
def test_a_header_length_that_looks_like_a_pickle(size: int, tmp_path: Path) -> None:
    """384 is 80 01 in little endian, which is also how a pickle begins."""
    raw = json.dumps(PAIR).encode()
    assert list(read(joined(raw + b" " * (size - len(raw)), BODY), tmp_path).tensors) == ["a", "b"]


def test_padding_and_order_do_not_matter(tmp_path: Path) -> None:
    raw = json.dumps({"b": entry(8, 16), "a": entry(0, 8)}).encode() + b"   "
    assert list(read(joined(raw, BODY), tmp_path).tensors) == ["a", "b"]


NANS = {
    "F32": b"\0\0\xc0\x7f",
    "F16": b"\0\x7e",
    "BF16": b"\xc0\xff",
    "F64": b"\0" * 6 + b"\xf8\x7f",
}
INFS = {
    "F32": b"\0\0\x80\xff",
    "F16": b"\0\x7c",
    "BF16": b"\x80\x7f",
    "F64": b"\0" * 6 + b"\xf0\x7f",
}


@pytest.mark.parametrize("dtype", NANS)
@pytest.mark.parametrize("bad", [NANS, INFS], ids=["nan", "infinity"])
@pytest.mark.parametrize("position", [0, 7, 600_000])
def test_scan_finds_the_one_bad_number(
    dtype: str, bad: dict[str, bytes], position: int, tmp_path: Path
) -> None:
    """The last position lies beyond the first chunk."""
    item = len(bad[dtype])
    body = bytearray(item * 600_001)
    header = {"a": entry(0, len(body), dtype, [600_001])}
    clean = read(joined(header, bytes(body)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert scan_finite(path, clean)["a"].first_nonfinite is None
    body[position * item : (position + 1) * item] = bad[dtype]
    assert (
        scan_finite(path, read(joined(header, bytes(body)), tmp_path))["a"].first_nonfinite
        == position
    )


@pytest.mark.parametrize("dtype", NANS)
def test_scan_tells_zeros_and_the_largest_finite_number_apart(dtype: str, tmp_path: Path) -> None:
    item = len(NANS[dtype])
    largest = {"F32": b"\xff\xff\x7f\x7f", "F16": b"\xff\x7b", "BF16": b"\x7f\x7f"}
    number = largest.get(dtype, b"\xff" * 6 + b"\xef\x7f")
    minus_zero = b"\0" * (item - 1) + b"\x80"
    header = {"z": entry(0, item, dtype, [1]), "m": entry(item, 2 * item, dtype, [1])}
    found = read(joined(header, minus_zero + number), tmp_path)
    scans = scan_finite(tmp_path / "adapter_model.safetensors", found)
    assert (scans["z"].all_zero, scans["z"].first_nonfinite) == (True, None)
    assert (scans["m"].all_zero, scans["m"].first_nonfinite) == (False, None)


def test_a_file_that_shrinks_meanwhile_is_told(
    tmp_path: Path, safetensors_bytes: Callable[..., bytes]
) -> None:
    header = read(safetensors_bytes({"a": np.ones(100, "f4")}), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(AdapterError, match="ends inside a"):
        scan_finite(path, header)

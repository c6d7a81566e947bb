"""Archives from strangers: honest ones of every kind unpack, no other leaves a byte."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.archive import unpack
from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.adapters.limits import MIB, Limits
from loraplex.adapters.store import AdapterStore

CONFIG = ("adapter_config.json", b'{"r": 8}')
WEIGHTS = ("adapter_model.safetensors", bytes(range(256)) * 40)
Member = tuple[str, bytes]


def zipped(*members: Member, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def tarred(*members: Member | tarfile.TarInfo, mode: str = "w:gz", **how: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **how) as archive:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            info.mtime = 1.5  # makes the pax format write an extended header
            archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def try_unpack(data: bytes, folder: Path, limits: Limits | None = None) -> dict[str, bytes]:
    """What lands in staging. Also: nothing lands anywhere else, and staging vanishes."""
    store = AdapterStore(folder / "store")
    source = folder / "upload"
    source.write_bytes(data)
    try:
        with store.staging() as staging:
            unpack(source, staging, limits)
            return {p.name: p.read_bytes() for p in staging.path.iterdir()}
    finally:
        left = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
        assert left == [source]


def refused(data: bytes, folder: Path, limits: Limits | None = None) -> str:
    with pytest.raises(AdapterRefused) as error:
        try_unpack(data, folder, limits)
    (problem,) = error.value.problems
    assert len(problem.message) < 500
    return problem.code


README = ("README.md", b"# hello")
HONEST: dict[str, bytes] = {
    "zip": zipped(CONFIG, WEIGHTS),
    "zip, stored": zipped(WEIGHTS, CONFIG, method=zipfile.ZIP_STORED),
    "zip, in a folder": zipped(
        ("my/README.md", b"x"), ("my/" + CONFIG[0], CONFIG[1]), ("my/" + WEIGHTS[0], WEIGHTS[1])
    ),
    "zip, with macOS shadows": zipped(CONFIG, WEIGHTS, ("__MACOSX/._adapter_config.json", b"junk")),
    "zip, windows slashes": zipped(
        ("a\\" + CONFIG[0], CONFIG[1]), ("a\\" + WEIGHTS[0], WEIGHTS[1])
    ),
    "tar": tarred(CONFIG, WEIGHTS, mode="w"),
    "tar.gz": tarred(README, CONFIG, ("training_args.bin", b"pickle"), WEIGHTS),
    "tar.gz, ./": tarred(
        special(".", tarfile.DIRTYPE),
        ("./" + CONFIG[0], CONFIG[1]),
        ("./" + WEIGHTS[0], WEIGHTS[1]),
    ),
    "tar.gz, ustar": tarred(CONFIG, WEIGHTS, format=tarfile.USTAR_FORMAT),
    "tar.gz, gnu, long names": tarred(
        ("d" * 150 + "/x", b"x"), CONFIG, WEIGHTS, format=tarfile.GNU_FORMAT
    ),
    "tar.gz, pax, long names": tarred(
        ("ä" * 150, b"x"), CONFIG, WEIGHTS, format=tarfile.PAX_FORMAT
    ),
    "tar, v7 header": tarred(CONFIG, WEIGHTS, mode="w", format=tarfile.USTAR_FORMAT),
    "pickle beside safetensors": zipped(CONFIG, WEIGHTS, ("adapter_model.bin", b"x")),
    "optimizer beside it": tarred(CONFIG, ("optimizer.pt", bytes(3 * MIB)), WEIGHTS),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest(kind: str, tmp_path: Path) -> None:
    assert try_unpack(HONEST[kind], tmp_path) == dict([CONFIG, WEIGHTS])


def encrypted() -> bytes:
    data = bytearray(zipped(CONFIG, WEIGHTS))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 1)
    return bytes(data)


def zip_link() -> bytes:
    info = zipfile.ZipInfo("adapter_config.json")
    info.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def corrupt_zip() -> bytes:
    data = bytearray(zipped(CONFIG, WEIGHTS, method=zipfile.ZIP_STORED))
    data[data.find(WEIGHTS[1]) + 100] ^= 1
    return bytes(data)


def pax_bomb(size: int) -> bytes:
    """An extended header that claims to be huge: a reader that trusts it takes as much memory."""
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, size
    return gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(min(size, 40 * MIB)), 9)


def sparse() -> bytes:
    info = special("adapter_config.json", tarfile.GNUTYPE_SPARSE)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"00000000000\0", b"00000000000\0"
    block[483:495] = b"77777777777\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return gzip.compress(bytes(block) + bytes(1024))


def bigger(name: str, size: int, pack: Callable[..., bytes]) -> bytes:
    return pack(CONFIG, (name, bytes(size)))


def zip_directory(entries: int) -> bytes:
    """A zip whose list of members claims to be enormous."""
    data = bytearray(zipped(CONFIG, WEIGHTS))
    at = data.rfind(b"PK\x05\x06")
    data[at + 12 : at + 16] = struct.pack("<L", entries * 46)
    return bytes(data)


def zip64() -> bytes:
    data = zipped(CONFIG, WEIGHTS)
    at = data.rfind(b"PK\x05\x06")
    return data[:at] + b"PK\x06\x07" + bytes(16) + data[at:]


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip slip": (
        lambda: zipped(("../../adapter_config.json", b"x"), WEIGHTS),
        "archive_unsafe_path",
    ),
    "zip slip, windows": (
        lambda: zipped(("..\\..\\adapter_config.json", b"x"), WEIGHTS),
        "archive_unsafe_path",
    ),
    "drive letter": (
        lambda: zipped(("C:\\adapter_config.json", b"x"), WEIGHTS),
        "archive_unsafe_path",
    ),
    "absolute path": (
        lambda: tarred(("/etc/adapter_config.json", b"x"), WEIGHTS),
        "archive_unsafe_path",
    ),
    "unsafe neighbour": (
        lambda: tarred(CONFIG, WEIGHTS, ("a/../../x", b"x")),
        "archive_unsafe_path",
    ),
    "endless name": (lambda: tarred(CONFIG, WEIGHTS, ("n" * 5000, b"x")), "archive_unsafe_path"),
    "symbolic link": (
        lambda: tarred(special(CONFIG[0], tarfile.SYMTYPE, "/etc/passwd")),
        "archive_special_file",
    ),
    "symbolic link, zip": (zip_link, "archive_special_file"),
    "hard link": (
        lambda: tarred(special(CONFIG[0], tarfile.LNKTYPE, "/etc/passwd")),
        "archive_special_file",
    ),
    "link to a folder": (
        lambda: tarred(special("d", tarfile.SYMTYPE, "/etc"), CONFIG),
        "archive_special_file",
    ),
    "device": (lambda: tarred(special(CONFIG[0], tarfile.CHRTYPE)), "archive_special_file"),
    "fifo": (lambda: tarred(special(CONFIG[0], tarfile.FIFOTYPE)), "archive_special_file"),
    "sparse": (sparse, "archive_special_file"),
    "two configs": (
        lambda: zipped(("a/adapter_config.json", b"x"), ("b/adapter_config.json", b"y"), WEIGHTS),
        "archive_ambiguous",
    ),
    "checkpoints beside it": (
        lambda: tarred(CONFIG, WEIGHTS, ("checkpoint-5/adapter_config.json", b"x")),
        "archive_ambiguous",
    ),
    "two folders": (
        lambda: zipped(("a/adapter_config.json", b"x"), ("b/" + WEIGHTS[0], b"y")),
        "archive_ambiguous",
    ),
    "encrypted": (encrypted, "archive_encrypted"),
    "no config": (lambda: zipped(WEIGHTS), "archive_incomplete"),
    "no weights": (lambda: tarred(CONFIG), "archive_incomplete"),
    "empty zip": (lambda: zipped(), "archive_incomplete"),
    "pickle": (lambda: zipped(CONFIG, ("adapter_model.bin", b"x")), "weights_pickle"),
    "torch.save": (
        lambda: zipped(("archive/data.pkl", b"x"), ("archive/version", b"3")),
        "weights_pickle",
    ),
    "bare pickle": (lambda: pickle.dumps([1]), "weights_pickle"),
    "bare safetensors": (lambda: struct.pack("<Q", 2) + b"{}", "archive_format"),
    "bzip2 inside": (lambda: zipped(CONFIG, WEIGHTS, method=zipfile.ZIP_BZIP2), "archive_format"),
    "xz": (lambda: tarred(CONFIG, WEIGHTS, mode="w:xz"), "archive_format"),
    "text": (lambda: b"hello there, this is no archive", "archive_format"),
    "nothing": (lambda: b"", "archive_format"),
    "gzip of text": (lambda: gzip.compress(b"hello there"), "archive_broken"),
    "zip cut off": (lambda: zipped(CONFIG, WEIGHTS)[:-30], "archive_broken"),
    "zip corrupt": (corrupt_zip, "archive_broken"),
    "tar.gz cut off": (lambda: tarred(CONFIG, WEIGHTS)[:-40], "archive_broken"),
    "tar cut off": (
        lambda: tarred(CONFIG, WEIGHTS, mode="w", format=tarfile.USTAR_FORMAT)[:2000],
        "archive_broken",
    ),
    "huge extended header": (lambda: pax_bomb(32 * MIB), "archive_broken"),
    "huge list of members": (lambda: zip_directory(10**7), "archive_too_many_members"),
    "zip64": (zip64, "archive_too_many_members"),
    "config too large": (
        lambda: bigger("x/adapter_config.json", 2 * MIB, lambda _, c: zipped(c)),
        "file_too_large",
    ),
    "zip bomb": (lambda: bigger(WEIGHTS[0], 70 * MIB, zipped), "archive_bomb"),
    "tar bomb": (lambda: bigger(WEIGHTS[0], 70 * MIB, tarred), "archive_bomb"),
    "bomb in a neighbour": (lambda: bigger("junk", 70 * MIB, tarred), "archive_bomb"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(kind: str, tmp_path: Path) -> None:
    make, code = BROKEN[kind]
    assert refused(make(), tmp_path) == code


@pytest.mark.parametrize("kind", ["zip bomb", "tar bomb", "huge extended header"])
def test_a_bomb_takes_no_memory(kind: str, tmp_path: Path) -> None:
    make, code = BROKEN[kind]
    data = make()
    tracemalloc.start()
    assert refused(data, tmp_path) == code
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_limits_of_the_caller(tmp_path: Path) -> None:
    data = zipped(CONFIG, WEIGHTS, *((f"{i}.txt", b"") for i in range(9)))
    assert refused(data, tmp_path, Limits(max_archive_members=10)) == "archive_too_many_members"
    assert refused(data, tmp_path, Limits(max_weights_bytes=1000)) == "file_too_large"
    assert try_unpack(data, tmp_path, Limits(max_archive_members=11))


edits = st.tuples(st.integers(0, 30_000), st.integers(0, 255))


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["zip", "tar", "tar.gz", "tar.gz, pax, long names"]),
    changes=st.lists(
        st.tuples(st.integers(0, 30_000), st.integers(0, 255)), min_size=1, max_size=5
    ),
    cut=st.integers(0, 3000),
)
def test_mutated_archives_never_crash(
    kind: str,
    changes: list[tuple[int, int]],
    cut: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = bytearray(HONEST[kind])
    for position, value in changes:
        data[position % len(data)] = value
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    try:
        assert set(try_unpack(bytes(data[: len(data) - cut]), folder)) == {CONFIG[0], WEIGHTS[0]}
    except AdapterError:
        pass

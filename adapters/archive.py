"""Take the files of an adapter out of a zip, tar or tar.gz that a stranger made: its two, and those
beside them that say how it wants to be used.

Nothing is ever written under a name from the archive: the wanted files go to their fixed
names in the staging folder, everything else is read past. Bytes are counted as they are unpacked,
so that a bomb is noticed after 64 MiB, not after it has filled the disk. Whatever could mean
mischief (paths that leave the folder, links, devices) refuses the archive as a whole.
"""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from loraplex.adapters.errors import AdapterRefused, Problem
from loraplex.adapters.limits import MIB, Limits
from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.store import Staging

_CHUNK_BYTES = 1 * MIB
_FREE_BYTES = (
    64 * MIB
)  # unpacked before the ratio is looked at: a small file may well be very regular
_MAX_DIRECTORY_BYTES = 16 * MIB  # of a zip's list of members
_MAX_NAME = 1024

# Wanted if they lie beside the weights, with their limits: how an adapter wants to be used.
USE_FILES = {
    "generation_config.json": 1 * MIB,
    "chat_template.jinja": 1 * MIB,
    "tokenizer_config.json": 16 * MIB,
}
_MAX_USE_FILES = 16

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_RESAVE = "save the adapter with save_pretrained(..., safe_serialization=True)"
_OTHERS = {
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\xfd7zX": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def unpack(archive: Path, staging: Staging, limits: Limits | None = None) -> None:
    """Write the archive's `adapter_config.json` and `adapter_model.safetensors` into staging.

    They may lie in one folder inside the archive; so do the `USE_FILES`, which need not be there.
    Left alone: the archive itself.

    Raises: AdapterRefused saying what is wrong with the archive; StorageFull.
    """
    limits = limits or Limits()
    with archive.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        magic = file.read(512)
        file.seek(0)
        wanted = _Wanted(staging, limits)
        if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            _unpack_zip(file, size, wanted, limits)
        elif magic[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as plain:
                _unpack_tar(_Meter(plain, size, limits), wanted)
        elif magic[257:262] == b"ustar" or _is_old_tar(magic):
            _unpack_tar(_Meter(file, size, limits), wanted)
        else:
            _refuse_format(magic)
    wanted.finish()


class _Wanted:
    """Picks the files out of the members, and refuses members no honest archive has."""

    def __init__(self, staging: Staging, limits: Limits) -> None:
        self._staging = staging
        self._sizes = {CONFIG_FILE: limits.max_config_bytes, WEIGHTS_FILE: limits.max_weights_bytes}
        self._max_members = limits.max_archive_members
        self._members = 0
        self._found: dict[str, PurePosixPath] = {}
        self._use_files: dict[str, PurePosixPath] = {}  # by staged name, wherever they lie
        self._pickle = ""

    def consider(self, name: str, *, regular: bool, folder: bool) -> str | None:
        """The file name to extract a member to, None to pass it over."""
        self._members += 1
        if self._members > self._max_members:
            _refuse("archive_too_many_members", f"more than {self._max_members} members")
        path = PurePosixPath(name.replace("\\", "/"))
        if (
            path.is_absolute()
            or ".." in path.parts
            or (path.parts[:1] and path.parts[0][1:2] == ":")
        ):
            _refuse("archive_unsafe_path", f"{_short(name)} leaves the folder")
        if len(name) > _MAX_NAME or "\0" in name:
            _refuse("archive_unsafe_path", f"{_short(name)} is no reasonable name")
        if folder:
            return None
        if not regular:
            _refuse(
                "archive_special_file",
                f"{_short(name)} is a link or device; pack plain files (tar -h follows links)",
            )
        if path.name in _PICKLES:
            self._pickle = path.name
        if path.name in USE_FILES and len(self._use_files) < _MAX_USE_FILES:
            staged = f"{len(self._use_files)}.{path.name}"
            self._use_files[staged] = path
            return staged
        if path.name not in self._sizes:
            return None
        if path.name in self._found:
            both = f"{self._found[path.name]} and {path}"
            _refuse("archive_ambiguous", f"two files named {path.name}: {_short(both)}")
        self._found[path.name] = path
        return path.name

    def extract(self, name: str, read: Callable[[int], bytes]) -> None:
        limit = self._sizes.get(name) or USE_FILES[self._use_files[name].name]
        with self._staging.writer(name, limit) as out:
            while True:
                with _decoding():
                    chunk = read(_CHUNK_BYTES)
                if not chunk:
                    return
                out.write(chunk)

    def finish(self) -> None:
        if WEIGHTS_FILE not in self._found and self._pickle:
            _refuse("weights_pickle", f"{self._pickle} is a pickle, which can run code; {_RESAVE}")
        missing = [name for name in self._sizes if name not in self._found]
        if missing:
            _refuse("archive_incomplete", f"{' and '.join(missing)} not in the archive")
        if len({path.parent for path in self._found.values()}) > 1:
            paths = " and ".join(str(path) for path in self._found.values())
            _refuse("archive_ambiguous", f"the two files lie in different folders: {_short(paths)}")
        for staged, path in self._use_files.items():
            target = self._staging.path / path.name
            if path.parent != self._found[WEIGHTS_FILE].parent:
                continue
            if target.exists():
                _refuse("archive_ambiguous", f"two files named {path.name}")
            (self._staging.path / staged).rename(target)


def _unpack_zip(file: IO[bytes], size: int, wanted: _Wanted, limits: Limits) -> None:
    _check_zip_directory(file, size)
    with _decoding():
        zipped = zipfile.ZipFile(file)
    with zipped:
        if any(PurePosixPath(i.filename).name == "data.pkl" for i in zipped.infolist()):
            _refuse("weights_pickle", f"this is a file of torch.save, a pickle; {_RESAVE}")
        for info in zipped.infolist():
            mode = info.external_attr >> 16
            name = wanted.consider(
                info.filename,
                regular=stat.S_IFMT(mode) in (0, stat.S_IFREG),
                folder=info.is_dir(),
            )
            if name is None:
                continue
            if info.flag_bits & 1:
                _refuse("archive_encrypted", f"{_short(info.filename)} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                _refuse("archive_format", f"{_short(info.filename)}: use deflate or no compression")
            with _decoding():
                member = zipped.open(info)
            with member:
                wanted.extract(name, _Meter(member, size, limits).read)


def _check_zip_directory(file: IO[bytes], size: int) -> None:
    """Look at the list of members before zipfile reads all of it into memory."""
    start = max(0, size - 65_557)  # the end record and the longest comment
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        _refuse("archive_broken", "the zip has no end: it is cut off, upload it again")
    (directory_bytes,) = struct.unpack_from("<L", tail, at + 12)
    if tail[max(0, at - 20) : at][:4] == b"PK\x06\x07" or directory_bytes > _MAX_DIRECTORY_BYTES:
        _refuse("archive_too_many_members", "the zip's list of members is too large; use tar.gz")


def _unpack_tar(file: _Meter, wanted: _Wanted) -> None:
    with _decoding():
        tar = tarfile.open(fileobj=file, mode="r:")
    with tar:
        while True:
            with _decoding():
                member = tar.next()
            if member is None:
                return
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            regular = member.isreg() and not member.issparse()
            name = wanted.consider(member.name, regular=regular, folder=member.isdir())
            if name is not None:
                with _decoding():
                    data = tar.extractfile(member)
                assert data is not None, "a regular member has data"
                wanted.extract(name, data.read)


class _Meter(io.RawIOBase):
    """Counts what a decompressor yields, and stops it when that is out of all proportion."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, packed_bytes: int, limits: Limits) -> None:
        self._file = file
        self._limit = max(_FREE_BYTES, packed_bytes * limits.max_archive_ratio)
        self._ratio = limits.max_archive_ratio
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        # tarfile asks for a whole extended header at once, whose size the archive chooses.
        if not 0 <= size <= _CHUNK_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self._file.read(size)
        self._position += len(data)
        if self._position > self._limit:
            _refuse("archive_bomb", f"it unpacks to more than {self._ratio} times its size")
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        """Forward only, which is all that reading a tar from front to back needs."""
        if whence != io.SEEK_SET or position < self._position:
            raise tarfile.ReadError("an offset that points backwards")
        while self._position < position:
            if not self.read(min(_CHUNK_BYTES, position - self._position)):
                break
        return self._position


@contextmanager
def _decoding() -> Iterator[None]:
    """Any way in which the standard library finds that an archive is broken, as one refusal."""
    try:
        yield
    except AdapterRefused:
        raise
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,  # gzip.BadGzipFile, negative seeks
        ValueError,
        OverflowError,
        RuntimeError,  # RecursionError: endless chains of extended headers
        NotImplementedError,
        struct.error,
    ) as error:
        _refuse("archive_broken", f"it cannot be read, it may be cut off: {_short(str(error))}")


def _is_old_tar(magic: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(magic, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _refuse_format(magic: bytes) -> NoReturn:
    if magic[8:9] == b"{":
        _refuse("archive_format", "this is a bare safetensors file; upload it with its config")
    if magic[:1] == b"\x80" and magic[1:2] <= b"\x05":
        _refuse("weights_pickle", f"this is a pickle, which can run code; {_RESAVE}")
    kind = next((name for start, name in _OTHERS.items() if magic.startswith(start)), "this")
    _refuse("archive_format", f"{kind} is not supported; upload a zip, tar or tar.gz")


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")


def _refuse(code: str, message: str) -> NoReturn:
    raise AdapterRefused([Problem(code, f"archive: {message}")])

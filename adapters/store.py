"""Adapter files on disk, by content: `root/<first two>/<digest>/` has two files and a manifest.

An adapter is wholly there or not at all. It is built in `root/.staging/<random>/`, made durable,
and moved into place by one rename; it is removed by one rename into `root/.trash/`. A crash at
any point leaves the old or the new state plus at most a left-over folder, which `sweep` clears at
the next start. Several processes may share a root.

Knows nothing of names, versions or owners: that is the registry's. A digest that two owners share
is stored once, so the registry removes it only when nobody refers to it any more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from loraplex.adapters.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterRefused,
    Problem,
    StorageFull,
)
from loraplex.adapters.manifest import (
    MANIFEST_FILE,
    AdapterManifest,
    FileStamp,
)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StagedFile:
    """A file that is hashed and bounded as its bytes arrive; `commit` makes it durable."""

    def __init__(self, path: Path, limit: int, stamps: dict[str, FileStamp]) -> None:
        with _room():
            self._file: BinaryIO = path.open("xb")
        self._sha = hashlib.sha256()
        self._stamps = stamps
        self.name = path.name
        self.limit = limit
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Raises: AdapterRefused past the limit; StorageFull."""
        self.size_bytes += len(data)
        if self.size_bytes > self.limit:
            message = f"{self.name} exceeds the limit of {self.limit} bytes"
            raise AdapterRefused([Problem("file_too_large", message, file=self.name)])
        self._sha.update(data)
        with _room():
            self._file.write(data)

    def close(self) -> None:
        with _room():
            self._file.close()
        self._stamps[self.name] = FileStamp(self.size_bytes, self._sha.hexdigest())

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # the staging folder goes; what the buffer still holds may not fit the disk
            with suppress(OSError):
                self._file.close()


class Staging:
    """A folder of one upload under way. It vanishes with its `with` block unless committed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamps: dict[str, FileStamp] = {}  # what arrived, of every file written

    def writer(self, name: str, limit: int) -> StagedFile:
        """A new file in the folder. name: ours, never the client's."""
        assert Path(name).name == name, f"{name!r} is no plain file name"
        return StagedFile(self.path / name, limit, self.stamps)


class AdapterStore:
    """The store under `root`. All methods block on the disk; all are safe from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / ".staging"
        self._trash = root / ".trash"
        for folder in (root, self._staging, self._trash):
            folder.mkdir(parents=True, exist_ok=True)

    # --- reading ----------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where an adapter's folder is or would be. digest: hex, without `sha256:`.

        Raises: AdapterNotFound if it is no digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise AdapterNotFound(f"{digest[:80]!r} is no adapter digest")
        return self.root / digest[:2] / digest

    def exists(self, digest: str) -> bool:
        return (self.path(digest) / MANIFEST_FILE).is_file()

    def manifest(self, digest: str) -> AdapterManifest:
        """Raises: AdapterNotFound, AdapterCorrupt."""
        try:
            raw = (self.path(digest) / MANIFEST_FILE).read_bytes()
        except FileNotFoundError:
            raise AdapterNotFound(f"adapter {digest[:12]} is not in the store") from None
        except OSError as error:
            raise AdapterCorrupt(
                f"the manifest of adapter {digest[:12]} cannot be read: {error.strerror}"
            ) from None
        manifest = AdapterManifest.from_json(raw)
        if manifest.digest != digest:
            raise AdapterCorrupt(f"the folder of {digest[:12]} holds {manifest.digest[:12]}")
        return manifest

    def digests(self) -> Iterator[str]:
        """Every adapter that is there."""
        for shard in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            yield from sorted(p.name for p in shard.iterdir() if _DIGEST.fullmatch(p.name))

    def disk_bytes(self, digest: str) -> int:
        """Size of an adapter's files; 0 if it is not there."""
        return _folder_bytes(self.path(digest))

    def verify(self, digest: str) -> AdapterManifest:
        """Read every byte and compare it with the manifest.

        Raises: AdapterNotFound, AdapterCorrupt.
        """
        manifest = self.manifest(digest)
        for name, stamp in manifest.files.items():
            try:
                with (self.path(digest) / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise AdapterCorrupt(f"{name} of {digest[:12]}: {error.strerror}") from None
            if found != stamp.sha256:
                raise AdapterCorrupt(f"{name} of {digest[:12]} has changed since it was stored")
        return manifest

    # --- writing ----------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """A folder of one's own to build an adapter in; gone afterwards whatever happens."""
        folder = self._staging / uuid.uuid4().hex
        with self._locked(), _room():
            folder.mkdir()
            mine = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            # Held until the upload ends or its process dies: so a sweep can tell the two apart.
            fcntl.flock(mine, fcntl.LOCK_EX)
        try:
            yield Staging(folder)
        finally:
            os.close(mine)
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, staging: Staging, manifest: AdapterManifest) -> Path:
        """Make a staged adapter part of the store.

        The same content twice is stored once; a stored copy that has been damaged is replaced.

        Returns its folder. From then on the adapter survives a power cut.

        Raises: StorageFull; AdapterCorrupt if the manifest describes other bytes than arrived.
        """
        for name, stamp in manifest.files.items():
            if staging.stamps.get(name, stamp) != stamp:
                raise AdapterCorrupt(f"{name} changed between its arrival and its validation")
        for leftover in set(os.listdir(staging.path)) - set(manifest.files):
            (staging.path / leftover).unlink()
        raw = manifest.to_json()
        with staging.writer(MANIFEST_FILE, len(raw)) as file:
            file.write(raw)
        target = self.path(manifest.digest)
        damaged = target.exists() and not self._is_whole(target)
        with _room():
            for name in (*manifest.files, MANIFEST_FILE, "."):
                _sync(staging.path / name)
        with _room(), self._locked():
            target.parent.mkdir(exist_ok=True)
            _sync(self.root)
            grave = self._discard(target) if damaged and target.exists() else None
            if not target.exists():
                os.rename(staging.path, target)
            _sync(target.parent)
        if grave:
            shutil.rmtree(grave, ignore_errors=True)
        return target

    def remove(self, digest: str) -> int:
        """Take an adapter out; returns the bytes freed, 0 if it was not there.

        Whoever has its files open keeps them.
        """
        target = self.path(digest)
        with self._locked():
            if not target.exists():
                return 0
            freed = _folder_bytes(target)
            grave = self._discard(target)
        shutil.rmtree(grave, ignore_errors=True)  # what stays, the next sweep takes
        return freed

    def sweep(self) -> int:
        """Clear what crashes left; returns the bytes freed. Uploads under way are left alone."""
        freed = 0
        with self._locked():
            graves = [*self._trash.iterdir()]
            graves += [folder for folder in self._staging.iterdir() if not _is_held(folder)]
            for grave in graves:
                freed += _folder_bytes(grave)
                if grave.is_dir():
                    shutil.rmtree(grave, ignore_errors=True)
                else:
                    grave.unlink(missing_ok=True)
        return freed

    def _discard(self, target: Path) -> Path:
        grave = self._trash / uuid.uuid4().hex
        os.rename(target, grave)
        _sync(target.parent)
        return grave

    def _is_whole(self, folder: Path) -> bool:
        try:
            self.verify(folder.name)
        except (AdapterNotFound, AdapterCorrupt):
            return False
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread of one process at a time. Short: copying and hashing happen outside."""
        lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


@contextmanager
def _room() -> Iterator[None]:
    """Name the one disk error that an operator must hear about."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = (
            "no room on the disk for adapters; free some, or delete adapters, and upload again"
        )
        raise StorageFull(message) from error


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_held(folder: Path) -> bool:
    """Whether an upload under way owns this staging folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _folder_bytes(folder: Path) -> int:
    with suppress(FileNotFoundError, NotADirectoryError):
        return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
    return 0

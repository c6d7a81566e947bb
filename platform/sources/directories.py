"""Adapters in a directory of the server: an archive or a folder with the two files, under a root
that the operator named.

A path is resolved first, and must then still lie under the root; the resolved path is opened one
name at a time without following links, so that a link put there meanwhile opens nothing.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from loraplex.platform.errors import ApiError
from loraplex.platform.finishing import finished
from loraplex.platform.sources.origin import Opened

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
CHUNK_BYTES = 4 << 20


class DirectoryOrigin:
    """`path` under `root`. shown: what the source is called, the root's own path left out."""

    def __init__(self, root: Path, path: str, shown: str) -> None:
        self._root = root
        self._path = PurePosixPath(path)
        self.shown = shown
        self.packed = path.endswith(ARCHIVES)

    @asynccontextmanager
    async def open(self, name: str, offset: int, validator: str | None) -> AsyncIterator[Opened]:
        path = self._path if self.packed else self._path / name
        shown = self.shown if self.packed else f"{self.shown.rstrip('/')}/{name}"
        file = await asyncio.to_thread(open_below, self._root, path, shown)
        try:
            found = os.fstat(file.fileno())
            stamp = f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
            start = offset if stamp == validator else 0
            file.seek(start)
            yield Opened(_chunks(file), start, found.st_size, stamp)
        finally:
            file.close()


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := await finished(asyncio.to_thread(file.read, CHUNK_BYTES)):
        yield chunk


def check_relative(path: str) -> None:
    """Raises: ApiError(invalid_request) for a path that is absolute or climbs."""
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
        raise ApiError(
            "invalid_request",
            f"the path {path[:120]!r} leaves the directory; write a plain path below it",
            param="source",
        )


def open_below(root: Path, path: PurePosixPath, shown: str) -> BinaryIO:
    """A regular file under `root`, whatever links there are.

    Raises: ApiError(source_failed | source_not_allowed).
    """
    base = Path(os.path.realpath(root))
    try:
        target = Path(os.path.realpath(base / path, strict=True))
    except (FileNotFoundError, NotADirectoryError):
        raise ApiError("source_failed", f"there is no {shown}") from None
    except OSError as error:  # a loop of links, a folder that may not be entered
        raise ApiError("source_failed", f"{shown}: {error.strerror}") from None
    if not target.is_relative_to(base):
        raise ApiError("source_not_allowed", f"{shown} is a link out of its directory")
    try:
        handle = _open_unlinked(base, target.relative_to(base).parts)
    except OSError as error:
        raise ApiError("source_failed", f"{shown} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ApiError("source_failed", f"{shown} is no plain file")
    return os.fdopen(handle, "rb")


def _open_unlinked(base: Path, parts: tuple[str, ...]) -> int:
    *folders, last = parts or (".",)
    at = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        # O_NONBLOCK: a pipe must not hold us up until somebody writes to it
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)

"""Adapters in object storage, through fsspec: `s3://bucket/prefix` and whatever else is installed.

Whose credentials are used is the server's affair (environment, fsspec's own configuration), so
only prefixes that the operator allowed can be asked. fsspec and its file systems are optional.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from loraplex.platform.errors import ApiError
from loraplex.platform.sources.directories import ARCHIVES
from loraplex.platform.sources.origin import Broken, Opened

CHUNK_BYTES = 4 << 20
# What reaches the server's own files, or hosts past the checks of `HttpClient`.
FORBIDDEN = frozenset({"file", "local", "http", "https", "data", "hf", "dir"})

T = TypeVar("T")


class BucketOrigin:
    """An archive, or a prefix with the two files."""

    def __init__(self, url: str, threads: Executor) -> None:
        """threads: for the file system's calls, which may hang for as long as it pleases."""
        self._url = url
        self._threads = threads
        self.shown = url
        self.packed = url.endswith(ARCHIVES)

    @asynccontextmanager
    async def open(self, name: str, offset: int, validator: str | None) -> AsyncIterator[Opened]:
        url = self._url if self.packed else f"{self._url.rstrip('/')}/{name}"
        system, path = await self._asked(url, lambda: _file_system(url))
        info = await self._asked(url, lambda: system.info(path))
        total = info.get("size")
        stamp = str(info.get("ETag") or info.get("etag") or info.get("LastModified") or "")
        stamp = f"{total} {stamp}" if stamp else ""
        start = offset if stamp and stamp == validator else 0
        file = await self._asked(url, lambda: system.open(path, "rb", block_size=CHUNK_BYTES))
        try:
            if start:
                await self._asked(url, lambda: file.seek(start))
            yield Opened(self._chunks(url, file), start, total, stamp or None)
        finally:
            self._threads.submit(file.close)

    async def _chunks(self, url: str, file: Any) -> AsyncIterator[bytes]:
        while chunk := await self._asked(url, lambda: file.read(CHUNK_BYTES)):
            yield chunk

    async def _asked(self, url: str, ask: Callable[[], T]) -> T:
        """One call of a file system, its errors as ours. A cancelled one is left to its thread.

        What a file system raises is its own affair, so the message has only the kind of it.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        except ApiError:
            raise
        except FileNotFoundError:
            raise ApiError("source_failed", f"there is no {url}") from None
        except PermissionError:
            message = f"the server's credentials may not read {url}"
            raise ApiError("source_failed", message) from None
        except (ImportError, ValueError) as error:
            raise ApiError("source_failed", f"{url}: {type(error).__name__}") from None
        except Exception as error:
            raise Broken(f"{url}: {type(error).__name__}") from None


def _file_system(url: str) -> tuple[Any, str]:
    """(file system, path in it). Raises: ApiError(source_failed) naming the missing package."""
    protocol = url.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise ApiError(
            "source_failed",
            f"{protocol}:// needs the package fsspec on the server: pip install fsspec",
        ) from None
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise ApiError(
            "source_failed",
            f"{protocol}:// needs a package that the server does not have: {error}",
        ) from None
    except ValueError:
        raise ApiError("source_failed", f"fsspec knows no {protocol}://") from None


def check_bucket(url: str) -> None:
    """Raises: ValueError unless it is a bucket, with or without a prefix, of an object storage."""
    protocol, separator, path = url.partition("://")
    if not separator or not path.strip("/") or "::" in url or not protocol.isalnum():
        raise ValueError(f"{url!r} is not a bucket such as s3://bucket/prefix")
    if protocol in FORBIDDEN:
        raise ValueError(f"{url!r}: {protocol} is no object storage; see source_dirs, source_hosts")


def within(url: str, prefix: str) -> bool:
    """Whether a URL is `prefix` or below it, by whole names."""
    return url == prefix or url.startswith(prefix.rstrip("/") + "/")

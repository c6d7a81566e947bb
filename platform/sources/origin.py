"""What every kind of source offers: the bytes of a named file from an offset on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Opened:
    """A file that is about to be read.

    start: offset of the first byte that comes; 0 where the rest alone could not be had.
    total: bytes of the whole file, None if nobody said.
    validator: equal ones mean equal bytes; None where nothing vouches for that.
    """

    chunks: AsyncIterator[bytes]
    start: int
    total: int | None
    validator: str | None


class Broken(Exception):
    """It did not work this time and may the next. The message is for people: no secrets."""


class Stale(Broken):
    """The rest alone cannot be had: the whole file may."""


class Origin(Protocol):
    """One adapter somewhere."""

    @property
    def shown(self) -> str:
        """The source as anybody may see it: no credentials, no query string."""

    @property
    def packed(self) -> bool:
        """One archive, rather than the two files."""

    def open(
        self, name: str, offset: int, validator: str | None
    ) -> AbstractAsyncContextManager[Opened]:
        """Begin to read the file `name`, at `offset` if its validator is still this one.

        Raises: Broken; ApiError when trying again is no use.
        """

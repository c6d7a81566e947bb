"""Address space of the host, whose memory comes when it is first touched and goes when it is given
back. Linux: `MAP_NORESERVE` and `MADV_DONTNEED`, after which pages read as zeros.
"""

from __future__ import annotations

import mmap
import platform
import sys

import torch
from torch import Tensor

# Python's mmap does not name it. Elsewhere it has other numbers, and is only a promise to the
# system that most of it stays untouched.
_MAP_NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0


class HostAddressSpace:
    """Implements `traded_memory.AddressSpace`."""

    granule = mmap.PAGESIZE

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}  # by address

    def reserve(self, num_bytes: int) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        pages = mmap.mmap(-1, num_bytes, flags=flags)
        memory = torch.frombuffer(pages, dtype=torch.uint8)  # keeps `pages` alive
        self._maps[memory.data_ptr()] = pages
        return memory

    def commit(self, span: Tensor) -> None:
        """Nothing to do: a page is there when it is touched."""

    def release(self, span: Tensor) -> None:
        first = span.data_ptr()
        start = max(address for address in self._maps if address <= first)
        self._maps[start].madvise(mmap.MADV_DONTNEED, first - start, span.nbytes)


def host_address_space() -> HostAddressSpace | None:
    """None where the system cannot give memory back like this."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    return HostAddressSpace()

"""Host memory for adapter images, in frames of the device's size: allocated once, never fragmented.

On a CUDA machine the memory is pinned, so that copies to the device run beside the steps, and it is
pinned at start: pinning takes the driver's lock, which would hold up launches. An image that does
not fit (no host budget, say) gets plain memory of its own, freed with it.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


class HostArena:
    """Not thread-safe: the engine's thread takes and gives back; others may fill what was taken.

    num_bytes: the budget; whole frames of it are used.
    """

    def __init__(
        self, num_bytes: int, frame_elements: int, dtype: torch.dtype, *, pinned: bool
    ) -> None:
        self.frame_elements = frame_elements
        self.num_frames = num_bytes // (frame_elements * dtype.itemsize)
        # Not touched when unpinned, so it costs memory only where images come to lie.
        self._frames = torch.empty(
            (self.num_frames, frame_elements), dtype=dtype, pin_memory=pinned and num_bytes > 0
        )
        self._dtype = dtype
        self._free = list(range(self.num_frames))  # a heap: neighbours in an image mostly adjoin
        self._first = self._frames.data_ptr()
        self._frame_bytes = frame_elements * dtype.itemsize

    @property
    def num_free_frames(self) -> int:
        return len(self._free)

    def take(self, num_frames: int) -> list[Tensor]:
        """`num_frames` frames `[frame_elements]`, contents undefined."""
        if num_frames > len(self._free):
            return list(torch.empty((num_frames, self.frame_elements), dtype=self._dtype))
        return [self._frames[heapq.heappop(self._free)] for _ in range(num_frames)]

    def give_back(self, frames: list[Tensor]) -> None:
        for frame in frames:
            index = (frame.data_ptr() - self._first) // self._frame_bytes
            if 0 <= index < self.num_frames:
                heapq.heappush(self._free, index)

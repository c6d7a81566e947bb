"""Who holds which frames of adapter memory. Touches no memory itself. Standard library only.

A superblock is a run of frames, the unit in which adapters trade memory with the KV cache; without
trading there is one. Only frames of owned superblocks are given out, the lowest first, so that
whole superblocks at the end stay unused. An adapter's frames may lie anywhere.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable


class Frames:
    """Superblock s is the frames `s * frames_per_superblock` onwards; the first `num_owned` are
    owned in the beginning.
    """

    def __init__(self, num_superblocks: int, frames_per_superblock: int, num_owned: int) -> None:
        assert 1 <= num_owned <= num_superblocks, f"{num_owned} of {num_superblocks} owned"
        self.frames_per_superblock = frames_per_superblock
        self.superblocks = range(num_superblocks)
        self.owned = set(range(num_owned))
        self._free = list(range(num_owned * frames_per_superblock))  # a heap
        self._holders: list[Counter[str]] = [Counter() for _ in range(num_superblocks)]

    @property
    def num_owned(self) -> int:
        return len(self.owned) * self.frames_per_superblock

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, holder: str, num_frames: int) -> list[int]:
        """At most `num_free`."""
        frames = [heapq.heappop(self._free) for _ in range(num_frames)]
        for frame in frames:
            self._holders[frame // self.frames_per_superblock][holder] += 1
        return frames

    def give_back(self, holder: str, frames: Iterable[int]) -> None:
        for frame in frames:
            heapq.heappush(self._free, frame)
            holders = self._holders[frame // self.frames_per_superblock]
            holders[holder] -= 1
            if not holders[holder]:
                del holders[holder]

    def holders(self, superblock: int) -> list[str]:
        """Who has frames in it."""
        return list(self._holders[superblock])

    def add(self, superblock: int) -> None:
        assert superblock not in self.owned, f"superblock {superblock} is owned already"
        self.owned.add(superblock)
        for frame in self.frames_of(superblock):
            heapq.heappush(self._free, frame)

    def remove(self, superblock: int) -> None:
        """Nobody has frames in it."""
        holders = self.holders(superblock)
        assert not holders, f"superblock {superblock} is in use by {holders}"
        self.owned.remove(superblock)
        gone = self.frames_of(superblock)
        self._free = [frame for frame in self._free if frame not in gone]
        heapq.heapify(self._free)

    def frames_of(self, superblock: int) -> range:
        first = superblock * self.frames_per_superblock
        return range(first, first + self.frames_per_superblock)

    def check_invariants(self, held: dict[str, list[int]]) -> None:
        """Assert that every owned frame is free or in one of the lists of `held`."""
        owned = [frame for superblock in self.owned for frame in self.frames_of(superblock)]
        assert sorted([f for frames in held.values() for f in frames] + self._free) == sorted(owned)
        for superblock, holders in enumerate(self._holders):
            inside = self.frames_of(superblock)
            expected = {d: sum(f in inside for f in frames) for d, frames in held.items()}
            assert holders == Counter(expected), f"holders of superblock {superblock}"

"""The KV blocks that nobody holds, in the superblocks that the KV cache owns. Touches no memory.

A superblock is a run of neighbouring blocks, the unit in which the KV cache trades memory with the
adapters (`memory_exchange.py`); without trading there is one. An owned superblock is *open*, or
*closed*: its unused blocks are not handed out, so that it empties as its sequences end.

Everything is O(1) per block but O(log n) to pick the lowest free one. Filling the lowest first
leaves whole superblocks at the end unused.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator


class UnusedBlocks:
    """Superblock s is the blocks `s * blocks_per_superblock` onwards; the first `num_owned` are
    owned in the beginning.

    used: blocks that somebody holds, by superblock. kept_at: when a block of it was last given back
    with contents worth finding, by superblock, on `clock`; 0 = never.
    """

    def __init__(
        self,
        num_superblocks: int,
        blocks_per_superblock: int,
        num_owned: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert 1 <= num_owned <= num_superblocks, f"{num_owned} of {num_superblocks} owned"
        self.blocks_per_superblock = blocks_per_superblock
        self.owned = set(range(num_owned))
        self.closed: set[int] = set()  # of the owned
        self.used = [0] * num_superblocks
        self.kept_at = [0.0] * num_superblocks
        self.num_used = 0
        self._clock = clock
        self._free = [
            list(self.blocks_of(s)) if s < num_owned else [] for s in range(num_superblocks)
        ]  # a heap in each superblock
        self._num_free = num_owned * blocks_per_superblock  # in open ones
        # A heap: every open superblock with free blocks is in it, others may be.
        self._with_free = list(range(num_owned))
        self._num_cached = [0] * num_superblocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first, of open superblocks

    # --- counts ---------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return len(self.owned) * self.blocks_per_superblock

    @property
    def num_available(self) -> int:
        return self._num_free + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def blocks_of(self, superblock: int) -> range:
        first = superblock * self.blocks_per_superblock
        return range(first, first + self.blocks_per_superblock)

    def is_closed(self, block: int) -> bool:
        return block // self.blocks_per_superblock in self.closed

    def is_empty(self, superblock: int) -> bool:
        """Nobody holds a block of it, and none has contents worth finding."""
        return self.used[superblock] == 0 and self._num_cached[superblock] == 0

    def free(self) -> Iterator[int]:
        """Without contents, in open superblocks."""
        for superblock in self.owned - self.closed:
            yield from self._free[superblock]

    def cached(self) -> Iterator[int]:
        return iter(self._cached)

    def withdrawn(self) -> Iterator[int]:
        """Unused, in closed superblocks."""
        for superblock in self.closed:
            yield from self._free[superblock]

    # --- blocks ---------------------------------------------------------------------------------

    def take(self) -> tuple[int, bool]:
        """The lowest free block, else the cached one that is longest unused; (block, was it
        cached).
        """
        if self._num_free == 0:
            block, _ = self._cached.popitem(last=False)
            self._num_cached[block // self.blocks_per_superblock] -= 1
            self._hold(block)
            return block, True
        while not self._is_open(self._with_free[0]) or not self._free[self._with_free[0]]:
            heapq.heappop(self._with_free)
        block = heapq.heappop(self._free[self._with_free[0]])
        self._num_free -= 1
        self._hold(block)
        return block, False

    def revive(self, block: int) -> None:
        """A cached block is held again, for its contents."""
        del self._cached[block]
        self._num_cached[block // self.blocks_per_superblock] -= 1
        self._hold(block)

    def give_back(self, block: int, *, keep: bool) -> None:
        """Nobody holds it any more. keep: its contents may be found; not in a closed superblock."""
        superblock = block // self.blocks_per_superblock
        self.used[superblock] -= 1
        self.num_used -= 1
        if keep:
            assert superblock not in self.closed, f"block {block} is to leave"
            self._cached[block] = None
            self._num_cached[superblock] += 1
            self.kept_at[superblock] = self._clock()
        else:
            self._set_free(block)

    def drop_contents(self, blocks: list[int]) -> None:
        """These cached blocks are free."""
        for block in blocks:
            del self._cached[block]
            self._num_cached[block // self.blocks_per_superblock] -= 1
            self._set_free(block)

    def _hold(self, block: int) -> None:
        self.used[block // self.blocks_per_superblock] += 1
        self.num_used += 1

    def _set_free(self, block: int) -> None:
        superblock = block // self.blocks_per_superblock
        if superblock not in self.closed:
            self._num_free += 1
            if not self._free[superblock]:
                heapq.heappush(self._with_free, superblock)
        heapq.heappush(self._free[superblock], block)

    def _is_open(self, superblock: int) -> bool:
        return superblock in self.owned and superblock not in self.closed

    # --- superblocks ----------------------------------------------------------------------------

    def close(self, superblock: int) -> None:
        """Hand out no more of it. It has no cached blocks."""
        assert self._is_open(superblock), f"superblock {superblock} is not open"
        assert self._num_cached[superblock] == 0, f"superblock {superblock} has contents"
        self.closed.add(superblock)
        self._num_free -= len(self._free[superblock])

    def reopen(self, superblock: int) -> None:
        self.closed.remove(superblock)
        self._num_free += len(self._free[superblock])
        heapq.heappush(self._with_free, superblock)

    def remove(self, superblock: int) -> None:
        """A closed one that nobody uses is owned no more."""
        assert self.used[superblock] == 0, f"superblock {superblock} is in use"
        self.closed.remove(superblock)
        self.owned.remove(superblock)
        self._free[superblock] = []

    def add(self, superblock: int) -> None:
        assert superblock not in self.owned, f"superblock {superblock} is owned already"
        self.owned.add(superblock)
        self.kept_at[superblock] = 0.0
        self._free[superblock] = list(self.blocks_of(superblock))
        self._num_free += self.blocks_per_superblock
        heapq.heappush(self._with_free, superblock)

    def check_invariants(self) -> None:
        """Assert that the counts agree with the blocks. O(blocks): for tests and idle time."""
        free, cached, withdrawn = list(self.free()), list(self._cached), list(self.withdrawn())
        assert len(free) == self._num_free, "free blocks"
        everywhere = free + cached + withdrawn
        assert len(set(everywhere)) == len(everywhere), "a block is in two places"
        size = self.blocks_per_superblock
        assert all(b // size in self.owned for b in everywhere), "a block that is not owned"
        assert self.closed <= self.owned, "a superblock that is not owned is closed"
        for s in range(len(self.used)):
            unused = sum(b // size == s for b in everywhere)
            owned = size if s in self.owned else 0
            assert self.used[s] == owned - unused, f"superblock {s}: used blocks"
            assert self._num_cached[s] == sum(b // size == s for b in cached), "cached blocks"
            assert s not in self.closed or self._num_cached[s] == 0, "contents in a closed one"
        assert self.num_used == sum(self.used)
        open_ones = {s for s in self.owned - self.closed if self._free[s]}
        assert open_ones <= set(self._with_free), "a superblock with free blocks is lost"

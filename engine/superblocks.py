"""How device memory that the KV cache and the adapters share is cut into superblocks. Arithmetic
only, no torch.

Both sides address their memory by index from a fixed base. So each has *address space* for the most
it may come to own, and what moves between them is the memory behind it (vAttention: 2405.04437):
kernels and captured graphs notice nothing. Memory is mapped and unmapped in granules, and a layer's
keys lie apart from its values and from other layers', so a superblock of KV blocks has to fill
whole granules in each of these planes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_SUPERBLOCKS = 512  # more would only make the books longer
MIN_SUPERBLOCKS = 8  # fewer are not worth trading
LITTLE = 0.02  # of a superblock
MIN_FRAMES = 8  # in a superblock: what holds no frame at its end stays a small share


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Of the shared memory. All counts of superblocks but the floors add up:
    `kv_superblocks + adapter_superblocks` is all there are.

    kv_floor: what one sequence of the greatest length takes. adapter_floor: what one page of 16
    ranks takes, whatever the KV cache wants; a larger adapter gets its room by insisting.
    """

    superblock_bytes: int
    blocks_per_superblock: int
    frames_per_superblock: int
    kv_superblocks: int  # in the beginning
    adapter_superblocks: int
    kv_floor: int
    adapter_floor: int

    @property
    def num_superblocks(self) -> int:
        return self.kv_superblocks + self.adapter_superblocks

    @property
    def num_bytes(self) -> int:
        return self.num_superblocks * self.superblock_bytes

    @property
    def max_kv_superblocks(self) -> int:
        return self.num_superblocks - self.adapter_floor

    @property
    def max_adapter_superblocks(self) -> int:
        return self.num_superblocks - self.kv_floor


def divide(
    *,
    kv_bytes: int,
    adapter_bytes: int,
    granule: int,
    num_planes: int,
    block_bytes: int,
    frame_bytes: int,
    blocks_of_longest: int,
    page_bytes: int,
) -> Division | None:
    """Share `kv_bytes + adapter_bytes`, in the beginning about so. None: too little to trade with.

    num_planes: parts of the KV cache that are contiguous over blocks, all of one size.
    blocks_of_longest: KV blocks of a sequence of the greatest length.
    """
    budget = kv_bytes + adapter_bytes
    plane_bytes = block_bytes // num_planes  # of one block
    unit_blocks = granule // math.gcd(granule, plane_bytes)
    unit = unit_blocks * block_bytes
    wish = max(unit, MIN_FRAMES * frame_bytes, budget // MAX_SUPERBLOCKS)
    least = -(-wish // unit)
    # Frames do not cross superblocks, so the end of one is wasted: of the sizes from the wish on
    # the first that wastes little, else the one that wastes least.
    sizes = [count * unit for count in range(least, min(2 * least, least + 64) + 1)]
    wastes = {size: size % frame_bytes / size for size in sizes}
    size = next((s for s in sizes if wastes[s] <= LITTLE), min(sizes, key=lambda s: wastes[s]))
    number = budget // size
    kv_floor = -(-blocks_of_longest * block_bytes // size)
    adapter_floor = -(-page_bytes // (size // frame_bytes * frame_bytes))
    if number < MIN_SUPERBLOCKS or number < kv_floor + adapter_floor:
        return None
    kv = min(max(round(kv_bytes / size), kv_floor), number - adapter_floor)
    return Division(
        superblock_bytes=size,
        blocks_per_superblock=size // block_bytes,
        frames_per_superblock=size // frame_bytes,
        kv_superblocks=kv,
        adapter_superblocks=number - kv,
        kv_floor=kv_floor,
        adapter_floor=adapter_floor,
    )

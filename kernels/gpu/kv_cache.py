"""Paged keys and values on the device, one arena for all layers. Knows nothing of who reads them.

One (block, head) is `block_size * head_dim` neighbouring elements, 4 to 8 KiB on common models: a
kernel that walks one head of a sequence reads whole pages, never single rows. A layer's keys lie
together, then its values, so a layer touches two runs of the arena and not all of it.
"""

from __future__ import annotations

import torch

from loraplex.kernels.ops import NewTensor, new_zeros

SPLIT_COUNTERS = 4096


class PagedKVCache:
    """Implements `ops.KVCache`.

    keys, values: per layer a view `[num_blocks, num_kv_heads, block_size, head_dim]` of the arena.
    An arena passes 2^31 elements easily: kernels multiply a block id by its stride in int64.
    split_arrivals: how many splits of a (sequence, kv head) have come in, zero between launches;
    it lives here because it has to outlast every launch and captured graph that reads this cache.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        new: NewTensor = new_zeros,
    ) -> None:
        """Raises: ValueError for a block size the kernels cannot work with."""
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(
                f"block_size={block_size}: the GPU kernels need a power of two, such as 16 or 32"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        shape = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
        self._arena = new(shape, dtype, device)
        self.nbytes = self._arena.nbytes
        self.split_arrivals = torch.zeros(SPLIT_COUNTERS, dtype=torch.int32, device=device)
        self.keys = [self._arena[layer, 0] for layer in range(num_layers)]
        self.values = [self._arena[layer, 1] for layer in range(num_layers)]
        self.planes = [plane.view(num_blocks, -1) for plane in (*self.keys, *self.values)]

    def copy_block(self, source: int, target: int) -> None:
        """All layers' keys and values of a block, on the current stream."""
        self._arena[:, :, target].copy_(self._arena[:, :, source])

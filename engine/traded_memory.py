"""The device memory that the KV cache and the adapters trade: address space for both, and the moves
of what is behind it. Who gets what is decided elsewhere (`memory_exchange.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool, SharedArena
from loraplex.engine.superblocks import Division
from loraplex.kernels.ops import KVCache


class AddressSpace(Protocol):
    """Addresses with memory behind parts of them. Memory comes and goes in whole granules (bytes);
    the same total is behind it after a `release` and a `commit` of as many bytes.
    """

    granule: int

    def reserve(self, num_bytes: int) -> Tensor:
        """`[num_bytes]` uint8 without memory behind it, for as long as the process runs."""
        ...

    def commit(self, span: Tensor) -> None:
        """Put memory behind a part that has none; it holds zeros when a step next reads it."""
        ...

    def release(self, span: Tensor) -> None:
        """Take the memory away. Nobody, on no stream, uses the part any more; contents are lost."""
        ...


class TradedMemory:
    """Implements `memory_exchange.Mover`. Make the KV cache with `new_kv_tensor` and the pool with
    `arena`, then call `join`.

    Raises: OSError, ValueError or RuntimeError where there are not so many addresses.
    """

    def __init__(self, division: Division, space: AddressSpace) -> None:
        self._division = division
        self._space = space
        size = division.superblock_bytes
        self._kv_memory = space.reserve(division.max_kv_superblocks * size)
        self._kv_bytes_made = 0
        self._arena = space.reserve(division.max_adapter_superblocks * size)
        self._kv: KVCache | None = None
        self._pool: PagePool | None = None

    def new_kv_tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """For `kernels.ops.NewTensor`: zeros, where there is memory."""
        first = self._kv_bytes_made
        self._kv_bytes_made += math.prod(shape) * dtype.itemsize
        memory = self._kv_memory[first : self._kv_bytes_made]
        assert memory.device.type == device.type
        return memory.view(dtype).view(shape)

    def arena(self) -> SharedArena:
        division = self._division
        return SharedArena(self._arena, division.superblock_bytes, division.adapter_superblocks)

    def join(self, kv: KVCache, pool: PagePool) -> None:
        """Put memory behind what each owns in the beginning."""
        assert self._kv_bytes_made == self._kv_memory.nbytes, "the KV cache has other sizes"
        self._kv, self._pool = kv, pool
        for superblock in range(self._division.kv_superblocks):
            for span in self._kv_spans(superblock):
                self._space.commit(span)
        for superblock in range(self._division.adapter_superblocks):
            self._space.commit(pool.superblock(superblock))

    def to_adapters(self, kv_superblock: int, adapter_superblock: int) -> None:
        assert self._pool is not None
        for span in self._kv_spans(kv_superblock):
            self._space.release(span)
        self._space.commit(self._pool.superblock(adapter_superblock))

    def to_kv(self, adapter_superblock: int, kv_superblock: int) -> None:
        assert self._pool is not None
        self._space.release(self._pool.superblock(adapter_superblock))
        for span in self._kv_spans(kv_superblock):
            self._space.commit(span)

    def _kv_spans(self, superblock: int) -> Iterator[Tensor]:
        assert self._kv is not None
        size = self._division.blocks_per_superblock
        for plane in self._kv.planes:
            yield plane[superblock * size : (superblock + 1) * size]

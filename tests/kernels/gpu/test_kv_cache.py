"""The paged cache: layout, block copies, refusals, and the meta device."""

from __future__ import annotations

import pytest
import torch

from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.ops import KVCache

CPU = torch.device("cpu")


def test_views_share_one_arena_and_do_not_overlap() -> None:
    kv: KVCache = (cache := PagedKVCache(3, 5, 16, 2, 24, torch.float16, CPU))
    for index, view in enumerate((*cache.keys, *cache.values)):
        assert view.shape == (5, 2, 16, 24)
        assert view.is_contiguous()
        view.fill_(index)
    storages = {view.untyped_storage().data_ptr() for view in (*cache.keys, *cache.values)}
    assert len(storages) == 1
    for index, view in enumerate((*cache.keys, *cache.values)):
        assert bool((view == index).all())
    assert (kv.num_blocks, kv.block_size) == (5, 16)
    assert kv.nbytes == 2 * 3 * 5 * 2 * 16 * 24 * 2


def test_copy_block_copies_every_layer_and_only_that_block() -> None:
    cache = PagedKVCache(2, 4, 16, 2, 8, torch.float32, CPU)
    views = (*cache.keys, *cache.values)
    for view in views:
        view.copy_(torch.randn(view.shape))
    before = [view.clone() for view in views]
    cache.copy_block(3, 1)
    for view, old in zip(views, before, strict=True):
        assert torch.equal(view[1], old[3])
        assert torch.equal(view[[0, 2, 3]], old[[0, 2, 3]])


def test_meta_device_holds_no_memory() -> None:
    cache = PagedKVCache(32, 100_000, 16, 8, 128, torch.bfloat16, torch.device("meta"))
    assert cache.nbytes == 32 * 2 * 100_000 * 16 * 8 * 128 * 2
    assert cache.keys[31].is_meta


@pytest.mark.parametrize("block_size", [0, 24])
def test_refuses_block_sizes_that_are_no_power_of_two(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size={block_size}: .* power of two"):
        PagedKVCache(1, 4, block_size, 2, 16, torch.float16, CPU)

"""The host's memory really moves: resident pages are counted, contents compared."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.adapters.weights import LoadedAdapter, LoadedModule
from loraplex.engine.host_memory import HostAddressSpace, host_address_space
from loraplex.engine.superblocks import MIN_FRAMES, Division, divide
from loraplex.engine.traded_memory import TradedMemory
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.native_ops import NativeKVCache
from loraplex.kernels.ops import KVCache, NewTensor
from loraplex.kernels.torch_attention import TorchKVCache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mincore")
CPU = torch.device("cpu")
LAYERS, HEADS, DIM, BLOCK = 2, 2, 16, 16
SHAPES = ((64, 64),) * 7
FRAME_BYTES = 7 * 2 * 16 * 64 * 4
BLOCK_BYTES = 2 * LAYERS * HEADS * DIM * BLOCK * 4


def resident_bytes(span: Tensor) -> int:
    """Of whole pages in `span` that are in memory."""
    assert span.data_ptr() % mmap.PAGESIZE == span.nbytes % mmap.PAGESIZE == 0
    found = (ctypes.c_ubyte * (span.nbytes // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    status = libc.mincore(ctypes.c_void_p(span.data_ptr()), ctypes.c_size_t(span.nbytes), found)
    assert status == 0, ctypes.get_errno()
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def make_kv(kind: str, num_blocks: int, new: NewTensor) -> KVCache:
    if kind == "torch":
        return TorchKVCache(LAYERS, num_blocks, BLOCK, HEADS, DIM, torch.float32, CPU, new=new)
    if kind == "native":
        return NativeKVCache(LAYERS, num_blocks, BLOCK, HEADS, DIM, torch.float32, new)
    return PagedKVCache(LAYERS, num_blocks, BLOCK, HEADS, DIM, torch.float32, CPU, new)


class Device:
    def __init__(self, kind: str) -> None:
        division = divide(
            kv_bytes=8 << 20,
            adapter_bytes=8 << 20,
            granule=mmap.PAGESIZE,
            num_planes=2 * LAYERS,
            block_bytes=BLOCK_BYTES,
            frame_bytes=FRAME_BYTES,
            blocks_of_longest=10,
            page_bytes=LAYERS * FRAME_BYTES,
        )
        assert division is not None
        self.division = division
        self.space = HostAddressSpace()
        self.memory = TradedMemory(division, self.space)
        size = division.blocks_per_superblock
        num_blocks = division.max_kv_superblocks * size
        self.kv = make_kv(kind, num_blocks, self.memory.new_kv_tensor)
        self.pool = PagePool(LAYERS, SHAPES, 0, torch.float32, CPU, self.memory.arena())
        self.memory.join(self.kv, self.pool)

    def kv_spans(self, superblock: int) -> list[Tensor]:
        size = self.division.blocks_per_superblock
        return [plane[superblock * size : (superblock + 1) * size] for plane in self.kv.planes]

    def fill(self, superblock: int, number: float) -> None:
        for span in self.kv_spans(superblock):
            span.fill_(number)

    def kv_resident(self, superblock: int) -> int:
        return sum(resident_bytes(span) for span in self.kv_spans(superblock))


@pytest.mark.parametrize("kind", ["torch", "native", "gpu"])
def test_what_the_kv_cache_gives_leaves_the_process(kind: str) -> None:
    device = Device(kind)
    size = device.division.superblock_bytes
    last = device.division.kv_superblocks - 1
    assert device.kv_resident(last) == 0, "memory comes when it is used"
    for superblock in (last - 1, last):
        device.fill(superblock, superblock + 1)
        assert device.kv_resident(superblock) == size
    target = device.division.adapter_superblocks
    device.memory.to_adapters(last, target)
    assert device.kv_resident(last) == 0
    assert all(bool((span == last).all()) for span in device.kv_spans(last - 1)), "a neighbour"
    assert device.kv_resident(last - 1) == size
    device.pool.superblock(target).fill_(1)
    assert resident_bytes(device.pool.superblock(target)) == size
    device.memory.to_kv(target, last)
    assert resident_bytes(device.pool.superblock(target)) == 0
    assert not any(bool(span.any()) for span in device.kv_spans(last)), "it comes back as zeros"


def test_every_byte_of_the_kv_cache_is_in_one_superblock() -> None:
    device = Device("native")
    seen: set[int] = set()
    for superblock in range(device.division.max_kv_superblocks):
        for span in device.kv_spans(superblock):
            pages = range(span.data_ptr(), span.data_ptr() + span.nbytes, mmap.PAGESIZE)
            assert seen.isdisjoint(pages)
            seen.update(pages)
    assert len(seen) * mmap.PAGESIZE == device.kv.nbytes


def adapter(digest: str, number: float) -> LoadedAdapter:
    modules = {
        (layer, kind): LoadedModule(
            torch.full((16, 64), number), torch.full((16, 64), -number), 16, 1.0
        )
        for layer in range(LAYERS)
        for kind in range(7)
    }
    return LoadedAdapter(digest, 16, modules)


def test_adapters_lie_in_what_the_kv_cache_gave() -> None:
    device = Device("torch")
    pool, division = device.pool, device.division
    number = 0
    while pool.frames.num_free >= LAYERS:
        number += 1
        loaded = adapter(f"{number}", float(number))
        pool.install(f"{number}", pool.build_image(loaded))
    first_beyond = number + 1
    last = division.kv_superblocks - 1
    device.fill(last, 9.0)
    device.memory.to_adapters(last, division.adapter_superblocks)
    pool.frames.add(division.adapter_superblocks)
    pool.install("new", pool.build_image(adapter("new", float(first_beyond))))
    pool.check_invariants()
    for name, value in (("new", first_beyond), ("1", 1), (str(number), number)):
        for page in pool.pages(name):
            start = int(pool.offset_a[page, LAYERS - 1, 6])
            assert bool((pool.arena[start : start + 16 * 64] == value).all()), name
    assert "new" in pool.frames.holders(division.adapter_superblocks)


def test_a_division_holds_together() -> None:
    """What is wasted is small, floors fit, and planes fill whole granules."""
    for granule, planes, plane_bytes, frame, kv, adapters in (
        (2 << 20, 64, 32 << 10, 2_621_440, 45 << 30, 11 << 30),  # Llama 3 8B on a GPU
        (2 << 20, 160, 32 << 10, 8_388_608, 60 << 30, 20 << 30),
        (2 << 20, 48, 24 << 10, 1_000_192, 20 << 30, 5 << 30),  # planes that fit no granule
        (4096, 6, 2048, 59_392, 4 << 20, 2 << 20),  # the tiny models of the tests
    ):
        block = planes * plane_bytes
        division = divide(
            kv_bytes=kv,
            adapter_bytes=adapters,
            granule=granule,
            num_planes=planes,
            block_bytes=block,
            frame_bytes=frame,
            blocks_of_longest=16,
            page_bytes=frame * planes // 2,
        )
        assert isinstance(division, Division)
        assert division.blocks_per_superblock * plane_bytes % granule == 0
        assert division.blocks_per_superblock * block == division.superblock_bytes
        frames = division.frames_per_superblock
        assert frames >= MIN_FRAMES
        assert division.superblock_bytes - frames * frame < division.superblock_bytes / MIN_FRAMES
        assert division.num_bytes <= kv + adapters < division.num_bytes * 1.15
        assert division.kv_superblocks >= division.kv_floor
        assert division.adapter_superblocks >= division.adapter_floor
        assert abs(division.kv_superblocks * division.superblock_bytes - kv) < max(
            division.superblock_bytes, 0.05 * kv
        )


def test_too_little_is_not_cut_up() -> None:
    division = divide(
        kv_bytes=100 * BLOCK_BYTES,
        adapter_bytes=2 * FRAME_BYTES,
        granule=mmap.PAGESIZE,
        num_planes=4,
        block_bytes=BLOCK_BYTES,
        frame_bytes=FRAME_BYTES,
        blocks_of_longest=10,
        page_bytes=2 * FRAME_BYTES,
    )
    assert division is None


def test_other_systems_say_that_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert host_address_space() is None

"""The driver's virtual memory, against a stand-in that checks every call. No GPU has run it."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.engine.gpu.virtual_memory import CudaAddressSpace, Driver, cuda_address_space, prove

GRANULE = 1 << 21


class Function:
    """Takes what a function of a ctypes library takes; `argtypes` convert as ctypes does."""

    argtypes: list[Any]
    restype: Any

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        for argument, kind in zip(arguments, self.argtypes, strict=True):
            kind.from_param(argument)
        return int(self._call(*arguments))


class FakeDriver:
    """Memory of the host in the place of the GPU's; addresses are real, so tensors can lie there.

    Contents move with a granule, as they would: they are copied out at unmap and in at map.
    """

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, mmap.mmap]] = []
        self.contents: dict[int, bytes] = {}  # by handle
        self.mapped: dict[int, int] = {}
        self.allowed: set[int] = set()
        self.fails: dict[str, int] = {}
        for name in (
            "cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap",
            "cuMemSetAccess", "cuMemUnmap", "cuGetErrorString",
        ):  # fmt: skip
            setattr(self, name, Function(self._failing(name, getattr(self, f"_{name}"))))

    def _failing(self, name: str, call: Any) -> Any:
        return lambda *arguments: self.fails.get(name) or call(*arguments)

    def _cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: Any) -> int:
        assert (ctypes.sizeof(properties._obj), properties._obj.type, option.value) == (32, 1, 0)
        assert (properties._obj.location.type, properties._obj.location.id) == (1, 0)
        size._obj.value = GRANULE
        return 0

    def _cuMemAddressReserve(self, out: Any, size: int, align: int, at: int, flags: int) -> int:
        assert size % GRANULE == 0
        pages = mmap.mmap(-1, size + GRANULE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        out._obj.value = -(-first // GRANULE) * GRANULE
        self.ranges.append((out._obj.value, size, pages))
        return 0

    def _cuMemCreate(self, out: Any, size: int, properties: Any, flags: int) -> int:
        assert size == GRANULE
        out._obj.value = 1000 + len(self.contents)
        self.contents[out._obj.value] = b"\xff" * GRANULE  # undefined, so not zeros
        return 0

    def _cuMemMap(self, at: int, size: int, offset: int, handle: int, flags: int) -> int:
        assert (size, offset, flags) == (GRANULE, 0, 0)
        assert at % GRANULE == 0
        assert any(first <= at and at + size <= first + s for first, s, _ in self.ranges)
        assert at not in self.mapped, "mapped twice"
        assert handle not in self.mapped.values(), "one granule in two places"
        self.mapped[at] = handle
        ctypes.memmove(at, self.contents[handle], GRANULE)
        return 0

    def _cuMemSetAccess(self, at: int, size: int, access: Any, count: int) -> int:
        assert (ctypes.sizeof(access._obj), access._obj.flags, count) == (12, 3, 1)
        granules = range(at, at + size, GRANULE)
        assert all(granule in self.mapped for granule in granules)
        self.allowed.update(granules)
        return 0

    def _cuMemUnmap(self, at: int, size: int) -> int:
        for granule in range(at, at + size, GRANULE):
            self.contents[self.mapped.pop(granule)] = ctypes.string_at(granule, GRANULE)
            self.allowed.discard(granule)
        return 0

    def _cuGetErrorString(self, status: int, out: Any) -> int:
        out._obj.value = b"out of memory"
        return 0


class Space(CudaAddressSpace):
    def _tensor(self, address: int, num_bytes: int) -> Tensor:
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


def space_of(driver: FakeDriver) -> Space:
    return Space(torch.device("cpu"), Driver(0, driver))


def test_memory_moves_and_none_is_allocated_for_it(driver: FakeDriver) -> None:
    space = space_of(driver)
    first, second = space.reserve(4 * GRANULE), space.reserve(4 * GRANULE)
    assert len(driver.contents) == 2, "a granule each"
    space.commit(first)
    assert not first.any(), "memory comes as zeros"
    first[GRANULE:].fill_(7)
    space.release(first[GRANULE : 3 * GRANULE])
    space.commit(second[2 * GRANULE :])
    assert not second[2 * GRANULE :].any(), "nobody finds what another wrote"
    assert len(driver.contents) == 5
    assert len(driver.mapped) == 5
    assert driver.allowed == set(driver.mapped)
    assert int(first[3 * GRANULE :].min()) == 7, "what stayed is as it was"


def test_a_proof_leaves_its_granules_to_those_who_come(driver: FakeDriver) -> None:
    space = space_of(driver)
    prove(space)
    num_granules = len(driver.contents)
    space.commit(space.reserve(2 * GRANULE))
    assert len(driver.contents) == num_granules + 1


def test_a_part_of_a_granule_is_refused(driver: FakeDriver) -> None:
    space = space_of(driver)
    memory = space.reserve(2 * GRANULE)
    with pytest.raises(AssertionError, match="a part of a granule"):
        space.commit(memory[: GRANULE // 2])


@pytest.mark.parametrize("name", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemUnmap"])
def test_a_refusal_says_who_and_why(driver: FakeDriver, name: str) -> None:
    driver.fails[name] = 2
    with pytest.raises(RuntimeError, match=rf"{name}: out of memory \(CUDA error 2\)"):
        prove(space_of(driver))


def test_without_a_driver_there_is_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    space, reason = cuda_address_space(torch.device("cuda:0"))
    assert space is None
    assert "libcuda" in reason

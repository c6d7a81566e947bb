"""Facts about this machine and what is installed, without importing any of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("loraplex", "torch", "triton", "transformers", "peft", "numpy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
# Stable order of preference; CXX wins when set.
COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are those this process may use; `ram_bytes` is the machine's, or the container's
    limit if smaller.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    ram_bytes: int
    gpu: str | None
    python: str
    versions: dict[str, str]
    commit: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def machine() -> Machine:
    name, features = _cpu()
    return Machine(
        cpu=name,
        features=features,
        cores=_cores(),
        ram_bytes=_ram_bytes(),
        gpu=_gpu(),
        python=".".join(map(str, sys.version_info[:3])),
        versions={p: v for p in PACKAGES if (v := _version(p)) is not None},
        commit=_commit(),
    )


def compiler() -> str | None:
    """Path of the C++ compiler that would be used, if there is one."""
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        if found := shutil.which(name):
            return found
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Model name and those of CPU_FEATURES it has; ("unknown", ()) where /proc/cpuinfo is not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown", ()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name", "unknown"), tuple(f for f in CPU_FEATURES if f in flags)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_bytes() -> int:
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, cwd=cwd
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _gpu() -> str | None:
    listed = _output(
        "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
    )
    return listed.splitlines()[0] if listed else None


def _commit() -> str | None:
    """The commit this code is from, `+` appended when the tree has changes; None outside a
    checkout.
    """
    here = Path(__file__).resolve().parent
    commit = _output("git", "rev-parse", "--short=12", "HEAD", cwd=here)
    if commit is None:
        return None
    return commit + ("+" if _output("git", "status", "--porcelain", "-uno", cwd=here) else "")

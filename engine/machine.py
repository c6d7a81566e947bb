"""What this machine grants the process: memory and processors, container limits included."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the memory the model lives in: RAM on a CPU, the card's on a GPU."""

    total: int
    free: int


def device_memory(device: torch.device, cgroup: Path = CGROUP) -> Memory:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total=total, free=free)
    machine = psutil.virtual_memory()
    limit, used = _cgroup_memory(cgroup)
    if limit is None or limit >= machine.total:
        return Memory(total=machine.total, free=machine.available)
    return Memory(total=limit, free=min(machine.available, max(0, limit - used)))


def available_cpus(cgroup: Path = CGROUP) -> int:
    """Processors this process may keep busy: its affinity, less if a container's quota says so."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    # "max 100000" or "<quota> <period>" (cgroup v2)
    fields = _read(cgroup / "cpu.max").split()
    if len(fields) == 2 and fields[0].isdigit():
        return max(1, min(count, math.ceil(int(fields[0]) / int(fields[1]))))
    return count


def _cgroup_memory(cgroup: Path) -> tuple[int | None, int]:
    """(limit or None, used without what the kernel can take back at once)."""
    for limit_file, usage_file, stat_file in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit = _read(cgroup / limit_file)
        if not limit.isdigit():
            continue
        used = int(_read(cgroup / usage_file) or 0)
        for line in _read(cgroup / stat_file).splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                used -= int(value)
        return int(limit), max(0, used)
    return None, 0


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

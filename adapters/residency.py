"""The words of adapter residency: states, sizes, and the protocol of whoever moves the bytes.

`load_planner.py` decides what should be where; a `Loader` moves it. Standard library only, and no
import from the engine: `AdapterState` has the same values as the wire's enum of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class AdapterState(StrEnum):
    ABSENT = "absent"  # on disk only
    HOST_LOADING = "host_loading"
    HOST = "host"
    DEVICE_LOADING = "device_loading"
    DEVICE = "device"
    DRAINING = "draining"  # on the device, leaves it when its last running sequence does
    FAILED = "failed"


class Stage(StrEnum):
    HOST = "host"  # file -> host image
    DEVICE = "device"  # host image -> device pages


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """What an adapter will take, known from its manifest before anything is loaded."""

    rank: int
    pages: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class LoadDone:
    """The end of one `begin_*_load`. `error` says why when not `ok`; `code` is stable and
    machine-readable.
    """

    digest: str
    stage: Stage
    ok: bool
    seconds: float
    error: str = ""
    code: str = "adapter_load_failed"


class Loader(Protocol):
    """Moves adapters between file, host and device. Every call returns at once; only `poll`
    reports ends.

    Called from one thread. At most one load per digest is under way, and nothing is dropped while
    it loads.
    """

    def describe(self, digest: str) -> AdapterSize:
        """Raises: AdapterError(code="adapter_not_found" or another reason why it can never be
        loaded).
        """
        ...

    def begin_host_load(self, digest: str) -> None: ...

    def begin_device_load(self, digest: str) -> None:
        """Only after the host load ended well. The host image stays until `drop_host`."""
        ...

    def drop_device(self, digest: str) -> int:
        """Free the device pages; returns the bytes freed."""
        ...

    def drop_host(self, digest: str) -> int:
        """Free the host image; returns the bytes freed."""
        ...

    def poll(self) -> list[LoadDone]:
        """The loads that ended since the last call."""
        ...

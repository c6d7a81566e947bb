"""The words of adapter residency: states, sizes, and the protocol of whoever moves the bytes.

`load_planner.py` decides what should be where; a `Loader` moves it. Standard library only, and no
import from the engine: `AdapterState` has the same values as the wire's enum of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


class Phase(StrEnum):
    """What the seconds of a load went into."""

    QUEUE = "queue"  # for room, for loads before it, for the end of a step
    READ = "read"  # of the page file, or of the weights
    VERIFY = "verify"  # the page file's checksums
    BUILD = "build"  # pages out of weights
    COPY = "copy"  # to the device, until steps may begin to use it


Seconds = Mapping[Phase, float]


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of an adapter's state.

    seconds: spent in `before`. detail: for people. reason: of those that left the device "room",
    "order" or "deleted", of those that failed the code; else empty. phases: of those that came to
    the device, what the load's time went into, from the first want of it on.
    """

    digest: str
    before: AdapterState
    after: AdapterState
    seconds: float
    detail: str = ""
    reason: str = ""
    phases: Seconds = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """What an adapter will take, known from its manifest before anything is loaded.

    invocation_tokens: where in a prompt it begins to apply; empty: at its first token.
    needs_weight_one: it is not linear in its weight, so it can be neither scaled nor composed.
    """

    rank: int
    pages: int
    device_bytes: int
    host_bytes: int
    invocation_tokens: tuple[int, ...] = ()
    needs_weight_one: bool = False


@dataclass(frozen=True, slots=True)
class LoadDone:
    """The end of one `begin_*_load`. `error` says why when not `ok`; `code` is stable and
    machine-readable. `phases` add up to `seconds`.
    """

    digest: str
    stage: Stage
    ok: bool
    seconds: float
    error: str = ""
    code: str = "adapter_load_failed"
    phases: Seconds = field(default_factory=dict)


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

    def forget(self, digest: str) -> None:
        """Nothing of it is in memory, and nobody wants it: keep nothing about it."""
        ...

    def poll(self) -> list[LoadDone]:
        """The loads that ended since the last call."""
        ...


class Lender(Protocol):
    """Who shares the device's memory with the adapters, and gives some of it up for them. What it
    gives arrives by `AdapterSlots.resize_device`, now or later.
    """

    @property
    def bytes_coming(self) -> int:
        """Given, but a step in flight may still use it."""
        ...

    def lend(self, num_bytes: int, unused_since: float | None = None) -> None:
        """A wanted adapter lacks so many bytes beyond those that are coming: give what holds
        nothing or, with `unused_since` (clock), also what holds something nobody has used since
        then. It may be less.
        """
        ...

    def insist(self, num_bytes: int) -> None:
        """It has lacked them for too long: give them as soon as those who use them end."""
        ...

    def enough(self) -> None:
        """No wanted adapter lacks room now."""
        ...


class NoLender:
    """The adapters' memory is theirs alone."""

    bytes_coming = 0

    def lend(self, num_bytes: int, unused_since: float | None = None) -> None:
        pass

    def insist(self, num_bytes: int) -> None:
        pass

    def enough(self) -> None:
        pass

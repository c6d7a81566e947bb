"""The books of adapter residency: which adapter is where, who uses or wants it, what it takes.

Every change is entered here, together with the order to the `Loader` that makes it true. Decides
nothing: that is `load_planner.py`'s and the callers' business. Standard library only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loraplex.adapters.eviction import Use, UseClock
from loraplex.adapters.residency import (
    AdapterSize,
    AdapterState,
    LoadDone,
    Loader,
    Phase,
    Seconds,
    Stage,
    Transition,
)

Rank = int  # the order of a request: lower goes first, unique
OnTransition = Callable[[Transition], None]

ON_DEVICE = (AdapterState.DEVICE_LOADING, AdapterState.DEVICE, AdapterState.DRAINING)
LOADING = (AdapterState.HOST_LOADING, AdapterState.DEVICE_LOADING)
MAX_BOOKS = 4096  # adapters with books; those that are nowhere are forgotten beyond it
_FORGET_SHARE = 8  # one in so many at a time
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0


@dataclass(slots=True, eq=False)
class Resident:
    """One adapter's books. Read them freely; only `Books` and `AdapterSlots` write."""

    digest: str
    size: AdapterSize
    since: float  # clock of the last change of state
    state: AdapterState = AdapterState.ABSENT
    has_host_image: bool = False
    running: int = 0
    wants: list[Rank] = field(default_factory=list)  # sorted
    wanted_at: float = 0.0  # clock of the first of them
    pinned: bool = False
    refused: bool = False  # being forgotten: no new requests
    evict_after_drain: bool = False  # drained by order of an operator, not for room
    loaded_at: float | None = None  # clock
    last_used_at: float | None = None  # clock
    tick: int = 0  # of the last use; loads and the beginning of these books included
    use: Use = field(default_factory=Use)  # by sequences that ran
    load_seconds: dict[Stage, float] = field(default_factory=dict)  # of the last load
    phases: dict[Phase, float] = field(default_factory=dict)  # of the load under way
    no_room_since: float | None = None  # first time its load found no room on the device
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0  # in a row
    retry_at: float = 0.0
    error: str | None = None
    error_code: str = ""


@dataclass(frozen=True, slots=True)
class WantFailed:
    """A want that will not come true; it is already withdrawn."""

    rank: Rank
    code: str
    message: str


class Books:
    """`device_bytes_total` and `host_bytes_total` bound what the loader holds; the former may grow
    up to `device_bytes_max` where memory is shared with the KV cache.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        device_bytes_total: int,
        device_bytes_max: int,
        host_bytes_total: int,
        on_transition: OnTransition | None,
        clock: Callable[[], float],
    ) -> None:
        self.device_bytes_total = device_bytes_total
        self.device_bytes_max = device_bytes_max
        self.host_bytes_total = host_bytes_total
        self.device_bytes_used = 0
        self.host_bytes_used = 0
        self.on_transition = on_transition
        self.clock = clock
        self.residents: dict[str, Resident] = {}
        self.wants: dict[Rank, tuple[str, ...]] = {}
        self.queue: list[tuple[Rank, str]] = []  # earliest want of each adapter not on the device
        self.failed: list[WantFailed] = []
        self.loads_under_way = {Stage.HOST: 0, Stage.DEVICE: 0}
        self.changed = False  # since the planner last looked
        self.num_loads = 0  # to the device, ever
        self.num_evictions = 0  # from the device, ever
        self.load_seconds = 0.0  # of both stages, ever
        self.num_joins = 0  # wants that found their load wanted or under way already, ever
        self.num_refusals = 0  # checks that found a failure lately, ever
        self._loader = loader
        self._ticks = 0
        self._uses = UseClock()

    def open(self, digest: str) -> Resident:
        """Its books, begun now if there are none. Raises: AdapterError when it cannot be loaded."""
        resident = self.residents.get(digest)
        if resident is None:
            size = self._loader.describe(digest)
            if len(self.residents) >= MAX_BOOKS:
                self._forget_oldest()
            self._ticks += 1
            resident = Resident(digest, size, self.clock(), tick=self._ticks)
            self.residents[digest] = resident
        return resident

    def forget(self, resident: Resident) -> None:
        """It is nowhere, and nobody wants it: end its books."""
        del self.residents[resident.digest]
        self._loader.forget(resident.digest)

    def _forget_oldest(self) -> None:
        now = self.clock()
        nowhere = [
            r
            for r in self.residents.values()
            if r.state in (AdapterState.ABSENT, AdapterState.FAILED)
            and not (r.wants or r.pinned or r.refused or r.retry_at > now)
        ]
        for resident in heapq.nsmallest(MAX_BOOKS // _FORGET_SHARE, nowhere, lambda r: r.tick):
            self.forget(resident)

    def touch(self, resident: Resident) -> None:
        """It was used."""
        self._ticks += 1
        resident.tick = self._ticks
        resident.last_used_at = self.clock()
        self.changed = True

    def count_use(self, resident: Resident) -> None:
        """A sequence begins to run on it."""
        self._uses.num_adapters = len(self.residents)
        self._uses.count(resident.use)
        self.touch(resident)

    def worth(self, resident: Resident, tier: Stage) -> float:
        """What keeping it in a tier is worth (`eviction.py`); it would be reloaded from below."""
        size, seconds = resident.size, resident.load_seconds
        if tier is Stage.HOST:
            cost, num_bytes = seconds.get(Stage.HOST, 0.0), size.host_bytes
        else:
            cost, num_bytes = seconds.get(Stage.DEVICE, 0.0), size.device_bytes
            if not resident.has_host_image:
                cost += seconds.get(Stage.HOST, 0.0)
        return self._uses.worth(resident.use, num_bytes, cost)

    def change(
        self,
        resident: Resident,
        state: AdapterState,
        detail: str = "",
        *,
        reason: str = "",
        phases: Seconds | None = None,
    ) -> None:
        now = self.clock()
        before, seconds = resident.state, now - resident.since
        self._unqueue(resident)
        resident.state, resident.since = state, now
        self._enqueue(resident)
        if self.on_transition is not None:
            self.on_transition(
                Transition(resident.digest, before, state, seconds, detail, reason, phases or {})
            )

    # --- wants ----------------------------------------------------------------------------------

    def want(self, rank: Rank, digests: Iterable[str]) -> None:
        assert rank not in self.wants, f"want {rank} is registered already"
        self.wants[rank] = names = tuple(dict.fromkeys(digests))
        for digest in names:
            resident = self.open(digest)
            if resident.state is AdapterState.FAILED:
                self.change(resident, AdapterState.ABSENT, "retry")
            if resident.state is AdapterState.DEVICE:
                resident.hits += 1
            elif resident.wants or resident.state in LOADING:
                self.num_joins += 1
            if not resident.wants:
                resident.wanted_at = self.clock()
            self._unqueue(resident)
            insort(resident.wants, rank)
            self._enqueue(resident)

    def unwant(self, rank: Rank) -> None:
        """Unknown ranks (failed before) are fine."""
        for digest in self.wants.pop(rank, ()):
            resident = self.residents[digest]
            self._unqueue(resident)
            del resident.wants[bisect_left(resident.wants, rank)]
            self._enqueue(resident)

    def fail_want(self, rank: Rank, code: str, message: str) -> None:
        """Withdraw it; `failed` reports it."""
        self.unwant(rank)
        self.failed.append(WantFailed(rank, code, message))

    def _enqueue(self, resident: Resident) -> None:
        """Keep in `queue` exactly the wanted that are not on the device."""
        if resident.wants and resident.state is not AdapterState.DEVICE:
            insort(self.queue, (resident.wants[0], resident.digest))
        else:
            resident.no_room_since = None
        self.changed = True

    def _unqueue(self, resident: Resident) -> None:
        if resident.wants and resident.state is not AdapterState.DEVICE:
            del self.queue[bisect_left(self.queue, (resident.wants[0], resident.digest))]

    # --- loads ----------------------------------------------------------------------------------

    def begin_host_load(self, resident: Resident) -> None:
        self.host_bytes_used += resident.size.host_bytes
        self.loads_under_way[Stage.HOST] += 1
        resident.phases = {Phase.QUEUE: self._waited(resident)}
        self.change(resident, AdapterState.HOST_LOADING, f"{len(resident.wants)} wait for it")
        self._loader.begin_host_load(resident.digest)

    def begin_device_load(self, resident: Resident) -> None:
        resident.no_room_since = None
        self.device_bytes_used += resident.size.device_bytes
        self.loads_under_way[Stage.DEVICE] += 1
        _add(resident.phases, {Phase.QUEUE: self._waited(resident)})
        self.change(resident, AdapterState.DEVICE_LOADING, f"{len(resident.wants)} wait for it")
        self._loader.begin_device_load(resident.digest)

    def _waited(self, resident: Resident) -> float:
        """Seconds that its load could have begun earlier, had everything been there."""
        return self.clock() - max(resident.since, resident.wanted_at)

    def end_load(self, done: LoadDone) -> None:
        resident = self.residents[done.digest]
        unseen = self.clock() - resident.since - done.seconds  # it had ended, a step was running
        _add(resident.phases, done.phases)
        _add(resident.phases, {Phase.QUEUE: max(0.0, unseen)})
        self.loads_under_way[done.stage] -= 1
        self.load_seconds += done.seconds
        if not done.ok:
            self._fail(resident, done)
            return
        resident.load_seconds[done.stage] = done.seconds
        if done.stage is Stage.HOST:
            resident.has_host_image = True
            self.touch(resident)
            self.change(resident, AdapterState.HOST)
        else:
            resident.loads += 1
            self.num_loads += 1
            resident.failures = 0
            resident.error = None
            resident.loaded_at = self.clock()
            self.touch(resident)
            phases, resident.phases = resident.phases, {}
            self.change(resident, AdapterState.DEVICE, phases=phases)

    def _fail(self, resident: Resident, done: LoadDone) -> None:
        if done.stage is Stage.DEVICE:
            self.device_bytes_used -= resident.size.device_bytes
        else:
            self.host_bytes_used -= resident.size.host_bytes
        backoff_s = min(_FIRST_BACKOFF_S * 2**resident.failures, _MAX_BACKOFF_S)
        resident.failures += 1
        resident.retry_at = self.clock() + backoff_s
        resident.error, resident.error_code = done.error, done.code
        resident.phases = {}
        self.change(resident, AdapterState.FAILED, done.error, reason=done.code)
        if resident.has_host_image:
            self.drop_host(resident, "failed")  # it may be the image that is bad
        for rank in list(resident.wants):
            self.fail_want(rank, done.code, done.error)

    def drop_device(self, resident: Resident, detail: str, reason: str) -> int:
        """Returns the bytes freed. reason: "room", "order" or "deleted"."""
        assert resident.running == 0, f"{resident.digest} is in use"
        freed = self._loader.drop_device(resident.digest)
        self.device_bytes_used -= resident.size.device_bytes
        resident.evictions += 1
        self.num_evictions += 1
        resident.loaded_at = None
        resident.evict_after_drain = False
        to = AdapterState.HOST if resident.has_host_image else AdapterState.ABSENT
        self.change(resident, to, detail, reason=reason)
        return freed

    def drop_host(self, resident: Resident, detail: str) -> int:
        """Returns the bytes freed, 0 when there is no image."""
        if not resident.has_host_image:
            return 0
        freed = self._loader.drop_host(resident.digest)
        resident.has_host_image = False
        self.host_bytes_used -= resident.size.host_bytes
        if resident.state is AdapterState.HOST:
            resident.phases = {}
            self.change(resident, AdapterState.ABSENT, detail)
        return freed

    def check_invariants(self) -> None:
        """Assert that the books agree with each other. O(adapters): for tests and idle time."""
        residents = self.residents.values()
        device = sum(r.size.device_bytes for r in residents if r.state in ON_DEVICE)
        host_images = [
            r for r in residents if r.has_host_image or r.state is AdapterState.HOST_LOADING
        ]
        host = sum(r.size.host_bytes for r in host_images)
        assert device == self.device_bytes_used <= self.device_bytes_total, "device bytes"
        assert self.device_bytes_total <= self.device_bytes_max, "device bytes exceed the most"
        assert host == self.host_bytes_used, "host bytes"
        assert host <= self.host_bytes_total or len(host_images) <= 1, (
            "host bytes exceed the budget"
        )
        for r in residents:
            if r.running:
                assert r.state in (AdapterState.DEVICE, AdapterState.DRAINING), (
                    f"{r} runs off device"
                )
            if r.state in (AdapterState.HOST, AdapterState.DEVICE_LOADING):
                assert r.has_host_image, f"{r} has no host image"
        wants = sorted((rank, digest) for rank, names in self.wants.items() for digest in names)
        assert wants == sorted((rank, r.digest) for r in residents for rank in r.wants), "wants"
        off_device = [r for r in residents if r.wants and r.state is not AdapterState.DEVICE]
        assert self.queue == sorted((r.wants[0], r.digest) for r in off_device), "queue"


def _add(phases: dict[Phase, float], more: Seconds) -> None:
    for phase, seconds in more.items():
        phases[phase] = phases.get(phase, 0.0) + seconds

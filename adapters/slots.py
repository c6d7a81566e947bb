"""Which adapter is where, and which should be. Moves nothing itself: a `Loader` does.

    ABSENT -> HOST_LOADING -> HOST -> DEVICE_LOADING -> DEVICE -> DRAINING -> HOST or ABSENT
    any load that fails -> FAILED -> (after a back-off, or when an operator asks) ABSENT

Three kinds of use keep an adapter: *running* sequences hold it on the device, *waiting* ones want
it there (each want has a rank: lower goes first), *pins* keep it. Room is bytes, known from the
manifest before anything is loaded.

The rules, in the order of the queue of wants:

* nothing is evicted that a running sequence, a pin or an equally early or earlier want needs;
* a load to the host may run ahead of room on the device; it then waits, and its requests with it,
  for a "slot";
* among what may go, the unwanted go before the latest wanted, the longest unused first;
* a want that waits for room longer than `patience_s` starts to drain unpinned adapters that
  others keep busy: no new sequence may start on those, so their last running one frees the room.
  Nobody starves.

Host images stay after the copy to the device while `host_bytes_total` allows, so a later load
skips the file. One image may always exist, else nothing could be loaded at all with a host budget
of 0.

All calls come from one thread. S-LoRA: 2311.03285.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.residency import AdapterSize, AdapterState, LoadDone, Loader, Stage

Rank = tuple[int, int]  # (priority, arrival)
OnTransition = Callable[[str, AdapterState, AdapterState, float, str], None]

_ON_DEVICE = (AdapterState.DEVICE_LOADING, AdapterState.DEVICE, AdapterState.DRAINING)
_LOADING = (AdapterState.HOST_LOADING, AdapterState.DEVICE_LOADING)
_MAX_LOADS = 2  # per stage: one runs, one is ready to; later ranks are not committed early
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0


@dataclass(slots=True, eq=False)
class Resident:
    """One adapter's books. Read them freely; only `AdapterSlots` writes."""

    digest: str
    size: AdapterSize
    since: float  # clock of the last change of state
    state: AdapterState = AdapterState.ABSENT
    has_host_image: bool = False
    running: int = 0
    wants: list[Rank] = field(default_factory=list)  # sorted
    pinned: bool = False
    refused: bool = False  # being forgotten: no new requests
    evict_after_drain: bool = False  # drained by order of an operator, not for room
    loaded_at: float | None = None  # clock
    last_used_at: float | None = None  # clock
    tick: int = 0  # of the last use, for LRU
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


class AdapterSlots:
    """`device_bytes_total` and `host_bytes_total` bound what the loader holds.

    `on_transition(digest, before, after, seconds spent in before, detail)` is called on every
    change of state.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        device_bytes_total: int,
        host_bytes_total: int,
        on_transition: OnTransition | None = None,
        patience_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device_bytes_total = device_bytes_total
        self.host_bytes_total = host_bytes_total
        self.on_transition = on_transition
        self.num_loads = 0  # to the device, ever
        self.num_evictions = 0  # from the device, ever
        self.load_seconds = 0.0  # of both stages, ever
        self._loader = loader
        self._patience_s = patience_s
        self._clock = clock
        self._residents: dict[str, Resident] = {}
        self._wants: dict[Rank, tuple[str, ...]] = {}
        self._queue: list[tuple[Rank, str]] = []  # earliest want of each adapter not on the device
        self._failed: list[WantFailed] = []
        self._in_flight = {Stage.HOST: 0, Stage.DEVICE: 0}
        self._device_bytes_used = 0
        self._host_bytes_used = 0
        self._ticks = 0
        self._plan_is_stale = False
        self._plan_again_at = float("inf")

    # --- questions ------------------------------------------------------------------------------

    @property
    def device_bytes_used(self) -> int:
        return self._device_bytes_used

    @property
    def host_bytes_used(self) -> int:
        return self._host_bytes_used

    @property
    def is_loading(self) -> bool:
        return any(self._in_flight.values())

    def residents(self) -> list[Resident]:
        return list(self._residents.values())

    def get(self, digest: str) -> Resident | None:
        return self._residents.get(digest)

    def seconds_ago(self, then: float) -> float:
        """Turns a resident's clock value into an age."""
        return self._clock() - then

    def check(self, digests: Iterable[str]) -> None:
        """Refuse at once what can never be resident, together, as things stand.

        Raises: AdapterError with code adapter_not_found (or the loader's reason),
        adapter_load_failed (it failed lately; the message says when it is tried again),
        adapter_deleted, adapter_too_large, adapter_no_room.
        """
        wanted = {digest: self._resident(digest) for digest in digests}
        for resident in wanted.values():
            if resident.refused:
                raise AdapterError(
                    f"adapter {resident.digest} is being deleted", code="adapter_deleted"
                )
            wait_s = resident.retry_at - self._clock()
            if resident.state is AdapterState.FAILED and wait_s > 0:
                raise AdapterError(
                    f"{resident.error}; tried again in {wait_s:.0f} s, or now by an explicit load",
                    code=resident.error_code,
                )
        problem = self._never_fits(wanted)
        if problem is not None:
            raise problem

    def is_ready(self, digests: Iterable[str]) -> bool:
        """All are on the device and take new sequences."""
        residents = map(self._residents.get, digests)
        return all(r is not None and r.state is AdapterState.DEVICE for r in residents)

    def waits_for_room(self, digests: Iterable[str]) -> bool:
        """Of adapters that are not ready: is it room on the device ("slot"), not the load, that
        lacks?
        """
        return any(
            self._residents[digest].state in (AdapterState.HOST, AdapterState.DRAINING)
            for digest in digests
        )

    # --- use ------------------------------------------------------------------------------------

    def want(self, rank: Rank, digests: Iterable[str]) -> None:
        """A request waits for these (checked before). Loading starts with the next `advance`."""
        assert rank not in self._wants, f"want {rank} is registered already"
        self._wants[rank] = names = tuple(dict.fromkeys(digests))
        for digest in names:
            resident = self._resident(digest)
            if resident.state is AdapterState.FAILED:
                self._change(resident, AdapterState.ABSENT, "retry")
            if resident.state is AdapterState.DEVICE:
                resident.hits += 1
            self._unqueue(resident)
            insort(resident.wants, rank)
            self._enqueue(resident)

    def unwant(self, rank: Rank) -> None:
        """The want came true, or its request is gone. Unknown ranks (failed before) are fine."""
        for digest in self._wants.pop(rank, ()):
            resident = self._residents[digest]
            self._unqueue(resident)
            del resident.wants[bisect_left(resident.wants, rank)]
            self._enqueue(resident)

    def acquire(self, digests: Iterable[str]) -> None:
        """A sequence starts running on these, which are ready. Each stays until as many
        `release`s.
        """
        for digest in digests:
            resident = self._residents[digest]
            assert resident.state is AdapterState.DEVICE, f"{digest} is {resident.state}"
            resident.running += 1
            self._touch(resident)

    def release(self, digests: Iterable[str]) -> None:
        for digest in digests:
            resident = self._residents[digest]
            assert resident.running > 0, f"{digest} is not in use"
            resident.running -= 1
            self._touch(resident)
            self._end_drain(resident)

    # --- the step -------------------------------------------------------------------------------

    def advance(self) -> list[WantFailed]:
        """Take in the loads that ended, begin those that can; returns the wants that failed since
        the last call.
        """
        for done in self._loader.poll():
            self._finish_load(done)
        if self._plan_is_stale or self._clock() >= self._plan_again_at:
            self._plan()
        failed, self._failed = self._failed, []
        return failed

    # --- orders of an operator ------------------------------------------------------------------

    def retry(self, digest: str) -> None:
        """Forget that it failed, so that the next `check` and `want` try it again now."""
        self._resident(digest).retry_at = 0.0

    def pin(self, digest: str) -> Resident:
        """Keep it on the device once it is there. Raises: AdapterError(code="adapter_no_room")."""
        resident = self._resident(digest)
        pinned = [r for r in self._residents.values() if r.pinned and r is not resident]
        pinned_bytes = sum(r.size.device_bytes for r in pinned)
        if pinned_bytes + resident.size.device_bytes > self.device_bytes_total:
            raise AdapterError(
                f"cannot pin adapter {digest}: its {resident.size.device_bytes} bytes and the "
                f"{pinned_bytes} bytes of {len(pinned)} pinned adapters exceed the "
                f"{self.device_bytes_total} bytes of adapter memory; unpin one or raise "
                "--adapter-memory",
                code="adapter_no_room",
            )
        resident.pinned = True
        if resident.state is AdapterState.DRAINING:
            resident.evict_after_drain = False
            self._change(resident, AdapterState.DEVICE, "pinned")
        self._plan_is_stale = True
        return resident

    def unpin(self, digest: str) -> Resident:
        resident = self._resident(digest)
        resident.pinned = False
        self._plan_is_stale = True
        return resident

    def evict_device(self, digest: str, *, drain: bool) -> int | None:
        """Free its device pages: the bytes freed, or None = not yet (loading, or draining), ask
        again later.

        Raises: AdapterError(code="adapter_in_use" when sequences run on it and not `drain`,
        "adapter_pinned").
        """
        resident = self._residents.get(digest)
        if resident is None:
            return 0
        if resident.pinned:
            raise AdapterError(f"adapter {digest} is pinned; unpin it first", code="adapter_pinned")
        if resident.state is AdapterState.DEVICE_LOADING:
            return None
        if resident.state not in _ON_DEVICE:
            return 0
        if resident.running == 0:
            return self._drop_device(resident, "evicted by order")
        if not drain:
            raise AdapterError(
                f"adapter {digest} is in use by {resident.running} running sequences; "
                "wait for them, or evict with drain=true",
                code="adapter_in_use",
            )
        resident.evict_after_drain = True
        if resident.state is AdapterState.DEVICE:
            self._change(resident, AdapterState.DRAINING, "evicted by order")
        return None

    def stop_draining(self, digest: str) -> None:
        """The operator gave up waiting: it serves again."""
        resident = self._residents.get(digest)
        if resident is not None and resident.state is AdapterState.DRAINING:
            resident.evict_after_drain = False
            self._change(resident, AdapterState.DEVICE, "drain timed out")

    def evict_host(self, digest: str) -> int | None:
        """Free its host image: the bytes freed, or None = not yet, it is being copied."""
        resident = self._residents.get(digest)
        if resident is None:
            return 0
        if resident.state in _LOADING:
            return None
        return self._drop_host(resident, "evicted by order")

    def refuse(self, digest: str, refused: bool) -> None:
        """From now on `check` refuses it (or does no longer)."""
        resident = self._residents.get(digest)
        if resident is not None:
            resident.refused = refused

    def fail_wants(self, digest: str, code: str, message: str) -> None:
        """Withdraw every want of it; the next `advance` reports them as failed."""
        resident = self._residents.get(digest)
        for rank in list(resident.wants) if resident is not None else ():
            self.unwant(rank)
            self._failed.append(WantFailed(rank, code, message))

    def forget(self, digest: str) -> tuple[int, int] | None:
        """Free both tiers and drop the books: (device, host) bytes freed, or None = not yet: used
        or loading.
        """
        resident = self._residents.get(digest)
        if resident is None:
            return (0, 0)
        if resident.running or resident.wants or resident.state in _LOADING:
            return None
        device = self._drop_device(resident, "deleted") if resident.state in _ON_DEVICE else 0
        host = self._drop_host(resident, "deleted")
        del self._residents[digest]
        return (device, host)

    # --- inside: books --------------------------------------------------------------------------

    def _resident(self, digest: str) -> Resident:
        resident = self._residents.get(digest)
        if resident is None:
            resident = Resident(digest, self._loader.describe(digest), self._clock())
            self._residents[digest] = resident
        return resident

    def _touch(self, resident: Resident) -> None:
        self._ticks += 1
        resident.tick = self._ticks
        resident.last_used_at = self._clock()
        self._plan_is_stale = True

    def _change(self, resident: Resident, state: AdapterState, detail: str = "") -> None:
        now = self._clock()
        before, seconds = resident.state, now - resident.since
        self._unqueue(resident)
        resident.state, resident.since = state, now
        self._enqueue(resident)
        self._plan_is_stale = True
        if self.on_transition is not None:
            self.on_transition(resident.digest, before, state, seconds, detail)

    def _enqueue(self, resident: Resident) -> None:
        """Keep in `_queue` exactly the wanted that are not on the device."""
        if resident.wants and resident.state is not AdapterState.DEVICE:
            insort(self._queue, (resident.wants[0], resident.digest))
        else:
            resident.no_room_since = None
        self._plan_is_stale = True

    def _unqueue(self, resident: Resident) -> None:
        if resident.wants and resident.state is not AdapterState.DEVICE:
            del self._queue[bisect_left(self._queue, (resident.wants[0], resident.digest))]

    def _never_fits(self, wanted: dict[str, Resident]) -> AdapterError | None:
        need = sum(resident.size.device_bytes for resident in wanted.values())
        names = ", ".join(wanted)
        if need > self.device_bytes_total:
            return AdapterError(
                f"adapter {names} needs {need} bytes on the device (rank "
                f"{'+'.join(str(r.size.rank) for r in wanted.values())}), more than the "
                f"{self.device_bytes_total} bytes of adapter memory; raise --adapter-memory",
                code="adapter_too_large",
            )
        pinned = [r for d, r in self._residents.items() if r.pinned and d not in wanted]
        pinned_bytes = sum(resident.size.device_bytes for resident in pinned)
        if need + pinned_bytes > self.device_bytes_total:
            return AdapterError(
                f"adapter {names} needs {need} bytes on the device, but {len(pinned)} pinned "
                f"adapters hold {pinned_bytes} of {self.device_bytes_total} bytes; unpin one or "
                "raise --adapter-memory",
                code="adapter_no_room",
            )
        return None

    # --- inside: loads --------------------------------------------------------------------------

    def _finish_load(self, done: LoadDone) -> None:
        resident = self._residents[done.digest]
        self._in_flight[done.stage] -= 1
        self.load_seconds += done.seconds
        if not done.ok:
            self._fail(resident, done)
        elif done.stage is Stage.HOST:
            resident.has_host_image = True
            self._touch(resident)
            self._change(resident, AdapterState.HOST)
        else:
            resident.loads += 1
            self.num_loads += 1
            resident.failures = 0
            resident.error = None
            resident.loaded_at = self._clock()
            self._touch(resident)
            self._change(resident, AdapterState.DEVICE)
            self._make_host_room(0, None)

    def _fail(self, resident: Resident, done: LoadDone) -> None:
        if done.stage is Stage.DEVICE:
            self._device_bytes_used -= resident.size.device_bytes
        else:
            self._host_bytes_used -= resident.size.host_bytes
        backoff_s = min(_FIRST_BACKOFF_S * 2**resident.failures, _MAX_BACKOFF_S)
        resident.failures += 1
        resident.retry_at = self._clock() + backoff_s
        resident.error, resident.error_code = done.error, done.code
        self._change(resident, AdapterState.FAILED, done.error)
        if resident.has_host_image:
            self._drop_host(resident, "failed")  # it may be the image that is bad
        self.fail_wants(resident.digest, done.code, done.error)

    def _plan(self) -> None:
        """Walk the wants in order; begin what can begin, stop where an earlier one lacks room."""
        self._plan_is_stale = False
        self._plan_again_at = float("inf")
        device_is_open = host_is_open = True
        for rank, digest in list(self._queue):
            resident = self._residents[digest]
            if resident.state is AdapterState.HOST and device_is_open:
                device_is_open = self._begin_device_load(resident, rank)
            elif resident.state is AdapterState.ABSENT and host_is_open:
                host_is_open = self._begin_host_load(resident, rank)
            if not (device_is_open or host_is_open):
                break

    def _begin_host_load(self, resident: Resident, rank: Rank) -> bool:
        if self._in_flight[Stage.HOST] >= _MAX_LOADS:
            return False
        if not self._make_host_room(resident.size.host_bytes, rank):
            return False
        self._host_bytes_used += resident.size.host_bytes
        self._in_flight[Stage.HOST] += 1
        self._change(resident, AdapterState.HOST_LOADING)
        self._loader.begin_host_load(resident.digest)
        return True

    def _begin_device_load(self, resident: Resident, rank: Rank) -> bool:
        if self._in_flight[Stage.DEVICE] >= _MAX_LOADS:
            return False
        if not self._make_device_room(resident, rank):
            self._lack_room(resident, rank)
            return False
        resident.no_room_since = None
        self._device_bytes_used += resident.size.device_bytes
        self._in_flight[Stage.DEVICE] += 1
        self._change(resident, AdapterState.DEVICE_LOADING)
        self._loader.begin_device_load(resident.digest)
        return True

    def _lack_room(self, resident: Resident, rank: Rank) -> None:
        """Wait a while for room to come by itself, then drain busy adapters for it; fail if pins
        hold it all.
        """
        problem = self._never_fits(
            {digest: self._residents[digest] for digest in self._wants[rank]}
        )
        if problem is not None:
            self.unwant(rank)
            self._failed.append(WantFailed(rank, problem.code, problem.message))
            return
        now = self._clock()
        if resident.no_room_since is None:
            resident.no_room_since = now
        due = resident.no_room_since + self._patience_s
        if now < due:
            self._plan_again_at = due
            return
        missing = resident.size.device_bytes - (self.device_bytes_total - self._device_bytes_used)
        missing -= sum(
            r.size.device_bytes
            for r in self._residents.values()
            if r.state is AdapterState.DRAINING or self._may_leave_device(r, rank)
        )
        for busy in sorted(self._residents.values(), key=lambda r: (r.running, r.tick)):
            if missing <= 0:
                break
            if busy.running and self._may_leave_device(busy, rank, although_busy=True):
                missing -= busy.size.device_bytes
                self._change(busy, AdapterState.DRAINING, f"makes room for {resident.digest}")

    # --- inside: room ---------------------------------------------------------------------------

    def _may_leave_device(self, r: Resident, rank: Rank, *, although_busy: bool = False) -> bool:
        return (
            r.state is AdapterState.DEVICE
            and not r.pinned
            and (although_busy or r.running == 0)
            and not (r.wants and r.wants[0] <= rank)
        )

    def _may_leave_host(self, r: Resident, rank: Rank | None) -> bool:
        if not r.has_host_image or r.state in _LOADING:
            return False
        needs_it = r.state is AdapterState.HOST and bool(r.wants)
        return not (needs_it and (rank is None or r.wants[0] <= rank))

    def _make_device_room(self, resident: Resident, rank: Rank) -> bool:
        missing = self._device_bytes_used + resident.size.device_bytes - self.device_bytes_total
        victims: list[Resident] = []
        if missing > 0:
            leavers = [r for r in self._residents.values() if self._may_leave_device(r, rank)]
            for victim in sorted(leavers, key=_least_useful_first):
                victims.append(victim)
                missing -= victim.size.device_bytes
                if missing <= 0:
                    break
        if missing > 0:
            return False
        for victim in victims:
            self._drop_device(victim, f"makes room for {resident.digest}")
        return True

    def _make_host_room(self, num_bytes: int, rank: Rank | None) -> bool:
        """Drop host images until `num_bytes` more fit, or until none is left (one may always
        exist).
        """
        if self._host_bytes_used + num_bytes <= self.host_bytes_total:
            return True
        leavers = [r for r in self._residents.values() if self._may_leave_host(r, rank)]
        for victim in sorted(leavers, key=_least_useful_first):
            self._drop_host(victim, "makes room on the host")
            if self._host_bytes_used + num_bytes <= self.host_bytes_total:
                return True
        return self._host_bytes_used == 0

    def _drop_device(self, resident: Resident, detail: str) -> int:
        assert resident.running == 0, f"{resident.digest} is in use"
        freed = self._loader.drop_device(resident.digest)
        self._device_bytes_used -= resident.size.device_bytes
        resident.evictions += 1
        self.num_evictions += 1
        resident.loaded_at = None
        resident.evict_after_drain = False
        to = AdapterState.HOST if resident.has_host_image else AdapterState.ABSENT
        self._change(resident, to, detail)
        return freed

    def _drop_host(self, resident: Resident, detail: str) -> int:
        if not resident.has_host_image:
            return 0
        freed = self._loader.drop_host(resident.digest)
        resident.has_host_image = False
        self._host_bytes_used -= resident.size.host_bytes
        if resident.state is AdapterState.HOST:
            self._change(resident, AdapterState.ABSENT, detail)
        return freed

    def _end_drain(self, resident: Resident) -> None:
        if resident.state is not AdapterState.DRAINING or resident.running:
            return
        if (
            not resident.evict_after_drain
        ):  # an operator's drain ends in `evict_device`, who reports the bytes
            self._drop_device(resident, "drained")

    def check_invariants(self) -> None:
        """Assert that the books agree with each other. O(adapters): for tests and idle time."""
        residents = self._residents.values()
        device = sum(r.size.device_bytes for r in residents if r.state in _ON_DEVICE)
        host_images = [
            r for r in residents if r.has_host_image or r.state is AdapterState.HOST_LOADING
        ]
        host = sum(r.size.host_bytes for r in host_images)
        assert device == self._device_bytes_used <= self.device_bytes_total, "device bytes"
        assert host == self._host_bytes_used, "host bytes"
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
        wants = sorted((rank, digest) for rank, names in self._wants.items() for digest in names)
        assert wants == sorted((rank, r.digest) for r in residents for rank in r.wants), "wants"
        off_device = [r for r in residents if r.wants and r.state is not AdapterState.DEVICE]
        assert self._queue == sorted((r.wants[0], r.digest) for r in off_device), "queue"


def _least_useful_first(resident: Resident) -> tuple[bool, Rank, int]:
    """Unwanted before wanted; of the wanted the latest first; then the longest unused first."""
    if not resident.wants:
        return (False, (0, 0), resident.tick)
    priority, arrival = resident.wants[0]
    return (True, (-priority, -arrival), resident.tick)

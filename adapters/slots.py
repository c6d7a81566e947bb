"""Which adapter is where, and which should be. Moves nothing itself: a `Loader` does.

    ABSENT -> HOST_LOADING -> HOST -> DEVICE_LOADING -> DEVICE -> DRAINING -> HOST or ABSENT
    any load that fails -> FAILED -> (after a back-off, or when an operator asks) ABSENT

Three kinds of use keep an adapter: *running* sequences hold it on the device, *waiting* ones want
it there (each want has a rank: lower goes first), *pins* keep it. Room is bytes, known from the
manifest before anything is loaded.

This is the face of it: the questions of the scheduler, the uses, and the orders of an operator.
The state is in `books.py`; what is loaded and evicted, by which rules, in `load_planner.py`.

All calls come from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from loraplex.adapters.books import (
    LOADING,
    ON_DEVICE,
    Books,
    OnTransition,
    Rank,
    Resident,
    WantFailed,
)
from loraplex.adapters.errors import AdapterError
from loraplex.adapters.load_planner import LoadPlanner, is_idle
from loraplex.adapters.residency import AdapterState, Lender, Loader, Stage


class AdapterSlots:
    """`device_bytes_total` and `host_bytes_total` bound what the loader holds. With a `lender` the
    former changes by `resize_device`, up to `device_bytes_max`.

    `on_transition` is called on every change of state.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        device_bytes_total: int,
        host_bytes_total: int,
        device_bytes_max: int | None = None,
        on_transition: OnTransition | None = None,
        patience_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loader = loader
        self._clock = clock
        self._books = Books(
            loader,
            device_bytes_total=device_bytes_total,
            device_bytes_max=device_bytes_max or device_bytes_total,
            host_bytes_total=host_bytes_total,
            on_transition=on_transition,
            clock=clock,
        )
        self._residents = self._books.residents
        self._planner = LoadPlanner(self._books, patience_s)

    @property
    def on_transition(self) -> OnTransition | None:
        return self._books.on_transition

    @on_transition.setter
    def on_transition(self, on_transition: OnTransition | None) -> None:
        self._books.on_transition = on_transition

    @property
    def lender(self) -> Lender:
        return self._planner.lender

    @lender.setter
    def lender(self, lender: Lender) -> None:
        self._planner.lender = lender

    # --- questions ------------------------------------------------------------------------------

    @property
    def device_bytes_total(self) -> int:
        return self._books.device_bytes_total

    @property
    def device_bytes_max(self) -> int:
        """What the total may grow to."""
        return self._books.device_bytes_max

    @property
    def device_bytes_used(self) -> int:
        return self._books.device_bytes_used

    @property
    def host_bytes_total(self) -> int:
        return self._books.host_bytes_total

    @property
    def host_bytes_used(self) -> int:
        return self._books.host_bytes_used

    @property
    def num_loads(self) -> int:
        """To the device, ever."""
        return self._books.num_loads

    @property
    def num_evictions(self) -> int:
        """From the device, ever."""
        return self._books.num_evictions

    @property
    def load_seconds(self) -> float:
        """Of both stages, ever."""
        return self._books.load_seconds

    @property
    def num_joins(self) -> int:
        """Wants that found their load wanted or under way already, ever."""
        return self._books.num_joins

    @property
    def num_refusals(self) -> int:
        """Requests refused because their adapter failed lately, ever."""
        return self._books.num_refusals

    @property
    def is_loading(self) -> bool:
        return any(self._books.loads_under_way.values())

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
        wanted = {digest: self._books.open(digest) for digest in digests}
        for resident in wanted.values():
            if resident.refused:
                raise AdapterError(
                    f"adapter {resident.digest} is being deleted", code="adapter_deleted"
                )
            wait_s = resident.retry_at - self._clock()
            if resident.state is AdapterState.FAILED and wait_s > 0:
                self._books.num_refusals += 1
                raise AdapterError(
                    f"{resident.error}; tried again in {wait_s:.0f} s, or now by an explicit load",
                    code=resident.error_code,
                )
        problem = self._planner.never_fits(wanted)
        if problem is not None:
            raise problem

    def invocations(self, digests: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The invocation tokens of those that have some. They were checked before."""
        sizes = {digest: self._residents[digest].size for digest in digests}
        return {d: size.invocation_tokens for d, size in sizes.items() if size.invocation_tokens}

    def needing_weight_one(self, digests: Iterable[str]) -> list[str]:
        """Those that can be neither scaled nor composed. They were checked before."""
        return [d for d in digests if self._residents[d].size.needs_weight_one]

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

    def pages_to_load(self, digests: Iterable[str]) -> int:
        """Pages of these that are not on the device."""
        residents = [self._residents.get(digest) for digest in digests]
        return sum(r.size.pages for r in residents if r is not None and r.state not in ON_DEVICE)

    # --- use ------------------------------------------------------------------------------------

    def want(self, rank: Rank, digests: Iterable[str]) -> None:
        """A request waits for these (checked before). Loading starts with the next `advance`."""
        self._books.want(rank, digests)

    def unwant(self, rank: Rank) -> None:
        """The want came true, or its request is gone. Unknown ranks (failed before) are fine."""
        self._books.unwant(rank)

    def acquire(self, digests: Iterable[str]) -> None:
        """A sequence starts running on these, which are ready. Each stays until as many
        `release`s.
        """
        for digest in digests:
            resident = self._residents[digest]
            assert resident.state is AdapterState.DEVICE, f"{digest} is {resident.state}"
            resident.running += 1
            self._books.count_use(resident)

    def release(self, digests: Iterable[str]) -> None:
        for digest in digests:
            resident = self._residents[digest]
            assert resident.running > 0, f"{digest} is not in use"
            resident.running -= 1
            self._books.touch(resident)
            is_over = resident.state is AdapterState.DRAINING and resident.running == 0
            # An operator's drain ends in `evict_device`, who reports the bytes.
            if is_over and not resident.evict_after_drain:
                self._books.drop_device(resident, "drained", "room")

    # --- the step -------------------------------------------------------------------------------

    def advance(self) -> list[WantFailed]:
        """Take in the loads that ended, begin those that can; returns the wants that failed since
        the last call.
        """
        books = self._books
        for done in self._loader.poll():
            books.end_load(done)
            if done.ok and done.stage is Stage.DEVICE:
                self._planner.trim_host()
        self._planner.plan()
        failed, books.failed = books.failed, []
        return failed

    # --- memory shared with the KV cache --------------------------------------------------------

    def resize_device(self, num_bytes: int) -> None:
        """The device's memory for adapters is this now; not less than what is used."""
        assert self.device_bytes_used <= num_bytes <= self.device_bytes_max, f"{num_bytes} bytes"
        self._books.device_bytes_total = num_bytes
        self._books.changed = True

    def limit_device(self, num_bytes: int) -> None:
        """It will never be more than this; what needs more is refused from now on."""
        self._books.device_bytes_max = num_bytes
        self._books.changed = True

    def look_again(self) -> None:
        """There may be room now for what lacked it."""
        self._books.changed = True

    def worth_of_idle(self, digests: Iterable[str], idle_s: float) -> float | None:
        """What keeping these on the device is worth (`eviction.py`), in all; None if one of them
        is in use, wanted, pinned, or was used within the last `idle_s`.
        """
        worth, since = 0.0, self._clock() - idle_s
        for digest in digests:
            resident = self._residents[digest]
            if not is_idle(resident) or (resident.last_used_at or 0.0) > since:
                return None
            worth += self._books.worth(resident, Stage.DEVICE)
        return worth

    def make_way(self, digests: Iterable[str]) -> None:
        """Evict these, which are idle, for the KV cache."""
        for digest in digests:
            self._books.drop_device(self._residents[digest], "makes room for KV blocks", "room")

    # --- orders of an operator ------------------------------------------------------------------

    def retry(self, digest: str) -> None:
        """Forget that it failed, so that the next `check` and `want` try it again now."""
        self._books.open(digest).retry_at = 0.0

    def pin(self, digest: str) -> Resident:
        """Keep it on the device once it is there. Raises: AdapterError(code="adapter_no_room")."""
        resident = self._books.open(digest)
        pinned = [r for r in self._residents.values() if r.pinned and r is not resident]
        pinned_bytes = sum(r.size.device_bytes for r in pinned)
        if pinned_bytes + resident.size.device_bytes > self.device_bytes_max:
            raise AdapterError(
                f"cannot pin adapter {digest}: its {resident.size.device_bytes} bytes and the "
                f"{pinned_bytes} bytes of {len(pinned)} pinned adapters exceed the "
                f"{self.device_bytes_max} bytes of adapter memory; unpin one or raise "
                "--adapter-memory",
                code="adapter_no_room",
            )
        resident.pinned = True
        if resident.state is AdapterState.DRAINING:
            resident.evict_after_drain = False
            self._books.change(resident, AdapterState.DEVICE, "pinned")
        self._books.changed = True
        return resident

    def unpin(self, digest: str) -> Resident:
        resident = self._books.open(digest)
        resident.pinned = False
        self._books.changed = True
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
        if resident.state not in ON_DEVICE:
            return 0
        if resident.running == 0:
            return self._books.drop_device(resident, "evicted by order", "order")
        if not drain:
            raise AdapterError(
                f"adapter {digest} is in use by {resident.running} running sequences; "
                "wait for them, or evict with drain=true",
                code="adapter_in_use",
            )
        resident.evict_after_drain = True
        if resident.state is AdapterState.DEVICE:
            self._books.change(resident, AdapterState.DRAINING, "evicted by order")
        return None

    def stop_draining(self, digest: str) -> None:
        """The operator gave up waiting: it serves again."""
        resident = self._residents.get(digest)
        if resident is not None and resident.state is AdapterState.DRAINING:
            resident.evict_after_drain = False
            self._books.change(resident, AdapterState.DEVICE, "drain timed out")

    def evict_host(self, digest: str) -> int | None:
        """Free its host image: the bytes freed, or None = not yet, it is being copied."""
        resident = self._residents.get(digest)
        if resident is None:
            return 0
        if resident.state in LOADING:
            return None
        return self._books.drop_host(resident, "evicted by order")

    def refuse(self, digest: str, refused: bool) -> None:
        """From now on `check` refuses it (or does no longer)."""
        resident = self._residents.get(digest)
        if resident is not None:
            resident.refused = refused

    def fail_wants(self, digest: str, code: str, message: str) -> None:
        """Withdraw every want of it; the next `advance` reports them as failed."""
        resident = self._residents.get(digest)
        for rank in list(resident.wants) if resident is not None else ():
            self._books.fail_want(rank, code, message)

    def forget(self, digest: str) -> tuple[int, int] | None:
        """Free both tiers and drop the books: (device, host) bytes freed, or None = not yet: used
        or loading.
        """
        resident = self._residents.get(digest)
        if resident is None:
            return (0, 0)
        if resident.running or resident.wants or resident.state in LOADING:
            return None
        device = 0
        if resident.state in ON_DEVICE:
            device = self._books.drop_device(resident, "deleted", "deleted")
        host = self._books.drop_host(resident, "deleted")
        self._books.forget(resident)
        return (device, host)

    def check_invariants(self) -> None:
        """Assert that the books agree with each other. O(adapters): for tests and idle time."""
        self._books.check_invariants()

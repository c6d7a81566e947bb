"""Which loads begin now, and who has to leave for them.

The rules, in the order of the queue of wants:

* nothing is evicted that a running sequence, a pin or an equally early or earlier want needs;
* a load to the host may run ahead of room on the device; it then waits, and its requests with it,
  for a "slot";
* among what may go, the unwanted go before the latest wanted, then what is worth least
  (`eviction.py`), then the longest unused;
* where memory is shared with the KV cache, what holds nothing there is taken before anything is
  evicted, and what has not been used there for longer than the adapter whose turn it would be to go
  is taken before that one;
* a want that waits for room longer than `patience_s` starts to drain unpinned adapters that
  others keep busy: no new sequence may start on those, so their last running one frees the room.
  If all adapters together do not have the room, the KV cache empties some of its. Nobody starves.

Host images stay after the copy to the device while `host_bytes_total` allows, so a later load
skips the file. One image may always exist, else nothing could be loaded at all with a host budget
of 0.

S-LoRA: 2311.03285. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from loraplex.adapters.books import LOADING, Books, Rank, Resident
from loraplex.adapters.errors import AdapterError
from loraplex.adapters.residency import AdapterState, Lender, NoLender, Stage

_MAX_LOADS = 2  # per stage: one runs, one is ready to; later ranks are not committed early


class LoadPlanner:
    def __init__(self, books: Books, patience_s: float) -> None:
        self._books = books
        self._patience_s = patience_s
        self.lender: Lender = NoLender()
        self._again_at = float("inf")  # clock; when a wait for room has lasted long enough

    def plan(self) -> None:
        """Walk the wants in order, if there is a reason to; begin what can begin, stop where an
        earlier one lacks room.
        """
        books = self._books
        if not books.changed and books.clock() < self._again_at:
            return
        books.changed = False
        self._again_at = float("inf")
        device_is_open = host_is_open = True
        for rank, digest in list(books.queue):
            resident = books.residents[digest]
            if resident.state is AdapterState.HOST and device_is_open:
                device_is_open = self._begin_device_load(resident, rank)
            elif resident.state is AdapterState.ABSENT and host_is_open:
                host_is_open = self._begin_host_load(resident, rank)
            if not (device_is_open or host_is_open):
                break
        if device_is_open:
            self.lender.enough()

    def trim_host(self) -> None:
        """Drop images, no longer needed for a load, until the budget is kept."""
        self._make_host_room(0, None)

    def never_fits(self, wanted: dict[str, Resident]) -> AdapterError | None:
        """Why these cannot be on the device together, as things stand."""
        books = self._books
        need = sum(resident.size.device_bytes for resident in wanted.values())
        names = ", ".join(wanted)
        if need > books.device_bytes_max:
            return AdapterError(
                f"adapter {names} needs {need} bytes on the device (rank "
                f"{'+'.join(str(r.size.rank) for r in wanted.values())}), more than the "
                f"{books.device_bytes_max} bytes of adapter memory; raise --adapter-memory",
                code="adapter_too_large",
            )
        pinned = [r for d, r in books.residents.items() if r.pinned and d not in wanted]
        pinned_bytes = sum(resident.size.device_bytes for resident in pinned)
        if need + pinned_bytes > books.device_bytes_max:
            return AdapterError(
                f"adapter {names} needs {need} bytes on the device, but {len(pinned)} pinned "
                f"adapters hold {pinned_bytes} of {books.device_bytes_max} bytes; unpin one or "
                "raise --adapter-memory",
                code="adapter_no_room",
            )
        return None

    # --- inside: loads --------------------------------------------------------------------------

    def _begin_host_load(self, resident: Resident, rank: Rank) -> bool:
        if self._books.loads_under_way[Stage.HOST] >= _MAX_LOADS:
            return False
        if not self._make_host_room(resident.size.host_bytes, rank):
            return False
        self._books.begin_host_load(resident)
        return True

    def _begin_device_load(self, resident: Resident, rank: Rank) -> bool:
        if self._books.loads_under_way[Stage.DEVICE] >= _MAX_LOADS:
            return False
        if not self._make_device_room(resident, rank):
            self._lack_room(resident, rank)
            return False
        self._books.begin_device_load(resident)
        return True

    def _lack_room(self, resident: Resident, rank: Rank) -> None:
        """Wait a while for room to come by itself, then drain busy adapters for it; fail if pins
        hold it all.
        """
        books = self._books
        problem = self.never_fits({digest: books.residents[digest] for digest in books.wants[rank]})
        if problem is not None:
            books.fail_want(rank, problem.code, problem.message)
            return
        now = books.clock()
        if resident.no_room_since is None:
            resident.no_room_since = now
        due = resident.no_room_since + self._patience_s
        if now < due:
            self._again_at = due
            return
        residents = books.residents.values()
        missing = self._missing_on_device(resident)
        missing -= sum(
            r.size.device_bytes
            for r in residents
            if r.state is AdapterState.DRAINING or _may_leave_device(r, rank)
        )
        for busy in sorted(residents, key=lambda r: (r.running, r.tick)):
            if missing <= 0:
                break
            if busy.running and _may_leave_device(busy, rank, although_busy=True):
                missing -= busy.size.device_bytes
                books.change(busy, AdapterState.DRAINING, f"makes room for {resident.digest}")
        if missing > 0:
            self.lender.insist(missing)

    # --- inside: room ---------------------------------------------------------------------------

    def _missing_on_device(self, resident: Resident) -> int:
        books = self._books
        return books.device_bytes_used + resident.size.device_bytes - books.device_bytes_total

    def _make_device_room(self, resident: Resident, rank: Rank) -> bool:
        """Evict and borrow until it fits; nothing is evicted if it will not. False: not yet."""
        lender = self.lender
        missing = self._missing_on_device(resident) - lender.bytes_coming
        if missing > 0:
            lender.lend(missing)
        leavers = [r for r in self._books.residents.values() if _may_leave_device(r, rank)]
        leavers.sort(key=self._least_useful_on(Stage.DEVICE), reverse=True)
        victims: list[Resident] = []
        freed = 0
        while (missing := self._missing_on_device(resident) - freed - lender.bytes_coming) > 0:
            total, coming = self._books.device_bytes_total, lender.bytes_coming
            lender.lend(missing, leavers[-1].last_used_at if leavers else self._books.clock())
            if (total, coming) != (self._books.device_bytes_total, lender.bytes_coming):
                continue
            if not leavers:
                return False
            victims.append(leavers.pop())
            freed += victims[-1].size.device_bytes
        if self._missing_on_device(resident) > freed:
            return False  # some of it is on its way
        for victim in victims:
            self._books.drop_device(victim, f"makes room for {resident.digest}", "room")
        return True

    def _make_host_room(self, num_bytes: int, rank: Rank | None) -> bool:
        """Drop host images until `num_bytes` more fit, or until none is left (one may always
        exist).
        """
        books = self._books
        if books.host_bytes_used + num_bytes <= books.host_bytes_total:
            return True
        leavers = [r for r in books.residents.values() if _may_leave_host(r, rank)]
        for victim in sorted(leavers, key=self._least_useful_on(Stage.HOST)):
            books.drop_host(victim, "makes room on the host")
            if books.host_bytes_used + num_bytes <= books.host_bytes_total:
                return True
        return books.host_bytes_used == 0

    def _least_useful_on(self, tier: Stage) -> Callable[[Resident], tuple[object, ...]]:
        """A sort key: unwanted before wanted; of the wanted the latest first."""

        def key(r: Resident) -> tuple[object, ...]:
            worth = self._books.worth(r, tier)
            if not r.wants:
                return (False, 0, worth, r.tick)
            return (True, -r.wants[0], worth, r.tick)

        return key


def _may_leave_device(r: Resident, rank: Rank, *, although_busy: bool = False) -> bool:
    return (
        r.state is AdapterState.DEVICE
        and not r.pinned
        and (although_busy or r.running == 0)
        and not (r.wants and r.wants[0] <= rank)
    )


def is_idle(r: Resident) -> bool:
    """On the device, and nobody would miss it now."""
    return r.state is AdapterState.DEVICE and not (r.pinned or r.running or r.wants)


def _may_leave_host(r: Resident, rank: Rank | None) -> bool:
    if not r.has_host_image or r.state in LOADING:
        return False
    needs_it = r.state is AdapterState.HOST and bool(r.wants)
    return not (needs_it and (rank is None or r.wants[0] <= rank))

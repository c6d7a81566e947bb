"""The questions and orders of an operator (`api.Call`), and their answers.

Most are answered at once; those that must wait (for a load, for running sequences to end) are
generators that the engine resumes between steps: `yield` means "not yet". Knows nothing of
processes or sockets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from loraplex.adapters.books import Rank, Resident, WantFailed
from loraplex.adapters.errors import AdapterError
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine import api
from loraplex.engine.errors import AdapterInUse, AdapterUnavailable, EngineError, InvalidRequest
from loraplex.engine.seams import Prober

logger = logging.getLogger(__name__)

_IN_USE_CODES = ("adapter_in_use", "adapter_pinned")

# Yields None for "not yet" or, at most once, an early answer after which it works on unheard.
Order = Generator[object | None, None, object]


@dataclass(slots=True, eq=False)
class _Pending:
    call: api.Call
    order: Order
    is_answered: bool = False


class Host(Protocol):
    """What orders need of the engine."""

    def stats(self) -> api.EngineStats: ...
    def memory(self) -> api.MemoryInfo: ...
    def requests(self) -> list[api.RequestInfo]: ...
    def reset_prefix_cache(self) -> bool: ...
    def next_rank(self) -> Rank: ...
    def fail_users(self, digest: str, error: api.ErrorInfo) -> None: ...
    def prober(self) -> Prober: ...


def engine_error(error: AdapterError) -> EngineError:
    """The adapters' layer's error as the engine's."""
    kind = AdapterInUse if error.code in _IN_USE_CODES else AdapterUnavailable
    return kind(error.message, code=error.code)


def error_info(error: EngineError) -> api.ErrorInfo:
    return api.ErrorInfo(error.code, error.message, type(error).code)


def residency_info(slots: AdapterSlots, r: Resident) -> api.AdapterResidencyInfo:
    def unix(then: float | None) -> float | None:
        return None if then is None else time.time() - slots.seconds_ago(then)

    return api.AdapterResidencyInfo(
        digest=r.digest,
        state=api.AdapterState(r.state.value),
        rank=r.size.rank,
        pages=r.size.pages,
        device_bytes=r.size.device_bytes,
        host_bytes=r.size.host_bytes,
        running=r.running,
        waiting=len(r.wants),
        pinned=r.pinned,
        loaded_at=unix(r.loaded_at),
        last_used_at=unix(r.last_used_at),
        hits=r.hits,
        loads=r.loads,
        evictions=r.evictions,
        error=r.error,
    )


class Orders:
    """`answer` is called exactly once per call, with the same `call_id`."""

    def __init__(
        self,
        host: Host,
        slots: AdapterSlots,
        answer: Callable[[api.Answer], None],
        clock: Callable[[], float],
    ) -> None:
        self._host = host
        self._slots = slots
        self._answer = answer
        self._clock = clock
        self._pending: list[_Pending] = []
        self._loads: dict[Rank, str] = {}  # ordered here and under way: the digest
        self._failed_wants: dict[Rank, WantFailed] = {}
        self._kept: set[str] = set()  # to be forgotten no more
        self._methods: dict[str, Callable[[api.Call], object]] = {
            "memory": lambda call: host.memory(),
            "stats": lambda call: host.stats(),
            "requests": lambda call: host.requests(),
            "reset_prefix_cache": lambda call: host.reset_prefix_cache(),
            "adapters": lambda call: [residency_info(slots, r) for r in slots.residents()],
            "unpin": lambda call: residency_info(slots, slots.unpin(call.digest)),
            "load": self._load,
            "pin": self._pin,
            "evict": self._evict,
            "forget": self._forget,
            "keep": self._keep,
            "probe": self._probe,
        }

    def __len__(self) -> int:
        return len(self._pending)

    def take(self, call: api.Call) -> None:
        """Answer it now, or keep it until it can be."""
        method = self._methods.get(call.method)
        try:
            if method is None:
                raise InvalidRequest(
                    f"unknown method {call.method!r}; known: {', '.join(sorted(self._methods))}"
                )
            result = method(call)
        except (EngineError, AdapterError) as error:
            self._refuse(call, error)
            return
        if isinstance(result, Generator):
            pending = _Pending(call, result)
            if not self._resume(pending):
                self._pending.append(pending)
        else:
            self._reply(call, result)

    def poll(self) -> None:
        """Resume what waits."""
        self._pending = [pending for pending in self._pending if not self._resume(pending)]

    def want_failed(self, failed: WantFailed) -> None:
        """One of the loads ordered here will not happen."""
        if failed.rank in self._loads:
            self._failed_wants[failed.rank] = failed

    # --- inside ---------------------------------------------------------------------------------

    def _resume(self, pending: _Pending) -> bool:
        """Returns whether it is over."""
        try:
            early = next(pending.order)
        except StopIteration as end:
            if not pending.is_answered:
                self._reply(pending.call, end.value)
            return True
        except (EngineError, AdapterError) as error:
            if not pending.is_answered:
                self._refuse(pending.call, error)
            return True
        if early is not None:
            self._reply(pending.call, early)
            pending.is_answered = True
        return False

    def _reply(self, call: api.Call, result: object) -> None:
        self._answer(api.Answer(call.call_id, msgspec.Raw(msgspec.msgpack.encode(result))))

    def _refuse(self, call: api.Call, error: EngineError | AdapterError) -> None:
        if isinstance(error, AdapterError):
            error = engine_error(error)
        self._answer(api.Answer(call.call_id, error=error_info(error)))

    def _deadline(self, call: api.Call) -> float:
        return float("inf") if call.timeout_s is None else self._clock() + call.timeout_s

    def _info(self, digest: str) -> api.AdapterResidencyInfo:
        resident = self._slots.get(digest)
        assert resident is not None, f"{digest} has no books"
        return residency_info(self._slots, resident)

    def _load(self, call: api.Call) -> Order:
        """To the device, whatever its queue of requests. A failure lately is no hindrance."""
        slots, deadline = self._slots, self._deadline(call)
        slots.retry(call.digest)
        slots.check([call.digest])
        rank = self._host.next_rank()
        slots.want(rank, [call.digest])
        self._loads[rank] = call.digest
        try:
            if not call.wait:
                yield self._info(call.digest)
            while not slots.is_ready([call.digest]):
                failed = self._failed_wants.get(rank)
                if failed is not None:
                    raise AdapterUnavailable(failed.message, code=failed.code)
                if self._clock() >= deadline:
                    raise AdapterUnavailable(
                        f"adapter {call.digest} was not loaded within {call.timeout_s} s",
                        code="adapter_load_timeout",
                    )
                yield None
        finally:
            del self._loads[rank]
            self._failed_wants.pop(rank, None)
            slots.unwant(rank)
        return self._info(call.digest)

    def _pin(self, call: api.Call) -> Order:
        """Pin, and load in the background if it is not on the device."""
        self._slots.retry(call.digest)
        self._slots.check([call.digest])
        self._slots.pin(call.digest)
        return self._load(msgspec.structs.replace(call, wait=False, timeout_s=None))

    def _probe(self, call: api.Call) -> Order:
        """Read its files, load it, then run it: running streams wait for two short steps at once,
        and for as many once more.
        """
        prober = self._host.prober()
        self._slots.retry(call.digest)
        self._slots.check([call.digest])
        reading = prober.read(call.digest)
        while not reading.done():
            yield None
        source = reading.result()
        yield from self._load(msgspec.structs.replace(call, wait=True))
        try:
            paged = prober.run_paged(source)
            yield None
            return prober.compare(source, paged)
        except Exception as error:  # of the device, or of an adapter whose files changed
            logger.exception("probing adapter %s failed", call.digest[:12])
            raise EngineError(
                f"the probe of adapter {call.digest[:12]} failed: {type(error).__name__}: {error}",
                code="probe_failed",
            ) from error

    def _evict(self, call: api.Call) -> Order:
        """From the device; with tier "host" from the host as well. Drains first when told to."""
        slots, deadline = self._slots, self._deadline(call)
        if call.tier not in ("device", "host"):
            raise InvalidRequest(f"tier={call.tier!r}: must be device or host")
        while (device_bytes := slots.evict_device(call.digest, drain=call.drain)) is None:
            if self._clock() >= deadline:
                slots.stop_draining(call.digest)
                raise AdapterInUse(
                    f"adapter {call.digest} is still in use after {call.timeout_s} s; it serves on"
                )
            yield None
        if call.tier == "device":
            return api.FreedBytes(device_bytes=device_bytes)
        while (host_bytes := slots.evict_host(call.digest)) is None:
            yield None
        return api.FreedBytes(device_bytes=device_bytes, host_bytes=host_bytes)

    def _forget(self, call: api.Call) -> Order:
        """Refuse new requests now; free all when the present ones ended or, by force, were
        failed. Loads that only an order wants are ended; one that is under way is waited for.
        """
        slots, digest = self._slots, call.digest
        deadline = self._clock() if call.force and not call.timeout_s else self._deadline(call)
        slots.refuse(digest, True)
        self._kept.discard(digest)
        while (freed := slots.forget(digest)) is None:
            if digest in self._kept:
                return api.FreedBytes()
            if not self._is_used(digest):
                self._end_loads(digest)
            elif self._clock() >= deadline:
                if not call.force:
                    slots.refuse(digest, False)
                    raise AdapterInUse(
                        f"adapter {digest} is still in use after {call.timeout_s} s; "
                        "delete it with force to fail its requests"
                    )
                error = AdapterUnavailable(
                    f"adapter {digest} was deleted while this request used it",
                    code="adapter_deleted",
                )
                self._host.fail_users(digest, error_info(error))
                slots.fail_wants(digest, error.code, error.message)
            yield None
        return api.FreedBytes(device_bytes=freed[0], host_bytes=freed[1])

    def _keep(self, call: api.Call) -> bool:
        """It is needed after all: take requests again. Was it about to be forgotten?"""
        resident = self._slots.get(call.digest)
        if resident is None or not resident.refused:
            return False
        self._slots.refuse(call.digest, False)
        self._kept.add(call.digest)
        return True

    def _is_used(self, digest: str) -> bool:
        """By requests; the loads of orders do not count."""
        resident = self._slots.get(digest)
        if resident is None:
            return False
        return resident.running > 0 or any(rank not in self._loads for rank in resident.wants)

    def _end_loads(self, digest: str) -> None:
        for rank, wanted in self._loads.items():
            if wanted == digest and rank not in self._failed_wants:
                self._slots.unwant(rank)
                self._failed_wants[rank] = WantFailed(
                    rank, "adapter_deleted", f"adapter {digest} was deleted while it was loaded"
                )

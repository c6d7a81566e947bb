"""Limits of tenants and keys: requests per second, tokens per minute, requests at once.

Token buckets: a limit of R per second lets through at most R x t + one second's worth in any t
seconds; tokens likewise with a minute's worth. A prompt is taken when it is admitted, output as it
comes: a running request is not cut, the next one waits until the debt is paid. Exact within one API
process; each of several keeps its own count, so together they let through as many times that.

Knows nothing of HTTP but the names of the headers, which are OpenAI's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError

Clock = Callable[[], float]
BUSY_RETRY_S = 1.0  # when as many as allowed run: nobody knows when one ends


class Bucket:
    """Refills at `rate` per second up to `capacity`; may be overdrawn."""

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self.rate, self.capacity = rate, capacity
        self.level = capacity
        self._at = now

    def refill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self._at) * self.rate)
        self._at = now

    def seconds_until(self, amount: float) -> float:
        """How long until the level is there; what is more than fits is there when it is full."""
        return max(0.0, (min(amount, self.capacity) - self.level) / self.rate)


class Meter:
    """What one tenant, or one key, has used of its limits."""

    def __init__(self, what: str, limits: Mapping[str, Any], now: float) -> None:
        self.what = what  # "this API key", "tenant 'acme'"
        self.limits = dict(limits)
        self.running = 0
        rate, tokens = limits.get("requests_per_s"), limits.get("tokens_per_min")
        self.requests = None if rate is None else Bucket(rate, max(1.0, rate), now)
        self.tokens = None if tokens is None else Bucket(tokens / 60, tokens, now)

    def change(self, limits: Mapping[str, Any], now: float) -> None:
        """New limits begin full; what runs goes on."""
        fresh = Meter(self.what, limits, now)
        self.limits, self.requests, self.tokens = fresh.limits, fresh.requests, fresh.tokens

    def check_request(self, now: float) -> None:
        """Raises: ApiError(rate_limit_exceeded)."""
        most = self.limits.get("max_concurrent")
        if most is not None and self.running >= most:
            raise _exceeded(f"{self.what} has {most} requests running, its limit", BUSY_RETRY_S)
        for bucket, amount, named in (
            (self.requests, 1.0, "requests_per_s"),
            (self.tokens, 0.0, "tokens_per_min"),
        ):
            if bucket is not None:
                bucket.refill(now)
                self._check(bucket, amount, named)

    def check_tokens(self, amount: int, now: float) -> None:
        """Raises: ApiError(rate_limit_exceeded)."""
        if self.tokens is not None:
            self.tokens.refill(now)
            self._check(self.tokens, amount, "tokens_per_min")

    def _check(self, bucket: Bucket, amount: float, named: str) -> None:
        wait = bucket.seconds_until(amount)
        if wait > 1e-9:
            raise _exceeded(f"{self.what} is over its {named} of {self.limits[named]:g}", wait)


@dataclass(slots=True, eq=False)
class Lease:
    """One request's place. `end` gives it back, exactly once, however the request ended."""

    admission: Admission
    caller: Caller
    meters: tuple[Meter, ...] = ()
    answer_ids: list[str] = field(default_factory=list)
    facts: dict[str, str | int] = field(default_factory=dict)  # of the request, for its trace

    def begin(self, answer_id: str, num_prompt_tokens: int) -> None:
        """What the request is, once that is known. Raises: ApiError(rate_limit_exceeded)."""
        now = self.admission.clock()
        for meter in self.meters:
            meter.check_tokens(num_prompt_tokens, now)
        self.charge(num_prompt_tokens)
        self.answer_ids.append(answer_id)
        self.admission.running.setdefault(answer_id, []).append(self.caller)

    def charge(self, tokens: int) -> None:
        """Tokens that came."""
        for meter in self.meters:
            if meter.tokens is not None:
                meter.tokens.level -= tokens

    def headers(self) -> dict[str, str]:
        """How much of the limits is left now."""
        return _headers(self.meters, self.admission.clock())

    def end(self) -> None:
        for meter in self.meters:
            meter.running -= 1
        self.meters = ()
        running = self.admission.running
        for answer_id in self.answer_ids:
            running[answer_id].remove(self.caller)
            if not running[answer_id]:
                del running[answer_id]
        self.answer_ids.clear()


class Admission:
    """For one event loop: every request that is let in has a lease until it ends."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.running: dict[str, list[Caller]] = {}  # by answer
        self.num_leases = 0
        self._meters: dict[tuple[str, str], Meter] = {}

    def admit(self, caller: Caller) -> Lease:
        """Raises: ApiError(rate_limit_exceeded); then nothing was taken from any limit."""
        now = self.clock()
        meters = []
        if caller.key_limits:
            key = ("key", caller.key_id)
            meters.append(self._meter(key, "this API key", caller.key_limits, now))
        if caller.tenant is not None and caller.tenant_limits:
            key = ("tenant", caller.tenant)
            meters.append(self._meter(key, f"tenant {caller.tenant!r}", caller.tenant_limits, now))
        try:
            for meter in meters:
                meter.check_request(now)
        except ApiError as error:
            error.headers.update(_headers(meters, now))
            raise
        for meter in meters:
            meter.running += 1
            if meter.requests is not None:
                meter.requests.level -= 1
        return Lease(self, caller, tuple(meters))

    def is_of(self, request_id: str, caller: Caller) -> bool:
        """The sequence was begun by a key of the caller's tenant. Its id is its answer's id and its
        index; of two requests that were given one id nobody is told.
        """
        callers = self.running.get(request_id.rpartition("-")[0], [])
        return bool(callers) and all(known.tenant == caller.tenant for known in callers)

    def _meter(
        self, key: tuple[str, str], what: str, limits: Mapping[str, Any], now: float
    ) -> Meter:
        meter = self._meters.get(key)
        if meter is None:
            meter = self._meters[key] = Meter(what, limits, now)
        elif meter.limits != limits:
            meter.change(limits, now)
        return meter


def _headers(meters: Sequence[Meter], now: float) -> dict[str, str]:
    """Of each kind of limit the one that is nearest."""
    found: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        buckets: list[Bucket] = [b for m in meters if (b := getattr(m, kind)) is not None]
        if not buckets:
            continue
        for bucket in buckets:
            bucket.refill(now)
        nearest = min(buckets, key=lambda bucket: bucket.level)
        found[f"x-ratelimit-limit-{kind}"] = f"{math.floor(nearest.capacity)}"
        found[f"x-ratelimit-remaining-{kind}"] = f"{max(0, math.floor(nearest.level))}"
        found[f"x-ratelimit-reset-{kind}"] = _duration(nearest.seconds_until(nearest.capacity))
    return found


def _exceeded(why: str, retry_after_s: float) -> ApiError:
    seconds = max(1, math.ceil(retry_after_s))
    error = ApiError("rate_limit_exceeded", f"{why}; try again in {seconds} s")
    error.headers["retry-after"] = str(seconds)
    return error


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `20ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{math.floor(rest)}s" if minutes else f"{rest:.3g}s"

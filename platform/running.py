"""Whose the requests are that run now: the engine knows no tenants."""

from __future__ import annotations

from loraplex.platform.callers import Caller


class RunningRequests:
    """For one event loop. A sequence's id is its answer's id and its index."""

    def __init__(self) -> None:
        self._tenants: dict[str, str] = {}

    def begin(self, answer_id: str, caller: Caller) -> None:
        self._tenants[answer_id] = caller.billed

    def end(self, answer_id: str) -> None:
        self._tenants.pop(answer_id, None)

    def is_of(self, request_id: str, caller: Caller) -> bool:
        """The sequence was begun by a key of the caller's tenant."""
        return self._tenants.get(request_id.rpartition("-")[0]) == caller.tenant

    def __len__(self) -> int:
        return len(self._tenants)

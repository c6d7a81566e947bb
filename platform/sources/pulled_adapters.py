"""Adapters together with their pulls: what a client sees, and what a delete takes along."""

from __future__ import annotations

from loraplex.platform.adapter_service import AdapterService
from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.names import Reference
from loraplex.platform.schemas import AdapterDeleted, AdapterDetail, Freed
from loraplex.platform.sources import pull_view
from loraplex.platform.sources.pulls import PullService
from loraplex.platform.sources.schemas import AdapterWithPull, PendingAdapter


class PulledAdapters:
    def __init__(self, adapters: AdapterService, pulls: PullService) -> None:
        self._adapters = adapters
        self._pulls = pulls

    async def get(self, caller: Caller, text: str) -> AdapterWithPull | PendingAdapter:
        """An adapter with all its versions and its last pull; before the first version, the pull.

        Raises: ApiError(adapter_not_found).
        """
        detail: AdapterDetail | None = None
        try:
            detail = await self._adapters.get(caller, text)
        except ApiError as error:
            reference = Reference.parse(text)
            if error.code != "adapter_not_found" or reference is None or not reference.is_bare:
                raise
            pending = await self._pending(caller, text)
            if pending is None:
                raise
            return pending
        pull = await self._pulls.find(caller, detail.id)
        return AdapterWithPull(**dict(detail), pull=pull)

    async def _pending(self, caller: Caller, name: str) -> PendingAdapter | None:
        row, pull = await self._pulls.row(caller, name), await self._pulls.find(caller, name)
        return None if row is None or pull is None else pull_view.pending_adapter(row, pull)

    async def delete(
        self,
        caller: Caller,
        name: str,
        *,
        version: int | None,
        force: bool,
        drain_timeout_s: float | None,
    ) -> AdapterDeleted:
        """As AdapterService.delete; without a version also the pull, which is cancelled first."""
        pulled = False
        if version is None:
            pulled = await self._pulls.stop(caller, name) is not None
            pulled |= await self._pulls.find(caller, name) is not None
        try:
            deleted = await self._adapters.delete(
                caller, name, version=version, force=force, drain_timeout_s=drain_timeout_s
            )
        except ApiError as error:
            if error.code != "adapter_not_found" or not pulled:
                raise
            deleted = AdapterDeleted(id=name, versions=[], freed=Freed())
        if pulled:
            await self._pulls.forget(caller, name)
        return deleted

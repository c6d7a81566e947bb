"""Aliases of adapters: movable names for one version, or for several by weight; their history, and
the way back.

Every change is one transaction, seen by the next request that resolves the alias; requests that run
keep what they resolved. Knows nothing of HTTP bodies or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraplex.platform import adapter_view
from loraplex.platform.adapter_service import require_adapter, require_own
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.models import Adapter, Alias, AliasRevision
from loraplex.platform.names import adapter_not_found, check_alias
from loraplex.platform.proof_view import refusal
from loraplex.platform.repositories import AdapterRepository, AliasRepository
from loraplex.platform.resolution import Resolver
from loraplex.platform.schemas import (
    AliasHistory,
    AliasList,
    AliasObject,
    AliasOrder,
)

PAGE = 50


class AliasService:
    def __init__(self, db: Database, resolver: Resolver) -> None:
        self._db = db
        self._resolver = resolver

    async def list(self, caller: Caller, name: str) -> AliasList:
        async with self._db.read() as session:
            adapter = await require_adapter(AdapterRepository(session, caller), name)
        rows = (row for row in adapter.aliases if row.targets)
        return AliasList(data=[adapter_view.alias_object(caller, adapter, row) for row in rows])

    async def get(self, caller: Caller, name: str, alias: str) -> AliasObject:
        async with self._db.read() as session:
            adapter = await require_adapter(AdapterRepository(session, caller), name)
        return adapter_view.alias_object(caller, adapter, _find(adapter, alias))

    async def set(self, caller: Caller, name: str, alias: str, order: AliasOrder) -> AliasObject:
        """Raises: ApiError(invalid_request | adapter_not_found | adapter_not_ready)."""
        check_alias(alias)
        async with self._db.unit_of_work() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            param = "version" if order.version is not None else "split"
            _check(adapter, order.weights, param)
            row = AliasRepository(session).move(adapter, alias, order.weights, caller.actor)
        self._resolver.forget()
        return adapter_view.alias_object(caller, adapter, row)

    async def delete(self, caller: Caller, name: str, alias: str) -> None:
        """Raises: ApiError(adapter_not_found | alias_not_found)."""
        async with self._db.unit_of_work() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            _find(adapter, alias)
            AliasRepository(session).move(adapter, alias, {}, caller.actor)
        self._resolver.forget()

    async def history(
        self, caller: Caller, name: str, alias: str, *, before: int, limit: int
    ) -> AliasHistory:
        """Newest first, also of an alias that was deleted; for its tenant, as it names keys."""
        async with self._db.read() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            row = _find(adapter, alias, deleted_too=True)
            found = await AliasRepository(session).history(row, before=before, limit=limit + 1)
        return AliasHistory(
            data=[adapter_view.alias_revision(revision) for revision in found[:limit]],
            has_more=len(found) > limit,
        )

    async def rollback(
        self, caller: Caller, name: str, alias: str, revision: int | None
    ) -> AliasObject:
        """Let an alias mean again what it meant at `revision`; without one, before what it means
        now. That is a revision of its own: nothing of the history is lost.

        Raises: ApiError(adapter_not_found | adapter_not_ready | alias_not_found |
        rollback_impossible).
        """
        async with self._db.unit_of_work() as session:
            adapter = await require_own(AdapterRepository(session, caller), name)
            aliases = AliasRepository(session)
            row = _find(adapter, alias, deleted_too=True)
            target = await _target(aliases, row, revision)
            split = {item["version"]: item["weight"] for item in target.split}
            _check(adapter, split, "revision")
            restores = target.restores or target.revision
            aliases.move(adapter, alias, split, caller.actor, restores=restores)
        self._resolver.forget()
        return adapter_view.alias_object(caller, adapter, row)


async def _target(aliases: AliasRepository, alias: Alias, revision: int | None) -> AliasRevision:
    """The revision to go back to.

    Without a number, what the alias meant before. A rollback stands where the revision stands that
    it restored, so that the next one goes further back, not to what was rolled away from.
    """
    name = f"{alias.alias!r}"
    if revision is not None:
        found = await aliases.revision(alias, revision)
        if found is None or not found.split:
            why = "does not exist" if found is None else "deleted it"
            raise _impossible(f"revision {revision} of alias {name} {why}", param="revision")
        return found
    now = await aliases.revision(alias, alias.revision)
    assert now is not None, "an alias without its newest revision"
    before = now.restores or now.revision
    while page := await aliases.history(alias, before=before, limit=PAGE):
        for found in page:
            if found.split and found.split != now.split:
                return found
        before = page[-1].revision
    raise _impossible(f"alias {name} has no earlier meaning")


def _impossible(why: str, param: str | None = None) -> ApiError:
    return ApiError(
        "rollback_impossible", f"{why}; GET .../history lists what it has been", param=param
    )


def _check(adapter: Adapter, split: Mapping[int, int], param: str) -> None:
    """Raises: ApiError(adapter_not_found | adapter_not_ready | adapter_proof_failed) for the first
    version of a split that cannot be used.
    """
    versions = {row.version: row for row in adapter.versions}
    for version in split:
        row, reference = versions.get(version), f"{adapter.name}@{version}"
        if row is None or row.status == "draining":
            raise adapter_not_found(reference, param=param)
        refused = refusal(row)
        if refused is not None:
            raise refused.error(reference, param)


def _find(adapter: Adapter, alias: str, *, deleted_too: bool = False) -> Alias:
    """Raises: ApiError(alias_not_found)."""
    row = next((row for row in adapter.aliases if row.alias == alias), None)
    if row is None or not (row.targets or deleted_too):
        raise ApiError(
            "alias_not_found",
            f"adapter {adapter.name!r} has no alias {alias[:140]!r}",
            param="alias",
        )
    return row

"""What a reference means right now: the one place where names become contents.

A request resolves once, when it is accepted, and keeps the digest it got: whatever moves afterwards
is for later requests. Answers are cached until the registry changes through this process.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.models import AdapterVersion
from loraplex.platform.names import DEFAULT_ALIAS, Reference, adapter_not_found
from loraplex.platform.proof_view import Refusal, refusal
from loraplex.platform.repositories import AdapterRepository
from loraplex.platform.split import choose

MAX_CACHED_REFERENCES = 16_384


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """One version of one adapter. `refusal` says why it cannot be used."""

    name: str
    version: int
    version_id: int
    digest: str
    rank: int
    refusal: Refusal | None = None

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class _Meaning:
    """The versions behind a reference, at least one, and their weights.

    `name` is the same however the reference was written, so that a key gets the same version.
    """

    name: str
    versions: dict[int, ResolvedAdapter]
    weights: dict[int, int]

    def only(self, text: str, param: str | None) -> ResolvedAdapter:
        if len(self.versions) > 1:
            named = ", ".join(self.versions[number].reference for number in sorted(self.versions))
            raise ApiError(
                "alias_is_split",
                f"{text!r} is split over {named}; name one of them",
                param=param,
            )
        return next(iter(self.versions.values()))


class Resolver:
    """For one process. Whoever changes the registry calls `forget` after the commit."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._cache: dict[str, _Meaning] = {}
        self._generation = 0

    def forget(self) -> None:
        self._cache.clear()
        self._generation += 1

    async def choose(self, text: str, key: str, *, param: str | None = None) -> ResolvedAdapter:
        """The version that a request with this key runs on. Equal keys get equal versions.

        Raises: ApiError(adapter_not_found | adapter_not_ready | adapter_proof_failed).
        """
        meaning = await self._meaning(text, param)
        version = choose(meaning.name, meaning.weights, key)
        return _ready(meaning.versions[version], text, param)

    async def one(self, text: str) -> ResolvedAdapter:
        """The version that an operator's order is about.

        Raises: ApiError(adapter_not_found | adapter_not_ready | adapter_proof_failed |
        alias_is_split).
        """
        return _ready((await self._meaning(text, None)).only(text, None), text, None)

    async def find(self, text: str) -> ResolvedAdapter:
        """Like `one`, in whatever state it is.

        Raises: ApiError(adapter_not_found | alias_is_split).
        """
        return (await self._read(text, None, include_draining=True)).only(text, None)

    async def _meaning(self, text: str, param: str | None) -> _Meaning:
        found = self._cache.get(text)
        if found is None:
            generation = self._generation
            found = await self._read(text, param)
            if generation == self._generation:
                if len(self._cache) >= MAX_CACHED_REFERENCES:
                    self._cache.clear()
                self._cache[text] = found
        return found

    async def _read(
        self, text: str, param: str | None, *, include_draining: bool = False
    ) -> _Meaning:
        reference = Reference.parse(text)
        if reference is None:
            raise adapter_not_found(text, param=param)
        async with self._db.read() as session:
            rows = await AdapterRepository(session).resolve(
                reference, include_draining=include_draining
            )
        if not rows:
            raise adapter_not_found(text, param=param)
        return _Meaning(
            name=f"{reference.name}:{reference.alias or DEFAULT_ALIAS}",
            versions={row.version: _resolved(row) for row, _ in rows},
            weights={row.version: weight for row, weight in rows},
        )


def _resolved(row: AdapterVersion) -> ResolvedAdapter:
    return ResolvedAdapter(
        name=row.adapter.name,
        version=row.version,
        version_id=row.id,
        digest=row.digest,
        rank=row.manifest["rank"],
        refusal=refusal(row),
    )


def _ready(adapter: ResolvedAdapter, text: str, param: str | None) -> ResolvedAdapter:
    if adapter.refusal is not None:
        named = text if text == adapter.reference else f"{text} ({adapter.reference})"
        raise adapter.refusal.error(named, param)
    return adapter

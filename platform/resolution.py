"""What a reference means right now: the one place where names become contents.

A request resolves once, when it is accepted, and keeps the digest it got: whatever moves afterwards
is for later requests. Answers are cached until the registry changes through this process.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.platform.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.models import DEFAULT_TENANT, AdapterVersion
from loraplex.platform.names import DEFAULT_ALIAS, Reference, adapter_not_found
from loraplex.platform.proof_view import Refusal, refusal
from loraplex.platform.repositories import AdapterRepository
from loraplex.platform.split import choose

MAX_CACHED_REFERENCES = 16_384


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """One version of one adapter. `name` is as the caller says it, `tenant` whose it is. `refusal`
    says why it cannot be used.
    """

    name: str
    tenant: str
    version: int
    version_id: int
    digest: str
    rank: int
    features: tuple[str, ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    refusal: Refusal | None = None
    defaults: AdapterDefaults = NO_DEFAULTS

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def label(self) -> str:
        """The name for an operator, the same whoever asks."""
        name = self.name.rpartition("/")[2]
        return name if self.tenant == DEFAULT_TENANT else f"{self.tenant}/{name}"


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
    """For one process. Whoever changes the registry calls `forget` after the commit.

    What another tenant keeps to itself is not there: the error is that of a name nobody has.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._cache: dict[tuple[object, str], _Meaning] = {}
        self._generation = 0

    def forget(self) -> None:
        self._cache.clear()
        self._generation += 1

    async def choose(
        self, caller: Caller, text: str, key: str, *, param: str | None = None
    ) -> ResolvedAdapter:
        """The version that a request with this key runs on. Equal keys get equal versions.

        Raises: ApiError(adapter_not_found | adapter_not_ready | adapter_proof_failed).
        """
        meaning = await self._meaning(caller, text, param)
        version = choose(meaning.name, meaning.weights, key)
        return _ready(meaning.versions[version], text, param)

    async def one(self, caller: Caller, text: str) -> ResolvedAdapter:
        """The version that an operator's order is about.

        Raises: ApiError(adapter_not_found | adapter_not_ready | adapter_proof_failed |
        alias_is_split).
        """
        return _ready((await self._meaning(caller, text, None)).only(text, None), text, None)

    async def find(self, caller: Caller, text: str) -> ResolvedAdapter:
        """Like `one`, in whatever state it is.

        Raises: ApiError(adapter_not_found | alias_is_split).
        """
        return (await self._read(caller, text, None, include_draining=True)).only(text, None)

    async def _meaning(self, caller: Caller, text: str, param: str | None) -> _Meaning:
        key = (caller.view, text)
        found = self._cache.get(key)
        if found is None:
            generation = self._generation
            found = await self._read(caller, text, param)
            if generation == self._generation:
                if len(self._cache) >= MAX_CACHED_REFERENCES:
                    self._cache.clear()
                self._cache[key] = found
        return found

    async def _read(
        self, caller: Caller, text: str, param: str | None, *, include_draining: bool = False
    ) -> _Meaning:
        reference = Reference.parse(text)
        if reference is None:
            raise adapter_not_found(text, param=param)
        async with self._db.read() as session:
            rows = await AdapterRepository(session, caller).resolve(
                reference, include_draining=include_draining
            )
        if not rows:
            raise adapter_not_found(text, param=param)
        owner = rows[0][0].adapter.tenant
        prefix = "" if owner == DEFAULT_TENANT else f"{owner}/"
        return _Meaning(
            name=f"{prefix}{reference.name}:{reference.alias or DEFAULT_ALIAS}",
            versions={row.version: _resolved(row, caller) for row, _ in rows},
            weights={row.version: weight for row, weight in rows},
        )


def _resolved(row: AdapterVersion, caller: Caller) -> ResolvedAdapter:
    return ResolvedAdapter(
        name=caller.shown(row.adapter.tenant, row.adapter.name),
        tenant=row.adapter.tenant,
        version=row.version,
        version_id=row.id,
        digest=row.digest,
        rank=row.manifest["rank"],
        features=tuple(row.manifest.get("features") or ()),
        invocation_tokens=tuple(row.manifest.get("invocation_tokens") or ()),
        refusal=refusal(row),
        defaults=AdapterDefaults.stored(row.adapter.defaults, row.shipped_defaults),
    )


def _ready(adapter: ResolvedAdapter, text: str, param: str | None) -> ResolvedAdapter:
    if adapter.refusal is not None:
        named = text if text == adapter.reference else f"{text} ({adapter.reference})"
        raise adapter.refusal.error(named, param)
    return adapter

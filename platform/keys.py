"""API keys: how they are made, and who a key stands for. Checked from memory.

A key is `lpx_ID_SECRET`, ID to be seen and SECRET 256 random bits; the registry has the sha256 of
the whole. The keys are read again when this process changed one, or at most `RECHECK_S` after
another one did (`loraplex key` works on the registry directly).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from loraplex.platform.callers import Caller, Scope
from loraplex.platform.db import Database
from loraplex.platform.errors import ApiError
from loraplex.platform.models import DEFAULT_TENANT, ApiKey, Tenant, utc_now
from loraplex.platform.names import NAME
from loraplex.platform.tenant_repositories import KeyRepository, TenantRepository

PREFIX = "lpx"
RECHECK_S = 2.0
_NOBODY = "0" * 64


def new_key() -> tuple[str, str, str]:
    """(id, the whole key, its hash)."""
    key_id = secrets.token_hex(6)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    return key_id, key, hash_of(key)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Known:
    hash: str
    caller: Caller
    expires_at: datetime | None
    refusal: str | None  # why it is not good any more


class KeyRing:
    """For one event loop. `operator_keys` are those of the settings."""

    def __init__(self, db: Database, operator_keys: Sequence[str]) -> None:
        self._db = db
        self._operators = [
            (hash_of(key), Caller(actor=f"key:{hash_of(key)[:8]}", key_id=hash_of(key)[:8]))
            for key in operator_keys
        ]
        self._known: dict[str, _Known] = {}
        self._tenant_limits: dict[str, dict[str, Any]] = {}
        self._state: object = None
        self._checked_at = -math.inf
        self._generation = 0
        self._reading = asyncio.Lock()

    @property
    def required(self) -> bool:
        """Once there was a key, also one that was revoked, nobody gets in without."""
        return bool(self._operators or self._known)

    def forget(self) -> None:
        """A key or tenant was changed; the next request sees it."""
        self._checked_at, self._state = -math.inf, None
        self._generation += 1

    async def caller(self, authorization: str, tenant: str) -> Caller:
        """Who sends this header. tenant: the header `x-tenant`, empty without.

        Raises: ApiError(invalid_api_key | invalid_request).
        """
        if time.monotonic() - self._checked_at >= RECHECK_S:
            await self._recheck()
        found = self._caller(authorization) if self.required else Caller()
        home = tenant or found.tenant or DEFAULT_TENANT
        if not NAME.fullmatch(home):
            raise ApiError("invalid_request", f"x-tenant: {home[:140]!r} is no tenant's name")
        limits = self._tenant_limits.get(found.tenant or "", {})
        if home == found.home and limits is found.tenant_limits:
            return found
        return replace(found, home=home, tenant_limits=limits)

    def _caller(self, authorization: str) -> Caller:
        scheme, _, key = authorization.partition(" ")
        given = hash_of(key.strip())
        # Digests are compared, every operator's: the time says nothing about any of them.
        matches = [who for known, who in self._operators if hmac.compare_digest(known, given)]
        known = self._known.get(_id_of(key.strip()))
        is_known = hmac.compare_digest(_NOBODY if known is None else known.hash, given)
        if scheme.lower() == "bearer":
            if matches:
                return matches[0]
            if known is not None and is_known:
                return _usable(known)
        raise ApiError(
            "invalid_api_key", "a valid API key is needed: send it as `Authorization: Bearer KEY`"
        )

    async def _recheck(self) -> None:
        async with self._reading:
            now = time.monotonic()
            if now - self._checked_at < RECHECK_S:
                return  # somebody else just did
            generation = self._generation
            async with self._db.read() as session:
                keys, tenants = KeyRepository(session), TenantRepository(session)
                state = (await keys.state(), await tenants.state())
                if state != self._state:
                    rows = await keys.all()  # first: no key is older than its tenant
                    found = {row.name: row for row in await tenants.all()}
                    self._known = {row.id: _known(row, found) for row in rows}
                    self._tenant_limits = {name: row.limits for name, row in found.items()}
                    self._state = state
            if generation == self._generation:  # else what was read may be old already
                self._checked_at = now


def _id_of(key: str) -> str:
    prefix, _, rest = key.partition("_")
    return rest.partition("_")[0] if prefix == PREFIX else ""


def _usable(known: _Known) -> Caller:
    refusal = known.refusal
    if refusal is None and known.expires_at is not None and known.expires_at <= utc_now():
        refusal = "has expired"
    if refusal is not None:
        raise ApiError("invalid_api_key", f"this API key {refusal}")
    return known.caller


def _known(row: ApiKey, tenants: dict[str, Tenant]) -> _Known:
    tenant = None if row.tenant is None else tenants[row.tenant]
    refusal = None
    if row.revoked_at is not None:
        refusal = "was revoked"
    elif tenant is not None and tenant.disabled_at is not None:
        refusal = f"is of tenant {tenant.name!r}, which is disabled"
    home = row.tenant or DEFAULT_TENANT
    caller = Caller(
        actor=f"key:{row.id}",
        tenant=row.tenant,
        home=home,
        key_id=row.id,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        adapters=None
        if row.adapters is None
        else frozenset(name if "/" in name else f"{home}/{name}" for name in row.adapters),
        key_limits=row.limits,
        tenant_limits={} if tenant is None else tenant.limits,
    )
    return _Known(row.hash, caller, row.expires_at, refusal)

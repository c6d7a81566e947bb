"""Who asks: an operator or a tenant's key, and what of the registry that may see and change.

Knows nothing of HTTP, databases or how a key is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from loraplex.platform.errors import ApiError
from loraplex.platform.models import DEFAULT_TENANT

if TYPE_CHECKING:
    from loraplex.platform.limits import Lease

ANONYMOUS = "anonymous"


class Scope(StrEnum):
    """What a key is good for; none of them includes another."""

    INFER = "infer"
    UPLOAD = "upload"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` None: an operator, who sees and changes everything. `home`: whose adapters a bare
    name means. `adapters`: the only ones this key may see, as `tenant/name`; None = no such list.
    `lease`: the place of the request that asks.
    """

    actor: str = ANONYMOUS
    tenant: str | None = None
    home: str = DEFAULT_TENANT
    key_id: str = ""
    scopes: frozenset[Scope] = ALL_SCOPES
    adapters: frozenset[str] | None = None
    key_limits: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tenant_limits: Mapping[str, Any] = field(default_factory=dict, compare=False)
    lease: Lease | None = field(default=None, compare=False, repr=False)

    @property
    def is_operator(self) -> bool:
        return self.tenant is None

    @property
    def view(self) -> tuple[str | None, str, frozenset[str] | None]:
        """All that decides what a reference means for this caller."""
        return (self.tenant, self.home, self.adapters)

    @property
    def billed(self) -> str:
        """The tenant that its use is counted for."""
        return self.tenant or self.home

    def cache_salt(self, asked: str) -> str:
        """Tenants share no cached prefixes: how fast an answer is tells nothing of another's."""
        return asked if self.tenant is None else f"{self.tenant}/{asked}"

    @property
    def share(self) -> float:
        """Of the engine, against other tenants' shares."""
        return float(self.tenant_limits.get("share") or 1.0)

    def priority(self, asked: int) -> int:
        """Lower is earlier. A tenant may let others go first, not itself."""
        return asked if self.tenant is None else max(0, asked)

    def shown(self, owner: str, name: str) -> str:
        """How this caller names an adapter."""
        return name if owner == self.home else f"{owner}/{name}"

    def may_change(self, owner: str) -> bool:
        return self.tenant is None or self.tenant == owner

    def check_may_change(self, owner: str, what: str) -> None:
        """For what the caller can see. Raises: ApiError(permission_denied)."""
        if not self.may_change(owner):
            raise ApiError(
                "permission_denied", f"{what} belongs to tenant {owner!r}: you may use it, only"
            )

    def check_may_register(self, name: str | None = None) -> None:
        """Adapters of the home, and one of this name. Raises: ApiError(permission_denied)."""
        if not self.may_change(self.home):
            raise ApiError(
                "permission_denied",
                f"a key of tenant {self.tenant!r} makes adapters of its own only",
            )
        listed = self.adapters
        if name is not None and listed is not None and f"{self.home}/{name}" not in listed:
            raise ApiError(
                "permission_denied", f"this API key is for some adapters only, not for {name!r}"
            )

    def check_operator(self, what: str) -> None:
        """Raises: ApiError(permission_denied)."""
        if not self.is_operator:
            raise ApiError("permission_denied", f"{what} takes an operator's key, without a tenant")


def system(actor: str, tenant: str | None = None) -> Caller:
    """The server itself, or one of its commands; with a tenant, what it does on its behalf."""
    return Caller(actor=actor, tenant=tenant, home=tenant or DEFAULT_TENANT)

"""Tenants, keys and their limits as clients send and see them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraplex.platform.callers import Scope
from loraplex.platform.names import NAME
from loraplex.platform.schemas import TenantName

_Count = Annotated[int, Field(ge=0, le=2**53)]
ListedAdapter = Annotated[str, Field(pattern=f"^({NAME.pattern}/)?{NAME.pattern}$")]


class KeyLimits(BaseModel):
    """Null = no limit."""

    model_config = ConfigDict(extra="forbid")

    requests_per_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    tokens_per_min: Annotated[int, Field(gt=0, le=2**53)] | None = None
    max_concurrent: Annotated[int, Field(gt=0, le=2**31)] | None = None


class TenantLimits(KeyLimits):
    """Of all keys of a tenant together, and of what it keeps here."""

    max_adapters: _Count | None = None
    max_bytes: _Count | None = None
    # Of the engine while it is busy, against other tenants' shares; 1 unless said otherwise.
    share: Annotated[float, Field(ge=0.01, le=100)] | None = None


class TenantOrder(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: TenantName
    description: Annotated[str, Field(max_length=10_000)] = ""
    limits: TenantLimits = TenantLimits()


class TenantPatch(BaseModel):
    """What is not sent stays; `limits` is replaced as a whole."""

    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(max_length=10_000)] | None = None
    limits: TenantLimits | None = None
    disabled: bool | None = None


class TenantObject(BaseModel):
    name: str
    object: Literal["tenant"] = "tenant"
    description: str
    limits: TenantLimits
    disabled: bool
    created_at: int


class TenantList(BaseModel):
    object: Literal["list"] = "list"
    data: list[TenantObject]


class KeyOrder(BaseModel):
    """`tenant` null: an operator's key; for a tenant's admin key: its own. `adapters` null: all."""

    model_config = ConfigDict(extra="forbid")

    tenant: TenantName | None = None
    name: Annotated[str, Field(max_length=128)] = ""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = [Scope.INFER]
    expires_in_s: Annotated[float, Field(gt=0, le=3.2e9, allow_inf_nan=False)] | None = None
    adapters: Annotated[list[ListedAdapter], Field(max_length=1000)] | None = None
    limits: KeyLimits = KeyLimits()


class KeyObject(BaseModel):
    """A key as it can be seen: without its secret part."""

    id: str
    object: Literal["api_key"] = "api_key"
    tenant: str | None
    name: str
    scopes: list[Scope]
    adapters: list[str] | None
    limits: KeyLimits
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    status: Literal["active", "expired", "revoked"]


class CreatedKey(KeyObject):
    """`key` is shown this once, and kept nowhere."""

    key: str


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyObject]


def limits_dict(limits: KeyLimits) -> dict[str, Any]:
    """What the registry keeps: only what is limited."""
    return limits.model_dump(exclude_none=True)

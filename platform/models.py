"""The registry's tables. Names of adapters live here and only here: the engine knows digests.

An adapter's version numbers never repeat (`next_version` only grows, also over deletion and
re-creation of the name), so `sql@3` means one content for ever. Rows of versions go when they are
deleted; the audit log stays.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

DEFAULT_TENANT = "default"


def utc_now() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python, whatever the database keeps (SQLite has no time zones)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        assert value is None or value.tzinfo is not None, (
            "naive datetime on its way to the registry"
        )
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcDateTime,
        float: Double(),
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, int]]: JSON(),
        list[str]: JSON(none_as_null=True),
    }


class Tenant(Base):
    """Who owns adapters and keys. `limits` holds what is limited, see `platform/limits.py`."""

    __tablename__ = "tenant"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    description: Mapped[str] = mapped_column(Text, default="")
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    changed_at: Mapped[datetime] = mapped_column(default=utc_now)
    disabled_at: Mapped[datetime | None]  # its keys are refused meanwhile


class ApiKey(Base):
    """A key of a tenant, or of an operator (no tenant). Rows stay when the key is revoked: they say
    whose an audit event or a usage row was, and that this server is not open to everybody.

    Only `hash`, the sha256 of the whole key, is kept. The key is 256 random bits, so a slow hash
    would protect nothing more. `id` is the part of the key that may be seen.
    """

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str | None] = mapped_column(ForeignKey("tenant.name"))
    name: Mapped[str] = mapped_column(String(128), default="")
    scopes: Mapped[list[str]]
    adapters: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))  # None = all
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    changed_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Adapter(Base):
    """One name of one tenant. `deleted_at` keeps the version counter of a deleted name.

    `visibility`: private (its tenant's), shared (with those in `shares` too) or public.
    """

    __tablename__ = "adapter"
    __table_args__ = (UniqueConstraint("tenant", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(128), default=DEFAULT_TENANT)
    name: Mapped[str] = mapped_column(String(128))
    description: Mapped[str] = mapped_column(Text, default="")
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    visibility: Mapped[str] = mapped_column(String(16), default="private", server_default="private")
    defaults: Mapped[dict[str, Any] | None]  # `adapter_defaults.AdapterDefaults`, set by hand
    next_version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None]

    versions: Mapped[list[AdapterVersion]] = relationship(
        back_populates="adapter",
        order_by="AdapterVersion.version",
        lazy="raise",
        cascade="all, delete-orphan",
        passive_deletes=True,
    )
    aliases: Mapped[list[Alias]] = relationship(
        order_by="Alias.alias", lazy="raise", cascade="all, delete-orphan", passive_deletes=True
    )
    shares: Mapped[list[AdapterShare]] = relationship(
        order_by="AdapterShare.tenant",
        lazy="raise",
        cascade="all, delete-orphan",
        passive_deletes=True,
    )


class AdapterShare(Base):
    """One tenant that a shared adapter of another one is shared with.

    It need not exist (no foreign key): whoever shares must not learn who else is here.
    """

    __tablename__ = "adapter_share"

    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True
    )
    tenant: Mapped[str] = mapped_column(String(128), primary_key=True)


class AdapterVersion(Base):
    """One content under one name. `manifest` sums up what validation found out about it (rank,
    modules, sizes...).

    `model_signature` names the module shapes it was validated against; another one at start means:
    check again.
    """

    __tablename__ = "adapter_version"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        Index(None, "digest"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapter.id", ondelete="CASCADE"))
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))
    base_model: Mapped[str] = mapped_column(String(512))
    model_signature: Mapped[str] = mapped_column(String(64))
    manifest: Mapped[dict[str, Any]]
    shipped_defaults: Mapped[dict[str, Any] | None]  # the same, as its files have them
    status: Mapped[str] = mapped_column(String(16), default="ready")  # ready | failed | draining
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    last_used_at: Mapped[datetime | None]
    num_requests: Mapped[int] = mapped_column(BigInteger, default=0)
    num_prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    num_generated_tokens: Mapped[int] = mapped_column(BigInteger, default=0)

    adapter: Mapped[Adapter] = relationship(back_populates="versions", lazy="raise")
    proof: Mapped[Proof | None] = relationship(
        primaryjoin="foreign(AdapterVersion.digest) == Proof.digest", viewonly=True, lazy="joined"
    )


class Proof(Base):
    """What is known about one content beyond its validation, under whatever names it has.

    `damage`: how its stored files differ from what was uploaded. The others are of the last probe
    (`engine/probe.py`), and of the engine it ran in; a number that was none is null. A probe that
    disagrees is accepted up to `accepted_error`, by an operator.
    """

    __tablename__ = "proof"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    damage: Mapped[str | None] = mapped_column(Text)
    probed_at: Mapped[datetime | None]
    agrees: Mapped[bool | None]
    error: Mapped[float | None]
    tolerance: Mapped[float | None]
    base_error: Mapped[float | None]
    effect: Mapped[float | None]
    accepted_error: Mapped[float | None]
    model: Mapped[str | None] = mapped_column(String(512))
    device: Mapped[str | None] = mapped_column(String(64))
    dtype: Mapped[str | None] = mapped_column(String(64))
    backend: Mapped[str | None] = mapped_column(String(64))
    release: Mapped[str | None] = mapped_column(String(64))

    @property
    def is_accepted(self) -> bool:
        limit = self.accepted_error
        return limit is not None and self.error is not None and self.error <= limit

    @property
    def is_refused(self) -> bool:
        """It was probed, and must not be used as it is."""
        return self.probed_at is not None and not self.agrees and not self.is_accepted


class Alias(Base):
    """A movable name: `sql:prod`. `revision` is its newest; without targets it is deleted, and kept
    for its history.
    """

    __tablename__ = "alias"
    __table_args__ = (UniqueConstraint("adapter_id", "alias"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapter.id", ondelete="CASCADE"))
    alias: Mapped[str] = mapped_column(String(128))
    revision: Mapped[int] = mapped_column(default=0)

    targets: Mapped[list[AliasTarget]] = relationship(
        order_by="AliasTarget.version",
        lazy="raise",
        cascade="all, delete-orphan",
        passive_deletes=True,
    )

    @property
    def split(self) -> dict[int, int]:
        """version -> weight; empty = deleted."""
        return {target.version: target.weight for target in self.targets}


class AliasTarget(Base):
    """One version that an alias means, for `weight` parts of its requests."""

    __tablename__ = "alias_target"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            ondelete="CASCADE",
        ),
    )

    alias_id: Mapped[int] = mapped_column(
        ForeignKey("alias.id", ondelete="CASCADE"), primary_key=True
    )
    version: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int]
    weight: Mapped[int]


class AliasRevision(Base):
    """What an alias meant from one change to the next. Never updated.

    `split` is a list of {"version", "weight"}, empty where the alias was deleted; `restores` is the
    earlier revision that a rollback went back to.
    """

    __tablename__ = "alias_revision"
    __table_args__ = (UniqueConstraint("alias_id", "revision"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    alias_id: Mapped[int] = mapped_column(ForeignKey("alias.id", ondelete="CASCADE"))
    revision: Mapped[int]
    at: Mapped[datetime] = mapped_column(default=utc_now)
    actor: Mapped[str] = mapped_column(String(128))
    split: Mapped[list[dict[str, int]]]
    restores: Mapped[int | None]

    alias: Mapped[Alias] = relationship(lazy="raise")


class Pull(Base):
    """The last pull of one name. One that has not ended when a server starts was interrupted.

    `source` is what may be shown of it; `has_secret` says that more was needed (a token, a signed
    URL), which is kept nowhere. `stamp` is a watched folder's state; `pin` the digest it must have.
    """

    __tablename__ = "pull"
    __table_args__ = (UniqueConstraint("tenant", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(128), default=DEFAULT_TENANT)
    name: Mapped[str] = mapped_column(String(128))
    source: Mapped[str] = mapped_column(Text)
    has_secret: Mapped[bool] = mapped_column(default=False)
    revision: Mapped[str | None] = mapped_column(String(256))
    pin: Mapped[str | None] = mapped_column(String(64))
    stamp: Mapped[str | None] = mapped_column(String(128))
    alias: Mapped[str | None] = mapped_column(String(128))
    description: Mapped[str | None] = mapped_column(Text)
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    actor: Mapped[str] = mapped_column(String(128))
    # queued | downloading | validating | ready | failed
    status: Mapped[str] = mapped_column(String(16), default="queued")
    bytes_done: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_total: Mapped[int | None] = mapped_column(BigInteger)
    retries: Mapped[int] = mapped_column(default=0)
    restarts: Mapped[int] = mapped_column(default=0)
    version: Mapped[int | None]
    digest: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    ended_at: Mapped[datetime | None]


class AuditEvent(Base):
    """Who changed what, from what, to what. Never updated, never deleted."""

    __tablename__ = "audit_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=utc_now)
    tenant: Mapped[str] = mapped_column(String(128), default=DEFAULT_TENANT)
    actor: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(256))
    before: Mapped[dict[str, Any] | None]
    after: Mapped[dict[str, Any] | None]


class UsageHour(Base):
    """What one tenant's key used of one composition in one hour, in UTC.

    `adapter`: `sql@3`, several joined by `+`, empty for the base model; another tenant's is
    `tenant/sql@3`. `key_id` is empty without keys.
    """

    __tablename__ = "usage_hour"
    __table_args__ = (UniqueConstraint("hour", "tenant", "key_id", "adapter"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hour: Mapped[datetime]
    tenant: Mapped[str] = mapped_column(String(128))
    key_id: Mapped[str] = mapped_column(String(32))
    adapter: Mapped[str] = mapped_column(String(1024))
    requests: Mapped[int] = mapped_column(BigInteger, default=0)
    failures: Mapped[int] = mapped_column(BigInteger, default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    generated_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    seconds: Mapped[float] = mapped_column(default=0.0)

"""Aliases that split over several versions, with a history.

What an alias meant before becomes its first revision: that version, for all requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "2026_11_24_alias_splits"
down_revision = "2026_11_24_initial"
branch_labels = None
depends_on = None

UTC_TIME = sa.DateTime(timezone=True)
WHOLE = 100  # the weight of an only target
ACTOR = "migration"

VERSION_KEY = ["adapter_version.adapter_id", "adapter_version.version"]


def upgrade() -> None:
    # The table is made anew rather than altered: SQLite cannot drop a foreign key in place.
    before = _rows("SELECT adapter_id, alias, version FROM alias ORDER BY id")
    op.drop_table("alias")
    alias = _create_alias(sa.Column("revision", sa.Integer(), nullable=False))
    target = op.create_table(
        "alias_target",
        sa.Column("alias_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("weight", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["alias_id"], ["alias.id"], name="fk_alias_target_alias_id_alias", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"],
            VERSION_KEY,
            name="fk_alias_target_adapter_id_adapter_version",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("alias_id", "version", name="pk_alias_target"),
    )
    history = op.create_table(
        "alias_revision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alias_id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("at", UTC_TIME, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("split", sa.JSON(), nullable=False),
        sa.Column("restores", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["alias_id"], ["alias.id"], name="fk_alias_revision_alias_id_alias", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_alias_revision"),
        sa.UniqueConstraint("alias_id", "revision", name="uq_alias_revision_alias_id"),
    )
    now = datetime.now(UTC)
    for adapter_id, name, version in before:
        made = _insert(alias, adapter_id=adapter_id, alias=name, revision=1)
        _insert(target, alias_id=made, version=version, adapter_id=adapter_id, weight=WHOLE)
        split = [{"version": version, "weight": WHOLE}]
        _insert(history, alias_id=made, revision=1, at=now, actor=ACTOR, split=split, restores=None)


def downgrade() -> None:
    """A split becomes its heaviest version; the history and deleted aliases go."""
    targets = _rows(
        "SELECT alias.id, alias.adapter_id, alias, version FROM alias"
        " JOIN alias_target ON alias_target.alias_id = alias.id ORDER BY weight, version DESC"
    )
    for table in ("alias_revision", "alias_target", "alias"):
        op.drop_table(table)
    alias = _create_alias(
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"],
            VERSION_KEY,
            name="fk_alias_adapter_id_adapter_version",
            ondelete="CASCADE",
        ),
    )
    heaviest = {id_: (adapter_id, name, version) for id_, adapter_id, name, version in targets}
    for adapter_id, name, version in heaviest.values():
        _insert(alias, adapter_id=adapter_id, alias=name, version=version)


def _create_alias(*more: sa.schema.SchemaItem) -> sa.Table:
    return op.create_table(
        "alias",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        *more,
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapter.id"], name="fk_alias_adapter_id_adapter", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_alias"),
        sa.UniqueConstraint("adapter_id", "alias", name="uq_alias_adapter_id"),
    )


def _rows(query: str) -> Iterable[Any]:
    return op.get_bind().execute(sa.text(query)).all()


def _insert(table: sa.Table, **values: Any) -> Any:
    """Returns the first primary key of the new row."""
    made = op.get_bind().execute(table.insert().values(**values)).inserted_primary_key
    assert made is not None, "an insert of one row has a key"
    return made[0]

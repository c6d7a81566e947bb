"""Tenants, API keys, who sees which adapter, and usage by the hour.

Every tenant that owns adapters already gets a row, `default` in any case; adapters stay private.
"""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "2026_11_29_tenants"
down_revision = "2026_11_24_proofs"
branch_labels = None
depends_on = None

UTC_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    tenant = op.create_table(
        "tenant",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_at", UTC_TIME, nullable=False),
        sa.Column("changed_at", UTC_TIME, nullable=False),
        sa.Column("disabled_at", UTC_TIME, nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_tenant"),
    )
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("adapters", sa.JSON(), nullable=True),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_at", UTC_TIME, nullable=False),
        sa.Column("changed_at", UTC_TIME, nullable=False),
        sa.Column("expires_at", UTC_TIME, nullable=True),
        sa.Column("revoked_at", UTC_TIME, nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.name"], name="fk_api_key_tenant_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
    )
    op.create_table(
        "adapter_share",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"],
            ["adapter.id"],
            name="fk_adapter_share_adapter_id_adapter",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("adapter_id", "tenant", name="pk_adapter_share"),
    )
    op.create_table(
        "usage_hour",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("hour", UTC_TIME, nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("adapter", sa.String(1024), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("generated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_usage_hour"),
        sa.UniqueConstraint("hour", "tenant", "key_id", "adapter", name="uq_usage_hour_hour"),
    )
    op.add_column(
        "adapter",
        sa.Column("visibility", sa.String(16), nullable=False, server_default="private"),
    )
    owners = op.get_bind().execute(sa.text("SELECT DISTINCT tenant FROM adapter")).scalars()
    now = datetime.now(UTC)
    op.bulk_insert(
        tenant,
        [
            {"name": name, "description": "", "limits": {}, "created_at": now, "changed_at": now}
            for name in sorted({"default", *owners})
        ],
    )


def downgrade() -> None:
    """Keys, shares and usage go. Adapters of other tenants than `default` stay, out of sight."""
    op.drop_column("adapter", "visibility")
    for table in ("usage_hour", "adapter_share", "api_key", "tenant"):
        op.drop_table(table)

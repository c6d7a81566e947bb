"""How adapters want to be used: defaults set by hand, and those that a version's files ship."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_29_adapter_defaults"
down_revision = "2026_11_29_tenants"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapter", sa.Column("defaults", sa.JSON(), nullable=True))
    op.add_column("adapter_version", sa.Column("shipped_defaults", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("adapter_version", "shipped_defaults")
    op.drop_column("adapter", "defaults")

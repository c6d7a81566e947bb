"""What probes and verifications found out about contents. Contents of before are probed later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_24_proofs"
down_revision = "2026_11_24_pulls"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "proof",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("damage", sa.Text(), nullable=True),
        sa.Column("probed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("agrees", sa.Boolean(), nullable=True),
        sa.Column("error", sa.Double(), nullable=True),
        sa.Column("tolerance", sa.Double(), nullable=True),
        sa.Column("base_error", sa.Double(), nullable=True),
        sa.Column("effect", sa.Double(), nullable=True),
        sa.Column("accepted_error", sa.Double(), nullable=True),
        sa.Column("model", sa.String(512), nullable=True),
        sa.Column("device", sa.String(64), nullable=True),
        sa.Column("dtype", sa.String(64), nullable=True),
        sa.Column("backend", sa.String(64), nullable=True),
        sa.Column("release", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("digest", name="pk_proof"),
    )


def downgrade() -> None:
    op.drop_table("proof")

"""Alembic's entry point. Runs on a connection that `platform/db.py` hands over; there is no offline
mode.
"""

from __future__ import annotations

from alembic import context

from loraplex.platform.models import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()

"""The registry's database: connections, one unit of work per change, migrations at start.

SQLite by default: WAL (readers never wait for a writer), foreign keys on, `synchronous=FULL` (an
acknowledged adapter survives a power cut), writes begin IMMEDIATE so that two of them queue up
instead of failing half-way. Any other SQLAlchemy URL works too. Knows no table by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, event, make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

import loraplex.migrations

BUSY_TIMEOUT_S = 30.0


class Database:
    """Sessions on one database. Open with `open()`, end with `close()`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect and bring the schema up to date. Raises sqlalchemy's errors for a URL that does
        not work.
        """
        if make_url(url).get_backend_name() == "sqlite":
            engine = _sqlite_engine(url)
        else:
            engine = create_async_engine(url, pool_pre_ping=True)
        async with engine.connect() as connection:
            await connection.run_sync(upgrade)
        return cls(engine)

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session that sees one state and changes nothing."""
        async with self._sessions() as session:
            yield session

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed when the block ends, rolled back when it raises."""
        async with self._sessions() as session, session.begin():
            await session.connection(execution_options={"loraplex_write": True})
            yield session


def _sqlite_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine.sync_engine, "connect")
    def _on_connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _on_begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("loraplex_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def migration_config() -> Config:
    """Alembic's configuration, without an alembic.ini: the scripts are a package of ours."""
    config = Config()
    config.set_main_option("script_location", str(Path(next(iter(loraplex.migrations.__path__)))))
    return config


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the schema to `revision`, in one transaction that is committed here."""
    config = migration_config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
    connection.commit()


def downgrade(connection: Connection, revision: str = "base") -> None:
    """Take the schema back to `revision`."""
    config = migration_config()
    config.attributes["connection"] = connection
    command.downgrade(config, revision)
    connection.commit()

"""The migrations build exactly the tables of `platform/models.py`, and take them away again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.engine import Engine

from loraplex.platform.db import Database, downgrade, migration_config, upgrade
from loraplex.platform.models import Base


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return create_engine(f"sqlite:///{tmp_path / 'r.sqlite'}")


@pytest.fixture
def with_connection(engine: Engine) -> Callable[..., None]:
    def run(*steps: Callable[[Connection], object]) -> None:
        with engine.connect() as connection:
            for step in steps:
                step(connection)
        engine.dispose()

    return run


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


def test_upgrade_from_empty_builds_every_table(with_connection: Callable[..., None]) -> None:
    def check(connection: Connection) -> None:
        assert tables(connection) == {*Base.metadata.tables, "alembic_version"}

    with_connection(upgrade, check)


def test_upgrade_twice_changes_nothing(with_connection: Callable[..., None]) -> None:
    with_connection(upgrade, upgrade)


def test_autogenerate_finds_nothing(with_connection: Callable[..., None]) -> None:
    def check(connection: Connection) -> None:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []

    with_connection(upgrade, check)


def test_downgrade_to_base_leaves_nothing(with_connection: Callable[..., None]) -> None:
    def check(connection: Connection) -> None:
        assert tables(connection) == {"alembic_version"}

    with_connection(upgrade, downgrade, check)


def test_there_is_one_head_and_names_are_dated() -> None:
    scripts = ScriptDirectory.from_config(migration_config())
    assert len(scripts.get_heads()) == 1
    assert all(s.revision[:4].isdigit() for s in scripts.walk_revisions())


async def test_opening_a_database_upgrades_it_and_sets_the_pragmas(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'r.sqlite'}")
    async with database.engine.connect() as connection:
        assert await connection.run_sync(tables) >= set(Base.metadata.tables)
        pragmas = {
            name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    await database.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


async def test_writes_begin_immediately_and_roll_back_on_error(tmp_path: Path) -> None:
    from loraplex.platform.models import Adapter

    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'r.sqlite'}")

    async def fail() -> None:
        async with database.unit_of_work() as session:
            session.add(Adapter(name="a"))
            await session.flush()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        await fail()
    async with database.read() as session:
        assert await session.get(Adapter, 1) is None
    await database.close()

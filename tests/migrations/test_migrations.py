"""The migrations build exactly the tables of `platform/models.py`, and take them away again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


NOW = "2026-11-24 00:00:00.000000"
FIRST_SCHEMA = (
    f"INSERT INTO adapter VALUES (1, 'default', 'sql', 'd', '{{}}', 3, '{NOW}', NULL)",
    f"INSERT INTO adapter VALUES (2, 'default', 'json', '', '{{}}', 2, '{NOW}', NULL)",
    *(
        f"INSERT INTO adapter_version VALUES ({id_}, {adapter}, {version}, '{'ab' * 32}', 'm', 's',"
        f" '{{\"rank\": 4}}', 'ready', NULL, '{NOW}', NULL, 7, 8, 9)"
        for id_, adapter, version in ((1, 1, 1), (2, 1, 2), (3, 2, 1))
    ),
    "INSERT INTO alias VALUES (5, 2, 'prod', 1)",
    "INSERT INTO alias VALUES (7, 1, 'beta', 2)",
    "INSERT INTO alias VALUES (9, 1, 'prod', 1)",
    f"INSERT INTO audit_event VALUES (1, '{NOW}', 'default', 'a', 'alias.set', 'sql:prod', NULL,"
    " '{}')",
)


def filled(connection: Connection) -> None:
    """A registry as the first release left it, with data."""
    connection.exec_driver_sql("PRAGMA foreign_keys = ON")
    connection.commit()
    upgrade(connection, "2026_11_24_initial")
    for statement in FIRST_SCHEMA:
        connection.exec_driver_sql(statement)
    connection.commit()


def rows(connection: Connection, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.exec_driver_sql(query)]


KEPT = {
    "adapter": "SELECT id, tenant, name, description, metadata, next_version, created_at, "
    "deleted_at FROM adapter",
    "adapter_version": "SELECT id, adapter_id, version, digest, base_model, model_signature, "
    "manifest, status, error, created_at, last_used_at, num_requests, num_prompt_tokens, "
    "num_generated_tokens FROM adapter_version",
    "audit_event": "SELECT * FROM audit_event",
}


def test_aliases_of_the_first_schema_become_their_first_revision(
    with_connection: Callable[..., None],
) -> None:
    def check(connection: Connection) -> None:
        kept = {table: rows(connection, query) for table, query in KEPT.items()}
        assert [len(found) for found in kept.values()] == [2, 3, 1]
        upgrade(connection)
        assert {table: rows(connection, query) for table, query in KEPT.items()} == kept
        meanings = rows(
            connection,
            "SELECT a.adapter_id, alias, a.revision, version, weight, actor, split FROM alias a"
            " JOIN alias_target t ON t.alias_id = a.id JOIN alias_revision r ON r.alias_id = a.id"
            " ORDER BY 1, 2",
        )
        assert [(*row[:6], json.loads(row[6])) for row in meanings] == [
            (adapter, alias, 1, version, 100, "migration", [{"version": version, "weight": 100}])
            for adapter, alias, version in ((1, "beta", 2), (1, "prod", 1), (2, "prod", 1))
        ]
        assert rows(connection, "PRAGMA foreign_key_check") == []

    with_connection(filled, check)


def test_a_split_goes_back_to_its_heaviest_version(with_connection: Callable[..., None]) -> None:
    def split(connection: Connection) -> None:
        (prod,) = rows(connection, "SELECT id FROM alias WHERE adapter_id = 1 AND alias = 'prod'")
        (beta,) = rows(connection, "SELECT id FROM alias WHERE alias = 'beta'")
        connection.exec_driver_sql(f"INSERT INTO alias_target VALUES ({prod[0]}, 2, 1, 300)")
        connection.exec_driver_sql(f"DELETE FROM alias_target WHERE alias_id = {beta[0]}")
        connection.commit()

    def check(connection: Connection) -> None:
        downgrade(connection, "2026_11_24_initial")
        assert rows(connection, "SELECT adapter_id, alias, version FROM alias ORDER BY 1, 2") == [
            (1, "prod", 2),
            (2, "prod", 1),
        ]
        assert len(rows(connection, KEPT["adapter_version"])) == 3

    with_connection(filled, upgrade, split, check)


async def test_a_server_goes_on_where_the_first_release_stopped(tmp_path: Path) -> None:
    """The rows of the first schema, read by the code of today."""
    from loraplex.platform.callers import Caller
    from loraplex.platform.resolution import Resolver

    sync = create_engine(f"sqlite:///{tmp_path / 'r.sqlite'}")
    with sync.connect() as connection:
        filled(connection)
    sync.dispose()
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'r.sqlite'}")
    resolver = Resolver(database)
    found = {
        reference: (await resolver.choose(Caller(), reference, "somebody")).reference
        for reference in ("sql", "sql:prod", "sql:beta", "sql@1", "json", "json:prod")
    }
    await database.close()
    assert found == {
        "sql": "sql@2",
        "sql:prod": "sql@1",
        "sql:beta": "sql@2",
        "sql@1": "sql@1",
        "json": "json@1",
        "json:prod": "json@1",
    }


async def test_contents_of_before_there_were_proofs_are_unproven(tmp_path: Path) -> None:
    from loraplex.platform.callers import Caller
    from loraplex.platform.repositories import AdapterRepository, ProofRepository

    sync = create_engine(f"sqlite:///{tmp_path / 'r.sqlite'}")
    with sync.connect() as connection:
        filled(connection)
        upgrade(connection, "2026_11_24_pulls")
        connection.exec_driver_sql("UPDATE adapter_version SET manifest = '{\"pages\": 3}'")
        connection.commit()
    sync.dispose()
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'r.sqlite'}")
    async with database.read() as session:
        assert await ProofRepository(session).unproven({"model": "m"}) == {"ab" * 32: 3}
        assert [row.proof for row in await AdapterRepository(session, Caller()).versions()] == [
            None
        ] * 3
    await database.close()
    with sync.connect() as connection:
        downgrade(connection, "2026_11_24_pulls")
        assert "proof" not in tables(connection)
        assert len(rows(connection, KEPT["adapter_version"])) == 3
    sync.dispose()


def test_adapters_of_before_there_were_tenants_are_the_default_ones(
    with_connection: Callable[..., None],
) -> None:
    def other_owner(connection: Connection) -> None:
        connection.exec_driver_sql("UPDATE adapter SET tenant = 'acme' WHERE id = 2")
        connection.commit()

    def check(connection: Connection) -> None:
        kept = {table: rows(connection, query) for table, query in KEPT.items()}
        assert rows(connection, "SELECT name, limits, disabled_at FROM tenant ORDER BY name") == [
            ("acme", "{}", None),
            ("default", "{}", None),
        ]
        owned = rows(connection, "SELECT tenant, name, visibility FROM adapter ORDER BY id")
        assert owned == [("default", "sql", "private"), ("acme", "json", "private")]
        assert rows(connection, "SELECT count(*) FROM api_key") == [(0,)]
        downgrade(connection, "2026_11_24_proofs")
        assert {table: rows(connection, query) for table, query in KEPT.items()} == kept
        assert "tenant" not in tables(connection)
        upgrade(connection)
        assert {table: rows(connection, query) for table, query in KEPT.items()} == kept
        assert rows(connection, "PRAGMA foreign_key_check") == []

    with_connection(filled, other_owner, upgrade, check)

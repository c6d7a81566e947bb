"""Commands that work on the registry itself, with or without a server beside them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loraplex.platform.cli.output import CliError

if TYPE_CHECKING:
    from loraplex.platform.db import Database
    from loraplex.platform.tenant_service import TenantService

T = TypeVar("T")

DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="LORAPLEX_DATA_DIR",
        help="The server's data directory.",
        metavar="PATH",
    ),
]
DEFAULT_DATA_DIR = Path("loraplex-data")


def database_url(data_dir: Path) -> str:
    return os.environ.get("LORAPLEX_DATABASE_URL") or (
        f"sqlite+aiosqlite:///{data_dir / 'registry.sqlite'}"
    )


def with_tenants(data_dir: Path, work: Callable[[TenantService], Awaitable[T]]) -> T:
    """Do `work` on the registry of `data_dir`, which is made where it is missing.

    Raises: CliError.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from loraplex.platform.db import Database
    from loraplex.platform.errors import ApiError
    from loraplex.platform.tenant_service import TenantService

    async def run() -> T:
        db = await Database.open(database_url(data_dir))
        try:
            return await work(TenantService(db, lambda: None))
        finally:
            await db.close()

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return asyncio.run(run())
    except ApiError as error:
        raise CliError(error.message) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise CliError(f"cannot use {data_dir}: {why}; choose another with --data-dir") from error
    except SQLAlchemyError as error:
        why = str(error).splitlines()[0]
        raise CliError(f"cannot use the registry in {data_dir}: {why}") from error


async def has_keys(db: Database) -> bool:
    """There is a key, or was one: nobody gets in without."""
    from loraplex.platform.tenant_repositories import KeyRepository

    async with db.read() as session:
        return await KeyRepository(session).any()


def registry_has_keys(url: str, data_dir: Path) -> bool:
    """As `has_keys`; False where there is no registry yet."""
    from loraplex.platform.db import Database

    if url.startswith("sqlite") and not (data_dir / "registry.sqlite").exists():
        return False

    async def run() -> bool:
        db = await Database.open(url)
        try:
            return await has_keys(db)
        finally:
            await db.close()

    return asyncio.run(run())

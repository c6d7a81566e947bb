"""One app per test over a fresh data directory and the fake engine; every client closes its app."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.platform.app import create_app
from loraplex.platform.db import Database
from loraplex.platform.runtime import Runtime
from loraplex.platform.settings import Settings


def _load(name: str) -> Any:
    # importlib import mode gives test folders no package: load the sibling module by path, once.
    full = f"platform_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


fakes = _load("fake_engine")
files = _load("adapter_files")
source_server = _load("source_server")


@dataclass
class Server:
    """An app that runs, and a client of it."""

    http: httpx.AsyncClient
    engine: Any
    app: Any

    @property
    def runtime(self) -> Runtime:
        found: Runtime = self.app.state.runtime
        return found

    async def upload(self, name: str, *, alpha: float = 8, fill: float = 0.5, **fields: str) -> Any:
        """Register an adapter; other alpha, other fill = other content."""
        answer = await self.http.post(
            "/v1/adapters", data={"name": name, **fields}, files=parts(alpha=alpha, fill=fill)
        )
        assert answer.status_code in (200, 201), answer.text
        return answer.json()


def parts(*, alpha: float = 8, fill: float = 0.5, rank: int = 4) -> dict[str, Any]:
    modules = fakes.model_info().modules
    return {
        "config": ("c.json", json.dumps(files.config(lora_alpha=alpha, r=rank)).encode()),
        "weights": ("w", files.weights(modules, fill=fill, rank=rank)),
    }


Start = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry as the migrations make it; a copy of it saves every test that work."""
    path = tmp_path_factory.mktemp("registry") / "registry.sqlite"

    async def make() -> None:
        await (await Database.open(f"sqlite+aiosqlite:///{path}")).close()

    asyncio.run(make())
    return path


@pytest.fixture
def start(tmp_path: Path, migrated: Path) -> Start:
    """Start an app over `tmp_path/data`, any number of times: `async with start(...) as s`."""

    @asynccontextmanager
    async def run(
        engine: Any = None, *, wait: bool = True, **settings: Any
    ) -> AsyncIterator[Server]:
        engine = engine or fakes.FakeEngine()
        (tmp_path / "data").mkdir(exist_ok=True)
        if not (tmp_path / "data" / migrated.name).exists():
            shutil.copy(migrated, tmp_path / "data")
        app = create_app(
            Settings(**{"model": "tiny", "data_dir": tmp_path / "data", **settings}), engine
        )
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                server = Server(http, engine, app)
                if wait:
                    await _until(lambda: server.runtime.ready)
                yield server

    return run


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def server(start: Start) -> AsyncIterator[Server]:
    async with start() as running:
        yield running


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    return _until


@pytest.fixture(scope="session")
def fake_engine_module() -> Any:
    return fakes


@pytest.fixture
def adapter_files_module() -> Any:
    return files


@pytest.fixture
def source_server_module() -> Any:
    return source_server


@pytest.fixture(scope="session")
def upload_parts() -> Callable[..., dict[str, Any]]:
    return parts

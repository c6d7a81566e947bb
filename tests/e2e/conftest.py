"""One real server on the demo model for all tests of this folder that do not need their own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ASSETS = Path(__file__).resolve().parents[2] / "platform" / "demo" / "assets"


def _load(name: str) -> Any:
    # importlib import mode gives test folders no package: load the sibling module by path, once.
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


server_module = _load("server")


@pytest.fixture(scope="session")
def assets() -> Path:
    return ASSETS


@pytest.fixture(scope="session")
def skills(assets: Path) -> dict[str, Any]:
    found = json.loads((assets / "skills.json").read_text())
    entries = found["skills"] if isinstance(found, dict) and "skills" in found else found
    return {entry["id"]: entry for entry in entries}


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Iterator[Any]:
    data_dir = tmp_path_factory.mktemp("demo") / "data"
    sources = f"--source-dirs=demo={assets / 'adapters'}"
    with server_module.Server(assets / "model", data_dir, sources) as server:
        yield server


@pytest.fixture(scope="session")
def uploaded(demo_server: Any, assets: Path) -> list[str]:
    """All demo adapters, uploaded over REST."""
    names = sorted(path.name for path in (assets / "adapters").iterdir() if path.is_dir())
    for name in names:
        upload(demo_server.url, name, assets / "adapters" / name)
    return names


def upload(url: str, name: str, folder: Path) -> dict[str, Any]:
    with (
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        answer = httpx.post(
            f"{url}/v1/adapters",
            data={"name": name},
            files={"config": config, "weights": weights},
            timeout=60,
        )
    assert answer.status_code in (200, 201), answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.fixture(scope="session")
def upload_adapter() -> Any:
    return upload


@pytest.fixture(scope="session")
def soak_world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model, adapters of every kind made by peft, and what they must say."""
    from loraplex.platform.bench.soak.world import make_world

    return make_world(tmp_path_factory.mktemp("world"), 12, 3, seed=1)


@pytest.fixture(scope="session")
def server_class() -> Any:
    return server_module.Server

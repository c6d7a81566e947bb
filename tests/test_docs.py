"""README says it all: each setting, route, command and error code. What is not documented does
not exist for users.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from fastapi import FastAPI

from loraplex.platform.app import ROUTERS
from loraplex.platform.cli import app as cli
from loraplex.platform.errors import STATUS
from loraplex.platform.settings import Settings

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_settings(name: str) -> None:
    assert f"`--{name.replace('_', '-')}`" in README


@pytest.mark.parametrize(("code", "status"), STATUS.items())
def test_error_codes(code: str, status: int) -> None:
    assert re.search(rf"\| {status} \|[^\n]*`{code}`", README)


def routes() -> list[str]:
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    return sorted({path for path in app.openapi()["paths"]})


def test_there_are_routes_to_check() -> None:
    assert "/v1/adapters" in routes()


@pytest.mark.parametrize("path", routes())
def test_routes(path: str) -> None:
    short = re.sub(r"^/v1/admin/adapters/\{adapter_id\}", "", path)
    plain = re.sub(r":path\}", "}", path)
    assert f"{plain}`" in README or f"`{short}`" in README, f"{path} is not in README"


def test_commands() -> None:
    group = typer.main.get_command(cli)
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in group.commands.items():
        assert re.search(rf"\b{name}\b", README)
        for sub in getattr(command, "commands", {}):
            assert re.search(rf"\b{sub}\b", README), f"loraplex {name} {sub} is not in README"

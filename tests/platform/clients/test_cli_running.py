"""`serve.run` for real, but for the model: the app, uvicorn, signals, and an engine that is told
what to do.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.engine.errors import ModelError
from loraplex.platform.cli import serve as serve_module
from loraplex.platform.cli.output import CliError
from loraplex.platform.cli.settings_flags import build_settings


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, fake_engine_module: Any) -> Any:
    made = fake_engine_module.FakeEngine()

    def client(config: Any, *, on_progress: Any) -> Any:
        on_progress("weights", 1, 2)
        return made

    monkeypatch.setattr(serve_module, "EngineClient", client)
    return made


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """`run` owns the process: it sets up logs and signals; the next test wants them as before."""
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(n) for n in ("uvicorn.error", "uvicorn.access"))]
    levels, handlers = [each.level for each in loggers], root.handlers[:]
    signals = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    root.handlers[:] = handlers
    for log, level in zip(loggers, levels, strict=True):
        log.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


def settings(tmp_path: Path, **more: Any) -> Any:
    return build_settings({"model": "fake", "port": 0, "data_dir": tmp_path / "data", **more})


def test_it_answers_when_it_says_so_and_stops_when_told(
    engine: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def visit(url: str) -> bool:
        seen.append(httpx.get(f"{url}/readyz").status_code)
        seen.append(httpx.get(f"{url}/v1/adapters").status_code)
        return False

    serve_module.run(settings(tmp_path), visit)
    assert seen == [200, 200]
    assert engine.stopped
    shown = capfd.readouterr().err
    assert "KV cache" in shown
    assert "serving fake at http://127.0.0.1:" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(engine: Any, tmp_path: Path, number: signal.Signals) -> None:
    def visit(url: str) -> bool:
        os.kill(os.getpid(), number)
        return True

    serve_module.run(settings(tmp_path), visit)  # returns, so the exit status is 0
    assert engine.stopped


def test_json_logs_stay_json(
    engine: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    serve_module.run(settings(tmp_path, log_format="json"), lambda url: False)
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("{") for line in lines)


def test_a_model_that_does_not_fit_is_one_line(engine: Any, tmp_path: Path) -> None:
    engine.start_error = ModelError("weights need 9 GB, there are 4; take --dtype bfloat16")
    with pytest.raises(CliError, match="take --dtype bfloat16"):
        serve_module.run(settings(tmp_path, log_level="error"))


def test_a_visitor_that_fails_stops_the_server(engine: Any, tmp_path: Path) -> None:
    def visit(url: str) -> bool:
        raise CliError("the tour fell over")

    with pytest.raises(CliError, match="the tour fell over"):
        serve_module.run(settings(tmp_path), visit)
    assert engine.stopped


def test_a_registry_that_cannot_be_opened_is_one_line(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(CliError, match="the log above says why"):
        serve_module.run(settings(tmp_path, database_url="sqlite+aiosqlite:////proc/none.sqlite"))


def test_a_data_directory_that_cannot_be_made(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(CliError, match="choose another with --data-dir"):
        serve_module.run(settings(tmp_path))

"""`loraplex serve`, `--help`, `doctor`, `demo`: flags, refusals, exit statuses."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.api import MemoryInfo
from loraplex.platform.cli import doctor as doctor_module
from loraplex.platform.cli import serve as serve_module
from loraplex.platform.cli.output import CliError, UsageError, ago, size
from loraplex.platform.cli.settings_flags import build_settings, flag
from loraplex.platform.settings import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `serve` would have run with; nothing runs."""
    found: list[Settings] = []
    monkeypatch.setattr(serve_module, "run", lambda settings, *rest: found.append(settings))
    return found


def test_every_setting_is_a_flag_with_its_description_and_default(cli: Any) -> None:
    text = cli("serve", "--help").stdout
    flat = re.sub(r"\s+", "", text)
    for name, field in Settings.model_fields.items():
        assert re.search(rf"^ +{flag(name)}\b", text, re.MULTILINE), f"{flag(name)} has no line"
        assert field.description is not None
        assert re.sub(r"\s+", "", field.description) in flat, f"{flag(name)} is not explained"
    assert "[default: 2GiB]" in text
    assert "[default: 8000]" in text


def test_flags_reach_the_settings(cli: Any, started: list[Settings]) -> None:
    done = cli(
        *("serve", "--model", "m", "--port", 9, "--kv-cache-memory", "2GiB", "--dtype", "float32"),
        *("--no-enable-prefix-cache", "--api-key", "key-number-1", "--api-key", "key-number-2"),
    )
    assert done.exit_code == 0, done.stderr
    (settings,) = started
    assert settings.port == 9
    assert settings.kv_cache_memory == 2 * 1024**3
    assert settings.dtype == "float32"
    assert settings.enable_prefix_cache is False
    assert [key.get_secret_value() for key in settings.api_key] == ["key-number-1", "key-number-2"]


def test_flag_over_environment_over_default(
    cli: Any, started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_MODEL", "from-env")
    monkeypatch.setenv("LORAPLEX_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("LORAPLEX_BLOCK_SIZE", "32")
    assert cli("serve", "--max-num-seqs", 9).exit_code == 0
    (settings,) = started
    assert (settings.model, settings.max_num_seqs, settings.block_size) == ("from-env", 9, 32)
    assert settings.max_num_waiting == 4096


def test_the_address_of_the_client_is_no_wrong_setting_of_the_server(
    cli: Any, started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://elsewhere:8000")
    done = cli("serve", "--model", "m")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "--model is required (or LORAPLEX_MODEL in the environment)"),
        (["--model", "m", "--port", "abc"], "--port abc: "),
        (["--model", "m", "--device", "tpu"], "--device tpu: "),
        (["--model", "m", "--kv-cache-memory", "lots"], "--kv-cache-memory lots: "),
        (
            ["--model", "m", "--max-num-seqs", "600", "--max-num-batched-tokens", "512"],
            "max_num_batched_tokens=512",
        ),
        (["--model", "m", "--api-key", "secret"], "--api-key: an API key must have"),
        (["--model", "m", "--nonsense"], "--nonsense"),
        (["--model", "m", "--host", "0.0.0.0"], "--allow-unauthenticated"),
    ],
)
def test_wrong_command_lines_end_with_2(
    cli: Any, started: list[Settings], flags: list[str], complaint: str
) -> None:
    done = cli("serve", *flags)
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert started == []


def test_all_wrong_settings_are_named_at_once(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORTT", "1")
    monkeypatch.setenv("LORAPLEX_BLOCK_SIZE", "0")
    done = cli("serve", "--model", "m", "--port", "x")
    assert done.stderr.startswith("error: 3 settings are wrong\n")
    assert "LORAPLEX_PORTT is not a setting" in done.stderr
    assert "LORAPLEX_BLOCK_SIZE 0: " in done.stderr
    assert "--port x: " in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", "0.0.0.0", "--api-key", "a-long-key"],
        ["--host", "0.0.0.0", "--allow-unauthenticated"],
        ["--host", "localhost"],
        ["--host", "127.1.2.3"],
        ["--host", "::1"],
    ],
)
def test_hosts_that_may_be_listened_on(cli: Any, started: list[Settings], flags: list[str]) -> None:
    assert cli("serve", "--model", "m", *flags).exit_code == 0
    assert len(started) == 1


def test_a_taken_port_is_known_before_anything_is_loaded(cli: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("serve", "--model", "m", "--port", port, "--data-dir", tmp_path / "data")
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: port {port} on 127.0.0.1 is in use; choose another with --port\n"
    )
    assert not (tmp_path / "data").exists()


def test_a_host_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"cannot listen on --host 192\.0\.2\.1"):
        serve_module.bind("192.0.2.1", 0)


def test_urls_work_from_this_machine() -> None:
    assert serve_module.url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert serve_module.url_of("::", 80) == "http://[::1]:80"
    assert serve_module.url_of("box", 80) == "http://box:80"


def test_memory_table_says_what_the_bytes_are_good_for(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    memory = MemoryInfo(
        weights_bytes=7_000_000, kv_cache_bytes=1_000_000, kv_block_bytes=1000,
        kv_blocks_total=1000, kv_blocks_used=0, kv_blocks_cached=0, block_size=16,
        adapter_bytes_total=500_000,
        adapter_bytes_used=0, adapter_page_bytes=10_000, host_adapter_bytes_total=0,
        host_adapter_bytes_used=0, workspace_bytes=300, device_bytes_total=16 * 10**9,
        device_bytes_free=12 * 10**9,
    )  # fmt: skip
    Console(width=100).print(serve_module.memory_table(memory))
    text = capsys.readouterr().out
    for expected in ("7.0 MB", "16,000 tokens", "50 of rank 16", "12.0 GB", "of 16.0 GB"):
        assert expected in text


def test_build_settings_accepts_python_values(tmp_path: Path) -> None:
    settings = build_settings({"model": "m", "data_dir": tmp_path, "port": 0, "api_key": ()})
    assert settings.data_dir == tmp_path
    with pytest.raises(UsageError, match="--port -1"):
        build_settings({"model": "m", "port": -1})


def test_help_and_version_need_nothing_heavy() -> None:
    """`--help` has to answer at once: no server, no HTTP client, no numbers, never torch."""
    code = (
        "import sys, loraplex.platform.cli\n"
        "heavy = {'torch', 'numpy', 'httpx', 'aiohttp', 'pydantic', 'fastapi', 'uvicorn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_has_help(cli: Any) -> None:
    commands = re.findall(
        r"^  (\w+) ", cli("--help").stdout.partition("Commands:")[2], re.MULTILINE
    )
    expected = {"serve", "demo", "chat", "doctor", "plan", "adapter", "bench"}
    assert set(commands) == expected | {"tenant", "key", "usage"}
    for command in commands:
        assert cli(command, "--help").exit_code == 0
    assert cli("--version").stdout.startswith("loraplex ")
    assert cli("no-such-command").exit_code == 2


# --- doctor ---


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The engine side's answers, without loading torch for them."""
    found = {"torch": "2.13", "threads": 2, "device": "cpu", "isa": "AVX512", "gpu": None}
    found["backend"] = "native"
    monkeypatch.setattr(doctor_module, "probe", lambda: found)
    return found


def test_doctor(cli: Any, facts: dict[str, Any], tmp_path: Path) -> None:
    done = cli("doctor", "--port", 0, "--data-dir", tmp_path / "new" / "data", "--json")
    assert done.exit_code == 0, done.stderr
    found = {f["what"]: f for f in done.json["findings"]}
    assert done.json["healthy"] is True
    assert found["kernels"]["value"] == "native (AVX512, 2 threads)"
    assert found["python"]["value"] == ".".join(map(str, sys.version_info[:3]))
    assert found["data directory"]["verdict"] == "ok"
    assert not (tmp_path / "new").exists()
    printed = cli("doctor", "--port", 0, "--data-dir", tmp_path).stdout
    assert all(what in printed for what in found)


def test_doctor_finds_what_stands_in_the_way(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> dict[str, Any]:
        raise CliError("ImportError: libtorch is missing")

    monkeypatch.setattr(doctor_module, "probe", broken)
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli(
            *("doctor", "--port", taken.getsockname()[1]),
            *("--data-dir", tmp_path / "file" / "data", "--json"),
        )
    assert done.exit_code == 1
    bad = {f["what"] for f in done.json["findings"] if f["verdict"] == "bad"}
    assert bad == {"engine", "data directory", "port"}
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("code", "message"), [("import nope_x", "nope_x"), ("1/0", "division")])
def test_a_probe_that_fails_tells_its_last_line(
    monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setattr(doctor_module, "_PROBE", code)
    with pytest.raises(CliError, match=message):
        doctor_module.probe()


# --- demo ---


def test_demo_serves_the_shipped_model_and_tells_where_the_data_is(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loraplex.platform.cli import demo as demo_module
    from loraplex.platform.demo import tour

    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "skills.json").write_text("{}")
    monkeypatch.setattr(demo_module, "files", lambda package: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAPLEX_API_KEY", "not-for-the-demo")
    tours = iter([True, False])
    monkeypatch.setattr(tour, "run", lambda url, assets, console: next(tours))
    ran: list[tuple[Settings, bool]] = []
    monkeypatch.setattr(
        serve_module, "run", lambda settings, after: ran.append((settings, after("http://x")))
    )

    done = cli("demo", "--exit", "--port", 0)
    assert done.exit_code == 0, done.stderr
    settings, keep_serving = ran[0]
    assert keep_serving is False
    assert settings.model == str(tmp_path / "assets" / "model")
    assert settings.host == "127.0.0.1"
    assert settings.api_key == ()
    assert settings.data_dir == tmp_path / "cache" / "loraplex" / "demo"
    assert str(settings.data_dir) in done.stdout

    assert cli("demo", "--exit", "--port", 0).exit_code == 1  # one answer was wrong


def test_demo_without_assets_says_so(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loraplex.platform.cli import demo as demo_module

    monkeypatch.setattr(demo_module, "files", lambda package: tmp_path)
    done = cli("demo")
    assert done.exit_code == 1
    assert str(tmp_path / "assets") in done.stderr


def test_sizes_and_times_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [size(n) for n in (0, 999, 1000, 13_631_488, 2.5e12)] == [
        "0 B", "999 B", "1.0 kB", "13.6 MB", "2.5 TB",
    ]  # fmt: skip
    monkeypatch.setattr("time.time", lambda: 100_000.0)
    assert [ago(t) for t in (None, 99_995, 99_000, 90_000, 0)] == [
        "-", "5 s ago", "16 min ago", "2 h ago", "1 d ago",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _logging_as_before() -> Any:
    """`serve.run` sets the logs up; other tests must not inherit that."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)

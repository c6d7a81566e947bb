"""Pulls on a real server: by the CLI, killed half-way, begun again; and nobody else is held up."""

from __future__ import annotations

import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Source(http.server.ThreadingHTTPServer):
    """Serves one archive, and stops half-way while `gate` is closed."""

    daemon_threads = True

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = body
        self.gate = threading.Event()
        self.half_sent = threading.Semaphore(0)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that is killed hangs up


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Source

    def do_GET(self) -> None:
        body = self.server.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.server.half_sent.release()
        self.server.gate.wait(60)
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def source(assets: Path) -> Iterator[Source]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.add(assets / "adapters" / "reverse", "reverse")
    server = Source(out.getvalue())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()
    thread.join()


def cli(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from loraplex.platform.cli import main; main()"
    command = [sys.executable, "-c", code, "adapter", *arguments, "--url", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_server_killed_during_a_pull_begins_it_again(
    server_class: Any, assets: Path, tmp_path: Path, source: Source, upload_adapter: Any
) -> None:
    flags = ("--source-hosts", source.host, "--source-private-addresses")
    with server_class(assets / "model", tmp_path / "data", *flags) as server:
        address = f"http://{source.host}/reverse.tar.gz"
        began = cli(server.url, "pull", "rev", address, "--no-wait", "--alias", "prod")
        assert began.returncode == 0, began.stderr
        assert source.half_sent.acquire(timeout=30)
        # A pull that hangs holds up neither uploads nor requests.
        uploaded = upload_adapter(server.url, "reverse", assets / "adapters" / "reverse")
        pending = httpx.get(f"{server.url}/v1/adapters/rev").json()
        assert (pending["status"], pending["version"]) == ("downloading", None)
        assert pending["pull"]["bytes_total"] == len(source.body)
        body = {"adapter_id": "reverse", "prompt": "x", "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.is_success, answer.text
        staging = tmp_path / "data" / "adapters" / ".staging"
        assert len(list(staging.iterdir())) == 1

        server.kill()
        server.start()
        assert source.half_sent.acquire(timeout=30)
        assert len(list(staging.iterdir())) == 1  # the one of before the kill is gone
        joined = cli(server.url, "pull", "rev", address, "--alias", "prod", "--no-wait", "--json")
        assert json.loads(joined.stdout)["pull"]["restarts"] == 1
        source.gate.set()
        deadline = time.monotonic() + 30
        while (pull := httpx.get(f"{server.url}/v1/adapters/rev/pull").json())["status"] != "ready":
            assert time.monotonic() < deadline, pull
            time.sleep(0.05)
        assert (pull["restarts"], pull["digest"]) == (1, uploaded["digest"])
        body["adapter_id"] = "rev:prod"
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.is_success, answer.text
        assert list(staging.iterdir()) == []


def test_the_command_line_tells_of_failures_and_cancels(
    server_class: Any, assets: Path, tmp_path: Path, source: Source
) -> None:
    flags = ("--source-hosts", source.host, "--source-private-addresses")
    with server_class(assets / "model", tmp_path / "data", *flags) as server:
        refused = cli(server.url, "pull", "rev", "hub:org/name")
        assert refused.returncode == 1
        assert "--source-hosts huggingface.co" in refused.stderr
        address = f"http://{source.host}/reverse.tar.gz"
        cli(server.url, "pull", "rev", address, "--no-wait")
        assert source.half_sent.acquire(timeout=30)
        cancelled = cli(server.url, "cancel", "rev")
        assert "cancelled the pull of rev" in cancelled.stdout
        assert httpx.get(f"{server.url}/v1/adapters/rev").status_code == 404
        source.gate.set()
        pinned = cli(server.url, "pull", "rev", address, "--digest", f"sha256:{'0' * 64}")
        assert pinned.returncode == 1
        assert "nothing was registered" in pinned.stderr
        assert list((tmp_path / "data" / "adapters" / ".staging").iterdir()) == []
        started = time.monotonic()
        cli(server.url, "pull", "slow", address, "--no-wait")
        assert server.stop() == 0
        assert time.monotonic() - started < 20

"""A server that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

Reply = tuple[int, Any]
Route = Reply | Callable[["Asked"], Reply]


@dataclass
class Asked:
    method: str
    path: str  # with the query
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class StubServer:
    """`routes["GET /path"]` is (status, body) or a function of the request that gives it. A body is
    JSON, bytes, or a list of chunks: those are sent as an event stream, one flush each."""

    url: str = ""
    routes: dict[str, Route] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def reply(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        route = self.routes.get(f"{asked.method} {asked.path.partition('?')[0]}")
        if route is None:
            return 404, {"error": {"message": f"no route {asked.path}", "code": "not_found"}}
        return route(asked) if callable(route) else route


@pytest.fixture
def stub() -> Iterator[StubServer]:
    server = StubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # each write here is a packet: 40 ms a piece otherwise

        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            asked = Asked(self.command, self.path, dict(self.headers), self.rfile.read(length))
            status, body = server.reply(asked)
            self.send_response(status)
            if isinstance(body, list):
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for chunk in body:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
                return
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = answer

        def log_message(self, *args: object) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Threads(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        http.shutdown()
        thread.join()


@dataclass
class Outcome:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run `loraplex <args>` in this process; a wide terminal, so that no line is broken."""
    from loraplex.platform.cli import app

    for name in ("LORAPLEX_URL", "LORAPLEX_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: object, stdin: str | None = None) -> Outcome:
        runner = CliRunner(env={"COLUMNS": "200"})
        result = runner.invoke(app, [str(a) for a in args], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def adapter_object() -> Callable[..., dict[str, Any]]:
    """An adapter as the API describes it (CONTRACTS 1.1)."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "id": name,
            "object": "adapter",
            "version": 1,
            "digest": "sha256:" + "ab" * 32,
            "rank": 16,
            "size_bytes": 13_631_488,
            "status": "ready",
            "residency": "disk",
            "target_modules": ["q_proj", "v_proj"],
            "description": "",
            "metadata": {},
            "aliases": {},
            "created_at": 1_790_000_000,
            "last_used_at": None,
            **changes,
        }

    return make

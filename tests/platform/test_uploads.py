"""What can be wrong with an upload's wrapping: each a clear 4xx, nothing left behind. Contents are
adapters' matter.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.platform.errors import ApiError
from loraplex.platform.uploads import receive_upload

BOUNDARY = "bound"
HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def multipart(*parts: tuple[str, bytes, bool], end: bool = True) -> bytes:
    """(field, data, is a file)..."""
    out = b""
    for name, data, is_file in parts:
        filename = '; filename="../../etc/passwd"' if is_file else ""
        out += (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
        ).encode()
        out += data + b"\r\n"
    return out + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def everything_under(server: Any) -> set[str]:
    root = server.runtime.settings.data_dir
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and "registry" not in path.name
    }


@pytest.fixture
def post(server: Any) -> Callable[..., Any]:
    async def send(content: Any, headers: dict[str, str] = HEADERS) -> dict[str, Any]:
        before = everything_under(server)
        answer = await server.http.post("/v1/adapters", content=content, headers=headers)
        assert answer.status_code >= 400
        assert everything_under(server) == before
        assert (await server.http.get("/v1/adapters")).json()["data"] == []
        error: dict[str, Any] = answer.json()["error"]
        return {**error, "status": answer.status_code}

    return send


GOOD = (("config", b"{}", True), ("weights", b"w", True))


BROKEN: tuple[tuple[bytes, int, str | None], ...] = (
    (multipart(*GOOD), 400, "name"),
    (multipart(("name", b"", False), *GOOD), 400, "name"),
    (multipart(("name", b"Not Good", False), *GOOD), 400, "name"),
    (multipart(("name", b"tiny", False), *GOOD), 409, "name"),
    (multipart(("name", b"\xff", False), *GOOD), 400, "name"),
    (multipart(("name", b"a", False)), 400, "weights"),
    (multipart(("name", b"a", False), GOOD[0]), 400, "weights"),
    (multipart(("name", b"a", False), *GOOD, ("archive", b"x", True)), 400, "archive"),
    (multipart(("name", b"a", False), *GOOD, ("weights", b"x", True)), 400, "weights"),
    (multipart(("name", b"a", False), *GOOD, ("extra", b"x", True)), 400, "extra"),
    (multipart(("name", b"a", False), *GOOD, ("rank", b"8", False)), 400, "rank"),
    (multipart(("name", b"a", False), *GOOD, ("metadata", b"[1]", False)), 400, "metadata"),
    (multipart(("name", b"a", False), *GOOD, ("metadata", b"{", False)), 400, "metadata"),
    (multipart(("name", b"a", False), *GOOD, ("alias", b"No!", False)), 400, "alias"),
    (multipart(("name", b"a" * 70_000, False), *GOOD), 400, "name"),
    (multipart(("", b"a", False)), 400, None),
    (multipart(*((f"f{i}", b"", False) for i in range(20))), 400, None),
    (multipart(("name", b"a", False), *GOOD, end=False), 400, None),
    (b"--bound\r\ngarbage", 400, None),
    (b"", 400, None),
)


async def test_broken_forms(post: Callable[..., Any]) -> None:
    for body, status, param in BROKEN:
        error = await post(body)
        assert (error["status"], error["param"]) == (status, param), error
        assert len(error["message"]) > 10


async def test_other_media_types(post: Callable[..., Any]) -> None:
    for kind in ("application/json", "text/plain", ""):
        error = await post(b"{}", {"content-type": kind})
        assert (error["status"], error["code"]) == (415, "unsupported_media_type")
    no_boundary = await post(b"", {"content-type": "multipart/form-data"})
    assert no_boundary["status"] == 400


async def test_refused_contents_name_every_problem(
    post: Callable[..., Any], adapter_files_module: Any
) -> None:
    config = json.dumps(adapter_files_module.config(fan_in_fan_out=True, surprise=1)).encode()
    error = await post(
        multipart(("name", b"a", False), ("config", config, True), ("weights", b"junk", True))
    )
    assert (error["status"], error["code"]) == (422, "adapter_refused")
    assert len(error["details"]) >= 3
    assert all({"code", "message"} <= set(problem) for problem in error["details"])


async def test_too_large_is_refused_before_and_while_it_arrives(
    start: Any, upload_parts: Callable[..., Any]
) -> None:
    async with start(max_upload_bytes="2KB") as server:

        async def endless() -> AsyncIterator[bytes]:
            yield multipart(("name", b"a", False), end=False)
            yield multipart(("weights", b"", True), end=False)[:-2]
            while True:  # a server that reads to the end would never answer
                yield b"x" * 1000

        declared = await server.http.post("/v1/adapters", data={"name": "a"}, files=upload_parts())
        arriving = await server.http.post("/v1/adapters", content=endless(), headers=HEADERS)
        for answer in (declared, arriving):
            assert answer.status_code == 413
            assert "LORAPLEX_MAX_UPLOAD_BYTES" in answer.json()["error"]["message"]
        assert everything_under(server) <= {"adapters/.lock"}


async def test_an_upload_that_breaks_off_leaves_nothing(start: Any) -> None:
    """The client hangs up in the middle: the staging folder goes with the request."""
    async with start() as server:
        begun = asyncio.Event()
        messages = [
            {
                "type": "http.request",
                "body": multipart(("weights", b"x" * 5000, True), end=False),
                "more_body": True,
            },
            {"type": "http.disconnect"},
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            begun.set()
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/adapters",
            "raw_path": b"/v1/adapters",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(b"content-type", HEADERS["content-type"].encode())],
        }
        await server.app(scope, receive, send)
        assert everything_under(server) <= {"adapters/.lock"}
        assert list((server.runtime.settings.adapter_dir / ".staging").iterdir()) == []


class Memory:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        self.closed = True


@given(
    weights=st.binary(max_size=300),
    cuts=st.lists(st.integers(min_value=1, max_value=400), max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_however_the_body_is_cut_the_files_are_the_same(weights: bytes, cuts: list[int]) -> None:
    body = multipart(("name", b"n", False), ("weights", weights, True), ("config", b"{}", True))
    if f"--{BOUNDARY}".encode() in weights:
        return

    async def chunks() -> AsyncIterator[bytes]:
        rest = body
        for cut in cuts:
            if rest:
                yield rest[:cut]
                rest = rest[cut:]
        yield rest

    async def run() -> None:
        files = {"weights": Memory(), "config": Memory()}
        upload = await receive_upload(
            chunks(),
            HEADERS["content-type"],
            {name: (lambda file=file: file) for name, file in files.items()},  # type: ignore[misc]
            10_000,
        )
        assert upload.fields == {"name": "n"}
        assert upload.files == {"weights", "config"}
        assert (files["weights"].data, files["config"].data) == (weights, b"{}")
        assert all(file.closed for file in files.values())

    asyncio.run(run())


async def test_writers_are_closed_when_the_body_is_broken() -> None:
    file = Memory()

    async def chunks() -> AsyncIterator[bytes]:
        yield multipart(("weights", b"abc", True), end=False)

    with pytest.raises(ApiError, match="closing boundary"):
        await receive_upload(chunks(), HEADERS["content-type"], {"weights": lambda: file}, 1000)
    assert file.closed

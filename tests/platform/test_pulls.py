"""Pulls that go wrong, meet each other, are cancelled or interrupted: one clear end each, and
nothing left in staging.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
import ssl
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from loraplex.platform.errors import ApiError
from loraplex.platform.sources import transfer
from loraplex.platform.sources.addresses import HostList
from loraplex.platform.sources.http_client import HttpClient

TOKEN = "hf_very-secret-token"
ARCHIVE = "/a.tar.gz"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_DELAY_S", 0.001)


@pytest.fixture
async def remote(
    source_server_module: Any, adapter_files_module: Any, fake_engine_module: Any
) -> AsyncIterator[Any]:
    """Serves a good archive."""
    async with source_server_module.serving() as server:
        server.files[ARCHIVE] = adapter_files_module.tarred(
            json.dumps(adapter_files_module.config()).encode(),
            adapter_files_module.weights(fake_engine_module.model_info().modules),
        )
        yield server


@pytest.fixture
def pulling(start: Any, remote: Any) -> Callable[..., Any]:
    def run(engine: Any = None, **settings: Any) -> Any:
        return start(
            engine,
            **{"source_hosts": remote.host, "source_private_addresses": True, **settings},
        )

    return run


async def order(server: Any, source: str, name: str = "sql", **fields: Any) -> Any:
    return await server.http.post(
        "/v1/adapters/pull", json={"name": name, "source": source, **fields}
    )


async def ended(server: Any, name: str = "sql") -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            pull = (await server.http.get(f"/v1/adapters/{name}/pull")).json()
            if pull["status"] in ("ready", "failed"):
                return pull
            await asyncio.sleep(0.005)


async def pulled(server: Any, source: str, name: str = "sql", **fields: Any) -> dict[str, Any]:
    answer = await order(server, source, name, **fields)
    assert answer.status_code == 202, answer.text
    return await ended(server, name)


async def failure(server: Any, source: str, **fields: Any) -> dict[str, Any]:
    pull = await pulled(server, source, **fields)
    assert pull["status"] == "failed", pull
    nothing_is_left(server)
    assert (await server.http.get("/v1/adapters")).json()["data"] == []
    return pull["error"]


def nothing_is_left(server: Any) -> None:
    assert list((server.runtime.settings.adapter_dir / ".staging").iterdir()) == []


async def events(server: Any) -> list[dict[str, Any]]:
    return (await server.http.get("/v1/admin/events")).json()["data"]


# --- broken transfers -----------------------------------------------------------------------------


async def test_a_broken_connection_is_resumed_where_it_broke(pulling: Any, remote: Any) -> None:
    size = len(remote.files[ARCHIVE])
    remote.drops[ARCHIVE] = [100, 50, 0]
    async with pulling() as server:
        pull = await pulled(server, remote.url(ARCHIVE))
        assert (pull["status"], pull["retries"]) == ("ready", 3), pull
        assert (pull["bytes_done"], pull["bytes_total"]) == (size, size)
    ranges = [request.headers.get("Range") for request in remote.asked(ARCHIVE)]
    assert ranges == [None, "bytes=100-", "bytes=150-", "bytes=150-"]


async def test_without_an_entity_tag_it_begins_anew(pulling: Any, remote: Any) -> None:
    remote.resumable = False
    remote.drops[ARCHIVE] = [100]
    async with pulling() as server:
        pull = await pulled(server, remote.url(ARCHIVE))
        assert (pull["status"], pull["bytes_done"]) == ("ready", len(remote.files[ARCHIVE]))
    assert [request.headers.get("Range") for request in remote.asked(ARCHIVE)] == [None, None]


async def test_two_halves_of_different_files_are_not_joined(
    pulling: Any, remote: Any, adapter_files_module: Any
) -> None:
    """The file changes while the connection is down; a careless server ignores If-Range."""
    old, new = remote.files[ARCHIVE], b"y" * len(remote.files[ARCHIVE])
    asked = 0

    async def careless(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        body, headers = (old, {"ETag": '"1"'}) if asked == 1 else (new, {"ETag": '"2"'})
        if "Range" in request.headers:
            headers["Content-Range"] = f"bytes 100-{len(new) - 1}/{len(new)}"
            return web.Response(status=206, body=new[100:], headers=headers)
        response = web.StreamResponse(headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[:100] if asked == 1 else body)
        if asked == 1:
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
        return response

    remote.answers[ARCHIVE] = careless
    async with pulling() as server:
        error = await failure(server, remote.url(ARCHIVE))
        assert error["code"] == "adapter_refused"  # all of the new file, which is no archive
        assert "archive" in error["details"][0]["code"]
    assert asked == 3


async def test_a_source_that_always_breaks_is_given_up(pulling: Any, remote: Any) -> None:
    remote.drops[ARCHIVE] = [100] + [0] * 20
    async with pulling() as server:
        error = await failure(server, remote.url(ARCHIVE))
        assert error["code"] == "source_failed"
        assert remote.url(ARCHIVE) in error["message"]
        assert "given up after 5 tries" in error["message"]
    assert len(remote.asked(ARCHIVE)) == 5


async def test_a_wrong_length_is_noticed(pulling: Any, remote: Any) -> None:
    """It promises more than it ever sends."""

    async def short(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 5000
        await response.prepare(request)
        await response.write(b"x" * 4000)
        await asyncio.sleep(0.02)
        if request.transport is not None:
            request.transport.close()
        return response

    remote.answers[ARCHIVE] = short
    async with pulling() as server:
        assert (await failure(server, remote.url(ARCHIVE)))["code"] == "source_failed"


@pytest.mark.parametrize(
    ("status", "words", "requests"),
    [(404, "404", 1), (401, "token", 1), (403, "token", 1), (503, "503", 5), (204, "204", 1)],
)
async def test_answers_that_are_no_file(
    pulling: Any, remote: Any, status: int, words: str, requests: int
) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    remote.answers[ARCHIVE] = refuse
    async with pulling() as server:
        error = await failure(server, remote.url(ARCHIVE))
        assert error["code"] == "source_failed"
        assert words in error["message"]
    assert len(remote.requests) == requests


async def test_a_source_that_recovers_is_pulled(pulling: Any, remote: Any) -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        if len(remote.requests) == 2:
            del remote.answers[ARCHIVE]
        return web.Response(status=429)

    remote.answers[ARCHIVE] = busy
    async with pulling() as server:
        assert (await pulled(server, remote.url(ARCHIVE)))["status"] == "ready"


async def test_a_pull_that_takes_too_long_ends(pulling: Any, remote: Any) -> None:
    remote.gate.clear()
    async with pulling(pull_timeout_s=0.2) as server:
        error = await failure(server, remote.url(ARCHIVE))
        assert error["code"] == "source_failed"
        assert "--pull-timeout-s" in error["message"]


# --- redirects ------------------------------------------------------------------------------------


def redirect(remote: Any, path: str, target: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": target})

    remote.answers[path] = answer


async def test_a_redirect_is_followed_and_the_token_left_behind(
    pulling: Any, remote: Any, source_server_module: Any
) -> None:
    async with source_server_module.serving() as elsewhere:
        elsewhere.files["/cdn"] = remote.files[ARCHIVE]
        redirect(remote, "/a", "/b")
        redirect(remote, "/b", elsewhere.url("/cdn?Signature=abc"))
        async with pulling(source_hosts=f"{remote.host},{elsewhere.host}") as server:
            assert (await pulled(server, remote.url("/a"), token=TOKEN))["status"] == "ready"
        assert [r.headers.get("Authorization") for r in remote.requests] == [f"Bearer {TOKEN}"] * 2
        assert [r.headers.get("Authorization") for r in elsewhere.requests] == [None]


async def test_redirects_are_checked_like_the_first_address(
    pulling: Any, remote: Any, source_server_module: Any
) -> None:
    async with (
        source_server_module.serving() as elsewhere,
        pulling(source_hosts=f"{remote.host},169.254.169.254") as server,
    ):
        for number, (target, words) in enumerate(
            (
                (elsewhere.url("/secret?sig=1"), "--source-hosts"),
                ("http://169.254.169.254/latest/meta-data", "never connect"),
                ("data:text/plain,x", "no URL"),
                ("file:///etc/passwd", "no URL"),
                ("ftp://example.org/a", "no https URL"),
            )
        ):
            redirect(remote, f"/r{number}", target)
            error = await failure(server, remote.url(f"/r{number}"))
            wanted = "source_failed" if words == "no URL" else "source_not_allowed"
            assert error["code"] == wanted, target
            assert words in error["message"], error
            assert "sig" not in error["message"]
        redirect(remote, "/round", "/round")
        error = await failure(server, remote.url("/round"))
        assert "redirects more than 5 times" in error["message"]
        assert len(remote.asked("/round")) == 6
        redirect(remote, "/broken", "http://[::1/x")
        assert (await failure(server, remote.url("/broken")))["code"] == "source_failed"
        assert elsewhere.requests == []


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's): a certificate for 127.0.0.1, and trust in it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=source", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


async def test_https_stays_https(remote: Any, source_server_module: Any, tls: Any) -> None:
    async with source_server_module.serving(tls[0]) as secure:
        secure.files["/a"] = b"abc"
        redirect(secure, "/b", "/a")
        redirect(secure, "/c", remote.url(ARCHIVE))
        hosts = HostList([secure.host, remote.host])
        client = HttpClient(hosts, allow_private=True, tls=tls[1])
        try:
            for path in ("/a", "/b"):
                async with client.open(URL(f"https://{secure.host}{path}")) as opened:
                    assert b"".join([chunk async for chunk in opened.chunks]) == b"abc"
            with pytest.raises(ApiError, match="stay https") as refused:
                async with client.open(URL(f"https://{secure.host}/c"), token=TOKEN):
                    pytest.fail("followed")
            assert refused.value.code == "source_not_allowed"
        finally:
            await client.close()
    assert remote.requests == []


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    pulling: Any, source_server_module: Any, tls: Any
) -> None:
    async with (
        source_server_module.serving(tls[0]) as secure,
        pulling(source_hosts=secure.host) as server,
    ):
        error = await failure(server, f"https://{secure.host}/a")
        assert (error["code"], secure.requests) == ("source_failed", [])
        assert "certificate" in error["message"]


# --- contents -------------------------------------------------------------------------------------


async def test_a_file_that_is_too_large_is_not_kept(pulling: Any, remote: Any) -> None:
    """By what it says of itself, and by what comes when it says nothing."""
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        while True:
            await response.write(b"\x1f\x8b" + b"x" * 65534)
            sent += 65536

    remote.files["/large"] = b"x" * 300_000
    remote.answers["/endless"] = endless
    remote.files["/f/adapter_config.json"] = b" " * (2 << 20)
    async with pulling(max_upload_bytes="200KB") as server:
        for path in ("/large", "/endless", "/f/"):
            error = await failure(server, remote.url(path))
            assert error["code"] == "adapter_refused"
            assert error["details"][0]["code"] == "file_too_large"
        assert sent < 20_000_000


async def test_a_compressed_answer_is_refused(pulling: Any, remote: Any) -> None:
    """A small answer that unpacks to a large one on the way would pass the size limit."""

    async def packed(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=remote.files[ARCHIVE], headers={"Content-Encoding": "gzip"})

    remote.answers["/packed"] = packed
    async with pulling() as server:
        assert "gzip" in (await failure(server, remote.url("/packed")))["message"]


async def test_a_bad_archive_gets_the_problems_of_an_upload(pulling: Any, remote: Any) -> None:
    climbing = io.BytesIO()
    with tarfile.open(fileobj=climbing, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../adapter_config.json"))
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode="w:gz") as archive:
        info = tarfile.TarInfo("adapter_model.safetensors")
        info.size = 80 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    cut = remote.files[ARCHIVE][:-40]
    async with pulling() as server:
        for body in (climbing.getvalue(), bomb.getvalue(), cut, b"<html>", b"", b"PK\x03\x04junk"):
            remote.files["/bad"] = body
            error = await failure(server, remote.url("/bad"))
            assert error["code"] == "adapter_refused"
            assert ("ends with /" in error["message"]) == (body == b"<html>" or not body)
            upload = await server.http.post(
                "/v1/adapters", data={"name": "sql"}, files={"archive": ("a", body)}
            )
            assert upload.json()["error"]["details"] == error["details"]


async def test_another_digest_than_ordered_is_not_registered(pulling: Any, remote: Any) -> None:
    async with pulling() as server:
        pinned = f"sha256:{'0' * 64}"
        error = await failure(server, remote.url(ARCHIVE), digest=pinned, alias="prod")
        assert error["code"] == "digest_mismatch"
        assert pinned in error["message"]
        assert list(server.runtime.store.digests()) == []
        found = next(word for word in error["message"].split() if word.startswith("sha256:"))
        assert (await pulled(server, remote.url(ARCHIVE), digest=found.rstrip(",")))[
            "status"
        ] == "ready"


# --- orders ---------------------------------------------------------------------------------------


async def test_orders_that_are_wrong_are_refused_at_once(pulling: Any, remote: Any) -> None:
    good = remote.url(ARCHIVE)
    cases = [
        ({"source": good}, 400, "name"),
        ({"name": "Not Good", "source": good}, 400, "name"),
        ({"name": "tiny", "source": good}, 409, "name"),
        ({"name": "a", "source": ""}, 400, "source"),
        ({"name": "a", "source": "/etc/passwd"}, 400, "source"),
        ({"name": "a", "source": "https:///x"}, 400, "source"),
        ({"name": "a", "source": "https://[::1/x"}, 400, "source"),
        ({"name": "a", "source": "http://u:p@127.0.0.1/x"}, 400, "source"),
        ({"name": "a", "source": "https://other.example/x"}, 403, "source"),
        ({"name": "a", "source": "hub:noslash"}, 400, "source"),
        ({"name": "a", "source": "hub:o/../x"}, 400, "source"),
        ({"name": "a", "source": "hub:o/n@v1", "revision": "v2"}, 400, "revision"),
        ({"name": "a", "source": good, "revision": "v2"}, 400, "revision"),
        ({"name": "a", "source": good, "digest": "sha256:12"}, 400, "digest"),
        ({"name": "a", "source": good, "alias": "latest"}, 400, "alias"),
        ({"name": "a", "source": good, "metadata": [1]}, 400, "metadata"),
        ({"name": "a", "source": good, "token": "two\r\nlines"}, 400, "token"),
        ({"name": "a", "source": "dir:x/y", "token": TOKEN}, 400, "token"),
        ({"name": "a", "source": good, "unknown": 1}, 400, "unknown"),
    ]
    async with pulling() as server:
        for body, status, param in cases:
            answer = await server.http.post("/v1/adapters/pull", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), (body, error)
            assert ":p@" not in answer.text
            assert "lines" not in answer.text
        assert (await server.http.get("/v1/admin/pulls")).json()["data"] == []
        for method in ("GET", "DELETE"):
            never = await server.http.request(method, "/v1/adapters/a/pull")
            assert (never.status_code, never.json()["error"]["code"]) == (404, "not_found")
    assert remote.requests == []


async def test_the_same_pull_is_made_once(pulling: Any, remote: Any) -> None:
    remote.gate.clear()
    async with pulling() as server:
        answers = await asyncio.gather(*(order(server, remote.url(ARCHIVE)) for _ in range(10)))
        assert {answer.status_code for answer in answers} == {202}
        for other in (
            {"source": remote.url("/other")},
            {"source": remote.url(ARCHIVE), "alias": "prod"},
            {"source": remote.url(ARCHIVE), "token": TOKEN},
        ):
            answer = await order(server, **other)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (409, "pull_under_way")
            assert "DELETE /v1/adapters/sql/pull" in error["message"]
        remote.gate.set()
        assert (await ended(server))["version"] == 1
    assert len(remote.requests) == 1


async def test_only_so_many_pulls_run_at_once(pulling: Any, remote: Any) -> None:
    remote.gate.clear()
    async with pulling(max_pulls=2) as server:
        for name in "abcde":
            assert (await order(server, remote.url(ARCHIVE), name)).status_code == 202
        await asyncio.sleep(0.1)
        statuses = [p["status"] for p in (await server.http.get("/v1/admin/pulls")).json()["data"]]
        assert sorted(statuses) == ["downloading"] * 2 + ["queued"] * 3
        metrics = (await server.http.get("/metrics")).text
        assert 'loraplex:pulls{model_name="tiny",status="queued"} 3.0' in metrics
        remote.gate.set()
        for name in "abcde":
            assert (await ended(server, name))["status"] == "ready"
        metrics = (await server.http.get("/metrics")).text
        assert 'loraplex:pulls_ended_total{model_name="tiny",outcome="ready"} 5.0' in metrics
        total = 5 * len(remote.files[ARCHIVE])
        assert f'loraplex:pulled_bytes_total{{model_name="tiny"}} {float(total)}' in metrics


async def test_an_adapter_that_is_still_coming_is_not_served(pulling: Any, remote: Any) -> None:
    remote.gate.clear()
    async with pulling() as server:
        await order(server, remote.url(ARCHIVE))
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "x", "adapter_id": "sql"}
        )
        assert answer.status_code == 404
        remote.gate.set()
        await ended(server)
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "x", "adapter_id": "sql"}
        )
        assert answer.status_code == 200


# --- cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/adapters/sql/pull", "/v1/adapters/sql"])
async def test_a_pull_is_cancelled(
    pulling: Any, remote: Any, path: str, until: Callable[..., Any]
) -> None:
    remote.gate.clear()
    async with pulling() as server:
        await order(server, remote.url(ARCHIVE))
        await until(lambda: bool(remote.requests))
        assert (await server.http.delete(path)).status_code == 200
        nothing_is_left(server)
        for gone in ("/v1/adapters/sql", "/v1/adapters/sql/pull"):
            assert (await server.http.get(gone)).status_code == 404
        last = (await events(server))[-1]
        assert (last["action"], last["before"]["source"]) == (
            "adapter.pull.cancel",
            remote.url(ARCHIVE),
        )
        remote.gate.set()
        assert (await pulled(server, remote.url(ARCHIVE)))["status"] == "ready"


async def test_cancelling_keeps_the_versions_there_are(
    pulling: Any, remote: Any, until: Callable[..., Any]
) -> None:
    async with pulling() as server:
        await server.upload("sql", alpha=32)
        remote.gate.clear()
        answer = await order(server, remote.url(ARCHIVE))
        assert (answer.json()["version"], answer.json()["status"]) == (1, "ready")
        assert answer.json()["pull"]["status"] in ("queued", "downloading")
        cancelled = await server.http.delete("/v1/adapters/sql/pull")
        assert cancelled.json()["status"] == "cancelled"
        found = (await server.http.get("/v1/adapters/sql")).json()
        assert (found["version"], found["pull"]) == (1, None)


async def test_a_failed_pull_is_shown_until_it_is_deleted(pulling: Any, remote: Any) -> None:
    async with pulling() as server:
        await failure(server, remote.url("/none"))
        shown = (await server.http.get("/v1/adapters/sql")).json()
        assert (shown["status"], shown["version"]) == ("failed", None)
        assert "404" in shown["error"]
        assert (await server.http.get("/v1/adapters/sql@1")).status_code == 404
        deleted = await server.http.delete("/v1/adapters/sql")
        assert deleted.json()["versions"] == []
        assert (await server.http.get("/v1/adapters/sql")).status_code == 404
        assert (await server.http.delete("/v1/adapters/sql")).status_code == 404


async def test_what_is_registered_at_the_moment_of_a_cancel_stays(
    pulling: Any, remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pulling() as server:
        store, at_commit = server.runtime.store, asyncio.Event()
        loop, commit = asyncio.get_running_loop(), store.commit

        def slow(*arguments: Any) -> Any:
            import time

            loop.call_soon_threadsafe(at_commit.set)
            time.sleep(0.1)
            return commit(*arguments)

        monkeypatch.setattr(store, "commit", slow)
        await order(server, remote.url(ARCHIVE))
        await at_commit.wait()
        late = await server.http.delete("/v1/adapters/sql/pull")
        assert late.json()["status"] == "ready"
        assert (await server.http.get("/v1/adapters/sql")).json()["version"] == 1
        nothing_is_left(server)


# --- restarts -------------------------------------------------------------------------------------


async def test_an_interrupted_pull_is_begun_again_once(
    pulling: Any, remote: Any, until: Callable[..., Any]
) -> None:
    remote.gate.clear()
    async with pulling() as server:
        await order(server, remote.url(ARCHIVE), description="d", alias="prod")
        await until(lambda: len(remote.requests) == 1)
    async with pulling() as server:
        await until(lambda: len(remote.requests) == 2)
        assert (await server.http.get("/v1/adapters/sql/pull")).json()["restarts"] == 1
        remote.gate.set()
        pull = await ended(server)
        assert (pull["status"], pull["restarts"]) == ("ready", 1)
        found = (await server.http.get("/v1/adapters/sql")).json()
        assert (found["description"], list(found["aliases"])) == ("d", ["prod"])
        assert "adapter.pull.restart" in [event["action"] for event in await events(server)]
    remote.gate.clear()
    for _ in range(2):
        async with pulling() as server:
            await order(server, remote.url(ARCHIVE), "b")
            await until(lambda: len(remote.requests) >= 3)
    async with pulling() as server:
        pull = await ended(server, "b")
        assert (pull["status"], pull["error"]["code"]) == ("failed", "pull_interrupted")
        nothing_is_left(server)


async def test_an_interrupted_pull_with_a_secret_fails_and_says_so(
    pulling: Any, remote: Any, until: Callable[..., Any]
) -> None:
    remote.gate.clear()
    async with pulling() as server:
        await order(server, remote.url(ARCHIVE), token=TOKEN)
        await order(server, remote.url(ARCHIVE + "?X-Amz-Signature=s3cret"), "b")
        await until(lambda: len(remote.requests) == 2)
    async with pulling() as server:
        for name in ("sql", "b"):
            pull = await ended(server, name)
            assert pull["error"]["code"] == "pull_interrupted"
            assert "token" in pull["error"]["message"]
        nothing_is_left(server)
    assert len(remote.requests) == 2


async def test_secrets_are_nowhere(
    pulling: Any, remote: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    signed = "?X-Amz-Signature=s3cret-signature"
    texts = []
    async with pulling() as server:
        for number, path in enumerate((ARCHIVE, "/none", "/closed")):
            if path == "/closed":
                remote.drops[path] = [0] * 20
                remote.files[path] = b"x"
            name = f"a{number}"
            answer = await order(server, remote.url(path + signed), name, token=TOKEN)
            texts.append(answer.text)
            await ended(server, name)
            texts.append((await server.http.get(f"/v1/adapters/{name}")).text)
        texts.append((await server.http.get("/v1/admin/pulls")).text)
        texts.append((await server.http.get("/v1/admin/events")).text)
    assert remote.requests[0].query_string == signed[1:]
    kept = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    shown = "".join(texts) + caplog.text + b"".join(kept).decode("latin-1")
    assert "?..." in shown
    assert TOKEN not in shown
    assert "s3cret" not in shown

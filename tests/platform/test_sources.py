"""Pulls: every kind of source, what hostile or broken ones may do, and that nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import ValidationError
from sqlalchemy import update
from yarl import URL

from loraplex.platform.errors import ApiError
from loraplex.platform.settings import Settings
from loraplex.platform.sources import transfer
from loraplex.platform.sources.addresses import HostList, refuse_address
from loraplex.platform.sources.http_client import HttpClient

TOKEN = "hf_very-secret-token"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_DELAY_S", 0.001)


@pytest.fixture
async def remote(source_server_module: Any) -> AsyncIterator[Any]:
    async with source_server_module.serving() as server:
        yield server


@pytest.fixture
def pulling(start: Any, remote: Any) -> Callable[..., Any]:
    """Start an app that may pull from `remote`."""

    def run(engine: Any = None, **settings: Any) -> Any:
        return start(
            engine,
            **{"source_hosts": remote.host, "source_private_addresses": True, **settings},
        )

    return run


@pytest.fixture
def adapter(adapter_files_module: Any, fake_engine_module: Any) -> tuple[bytes, bytes]:
    """(config, weights)"""
    config = json.dumps(adapter_files_module.config()).encode()
    return config, adapter_files_module.weights(fake_engine_module.model_info().modules)


def put_folder(remote: Any, path: str, adapter: tuple[bytes, bytes]) -> None:
    remote.files[f"{path}adapter_config.json"] = adapter[0]
    remote.files[f"{path}adapter_model.safetensors"] = adapter[1]


async def order(server: Any, source: str, name: str = "sql", **fields: Any) -> Any:
    return await server.http.post(
        "/v1/adapters/pull", json={"name": name, "source": source, **fields}
    )


async def ended(server: Any, name: str = "sql") -> dict[str, Any]:
    """The pull once it is over."""
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
    """The error of a pull that must fail, and leave nothing."""
    pull = await pulled(server, source, **fields)
    assert pull["status"] == "failed", pull
    nothing_is_left(server)
    assert (await server.http.get("/v1/adapters")).json()["data"] == []
    return pull["error"]


def nothing_is_left(server: Any) -> None:
    assert list((server.runtime.settings.adapter_dir / ".staging").iterdir()) == []


async def actions(server: Any) -> list[str]:
    events = (await server.http.get("/v1/admin/events")).json()["data"]
    return [event["action"] for event in events]


# --- every kind of source -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zipped", "tarred"])
async def test_an_archive_is_pulled(
    pulling: Any, remote: Any, adapter: Any, adapter_files_module: Any, kind: str
) -> None:
    remote.files["/a"] = getattr(adapter_files_module, kind)(*adapter)
    remote.gate.clear()
    async with pulling() as server:
        answer = await order(
            server, remote.url("/a"), description="d", metadata={"a": 1}, alias="prod"
        )
        assert answer.status_code == 202
        pending = answer.json()
        assert (pending["id"], pending["version"]) == ("sql", None)
        assert pending["status"] == pending["pull"]["status"] == "downloading"
        remote.gate.set()
        pull = await ended(server)
        assert (pull["status"], pull["version"], pull["error"]) == ("ready", 1, None)
        assert pull["bytes_done"] == pull["bytes_total"] == len(remote.files["/a"])
        found = (await server.http.get("/v1/adapters/sql")).json()
        assert (found["status"], found["description"]) == ("ready", "d")
        assert found["metadata"] == {"a": 1}
        assert found["digest"] == pull["digest"]
        assert found["pull"] == pull
        assert list(found["aliases"]) == ["prod"]
        uploaded = await server.upload("other")
        assert uploaded["digest"] == found["digest"]  # the same intake as an upload
        assert (await actions(server))[:3] == ["adapter.pull", "adapter.register", "alias.set"]
        nothing_is_left(server)


async def test_a_folder_is_pulled_and_pulled_again(
    pulling: Any, remote: Any, adapter: Any, adapter_files_module: Any
) -> None:
    put_folder(remote, "/f/", adapter)
    async with pulling() as server:
        first = await pulled(server, remote.url("/f/"))
        assert first["bytes_total"] == sum(map(len, adapter))
        again = await pulled(server, remote.url("/f/"))
        assert (again["version"], again["status"]) == (1, "ready")  # the content was there
        remote.files["/f/adapter_config.json"] = json.dumps(
            adapter_files_module.config(lora_alpha=16)
        ).encode()
        assert (await pulled(server, remote.url("/f/")))["version"] == 2


async def test_a_hub_repository_is_pulled_at_one_commit(
    pulling: Any, remote: Any, adapter: Any
) -> None:
    """Somebody pushes between the two files: both still come from the first commit."""
    commit = "c" * 40

    async def config(request: web.Request) -> web.StreamResponse:
        return web.Response(body=adapter[0], headers={"X-Repo-Commit": commit})

    async def moved(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(f"/cdn/{request.path.rsplit('/')[-1]}?Signature=s")

    remote.answers["/org/sql/resolve/v1/adapter_config.json"] = config
    remote.answers[f"/org/sql/resolve/{commit}/adapter_model.safetensors"] = moved
    remote.files["/cdn/adapter_model.safetensors"] = adapter[1]
    async with pulling(hub_endpoint=remote.url("")) as server:
        pull = await pulled(server, "hub:org/sql@v1", token=TOKEN)
        assert (pull["status"], pull["source"]) == ("ready", "hub:org/sql@v1"), pull
        assert {r.headers["Authorization"] for r in remote.requests} == {f"Bearer {TOKEN}"}
        in_folder = await pulled(server, "hub:org/sql/ckpt", name="b", revision="x/y")
        assert in_folder["status"] == "failed"
        assert "/org/sql/resolve/x%2Fy/ckpt/adapter_config.json" in in_folder["error"]["message"]


async def test_a_bucket_is_pulled(pulling: Any, adapter: Any, adapter_files_module: Any) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/sql/adapter_config.json", adapter[0])
    memory.pipe("/models/sql/adapter_model.safetensors", adapter[1])
    memory.pipe("/models/b.tar.gz", adapter_files_module.tarred(*adapter))
    memory.pipe("/private/adapter_config.json", adapter[0])
    try:
        async with pulling(source_buckets="memory://models") as server:
            assert (await pulled(server, "memory://models/sql"))["status"] == "ready"
            assert (await pulled(server, "memory://models/b.tar.gz", name="b"))["version"] == 1
            gone = await pulled(server, "memory://models/none", name="c")
            assert gone["error"]["code"] == "source_failed"
            assert "memory://models/none/adapter_config.json" in gone["error"]["message"]
            for bad in (
                "memory://private",
                "memory://models2/x",
                "s3://models/sql",
                "file:///etc/passwd",
            ):
                refused = await order(server, bad)
                assert (refused.status_code, refused.json()["error"]["code"]) == (
                    403,
                    "source_not_allowed",
                ), bad
            for bad in ("memory://models/../private", "memory::file://models/x"):
                assert (await order(server, bad)).status_code == 400, bad
            nothing_is_left(server)
    finally:
        memory.rm("/models", recursive=True)
        memory.rm("/private", recursive=True)


async def test_a_file_system_that_is_not_installed_is_named(pulling: Any) -> None:
    pytest.importorskip("fsspec")
    async with pulling(source_buckets="gcs://models") as server:
        error = await failure(server, "gcs://models/sql")
        assert error["code"] == "source_failed"
        assert "gcsfs" in error["message"]


async def test_a_server_directory_is_pulled(
    pulling: Any, tmp_path: Path, adapter: Any, adapter_files_module: Any
) -> None:
    root = tmp_path / "shared"
    write_folder(root / "team" / "sql", adapter)
    (root / "b.zip").write_bytes(adapter_files_module.zipped(*adapter))
    (root / "link").symlink_to(root / "team" / "sql")  # within: as hub caches have them
    async with pulling(source_dirs=f"shared={root}") as server:
        assert (await pulled(server, "dir:shared/team/sql"))["status"] == "ready"
        assert (await pulled(server, "dir:shared/b.zip", name="b"))["status"] == "ready"
        assert (await pulled(server, "dir:shared/link", name="c"))["status"] == "ready"


def write_folder(path: Path, adapter: tuple[bytes, bytes]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_bytes(adapter[0])
    (path / "adapter_model.safetensors").write_bytes(adapter[1])


async def test_nothing_outside_a_server_directory_is_read(
    pulling: Any, tmp_path: Path, adapter: Any
) -> None:
    root, outside = tmp_path / "shared", tmp_path / "outside"
    root.mkdir()
    write_folder(outside, adapter)
    (root / "out").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    write_folder(root / "file-out", adapter)
    (root / "file-out" / "adapter_model.safetensors").unlink()
    (root / "file-out" / "adapter_model.safetensors").symlink_to(
        outside / "adapter_model.safetensors"
    )
    os.mkfifo(root / "pipe.tar")
    async with pulling(source_dirs=f"shared={root}") as server:
        for bad in ("dir:shared/../outside", "dir:shared//etc", "dir:shared/a\\b"):
            refused = await order(server, bad)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "source"), bad
        refused = await order(server, "dir:other/x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "source_not_allowed")
        for bad in ("out", "file-out"):
            assert (await failure(server, f"dir:shared/{bad}"))["code"] == "source_not_allowed"
        for bad in ("loop", "pipe.tar", "none", "adapter.zip"):
            error = await failure(server, f"dir:shared/{bad}")
            assert error["code"] == "source_failed", bad
            assert str(root) not in error["message"]
    assert (outside / "adapter_model.safetensors").exists()


async def test_a_watched_directory_is_followed(
    start: Any,
    tmp_path: Path,
    adapter: Any,
    adapter_files_module: Any,
    monkeypatch: pytest.MonkeyPatch,
    until: Callable[..., Any],
) -> None:
    from loraplex.platform.sources import watcher

    monkeypatch.setattr(watcher, "POLL_S", 0.02)
    root = tmp_path / "watched"
    write_folder(root / "sql", adapter)
    write_folder(root / "Not A Name", adapter)
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").write_bytes(adapter[0])
    write_folder(root / "broken", (b"{}", b"junk"))

    async def versions(server: Any) -> dict[str, int]:
        data = (await server.http.get("/v1/adapters")).json()["data"]
        return {item["id"]: item["version"] for item in data}

    async def reach(server: Any, expected: dict[str, int]) -> None:
        async with asyncio.timeout(10):
            while await versions(server) != expected:
                await asyncio.sleep(0.01)

    async with start(watch_dir=root) as server:
        await reach(server, {"sql": 1})
        broken = await ended(server, "broken")
        assert broken["error"]["code"] == "adapter_refused"
        (root / "half" / "adapter_model.safetensors").write_bytes(adapter[1])
        await reach(server, {"half": 1, "sql": 1})
        other = json.dumps(adapter_files_module.config(lora_alpha=64)).encode()
        (root / "sql" / "adapter_config.json").write_bytes(other)
        await reach(server, {"half": 1, "sql": 2})
        before = len(await actions(server))
    async with start(watch_dir=root) as server:
        await asyncio.sleep(0.2)
        assert await versions(server) == {"half": 1, "sql": 2}
        again = (await actions(server))[before:]
        assert again.count("adapter.register") == 0
        assert again.count("adapter.pull") == 1  # the broken one, which may fit by now


async def test_a_watched_folder_whose_pull_was_interrupted_is_read_again(
    start: Any, tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex.platform.models import Pull
    from loraplex.platform.sources import watcher

    monkeypatch.setattr(watcher, "POLL_S", 0.02)
    write_folder(tmp_path / "watched" / "sql", adapter)

    async def reach(server: Any, action: str, count: int) -> None:
        async with asyncio.timeout(10):
            while (await actions(server)).count(action) < count:
                await asyncio.sleep(0.01)

    async with start(watch_dir=tmp_path / "watched") as server:
        await reach(server, "adapter.register", 1)
        assert (await ended(server))["status"] == "ready"
        async with server.runtime.db.unit_of_work() as session:
            await session.execute(update(Pull).values(status="downloading"))
    async with start(watch_dir=tmp_path / "watched") as server:
        await reach(server, "adapter.pull", 2)
        assert (await ended(server))["status"] == "ready"
        assert (await actions(server)).count("adapter.pull.fail") == 1
        assert (await server.http.get("/v1/adapters/sql")).json()["version"] == 1


# --- what operators did not allow -----------------------------------------------------------------


async def test_without_hosts_nothing_is_asked_over_the_network(start: Any, remote: Any) -> None:
    async with start(source_private_addresses=True) as server:
        for source in (remote.url("/a"), "https://example.org/a.zip", "hub:org/sql"):
            refused = (await order(server, source)).json()["error"]
            assert refused["code"] == "source_not_allowed"
            assert "--source-hosts" in refused["message"]
        missing = await server.http.get("/v1/adapters/sql")
        assert missing.status_code == 404
        asked = await server.http.post(
            "/v1/completions", json={"prompt": "x", "adapter_id": "hub:org/sql"}
        )
        assert asked.status_code == 404  # an inference request never downloads
    assert remote.requests == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "[fd00:ec2::254]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "0.0.0.0",
        "[fe80::1]",
        "224.0.0.1",
    ],
)
async def test_private_addresses_are_not_connected_to(start: Any, host: str) -> None:
    async with start(source_hosts=f"{host}:8443,{host}") as server:
        error = await failure(server, f"https://{host}/a.zip")
        assert error["code"] == "source_not_allowed", error
        assert "address" in error["message"]


async def test_metadata_addresses_stay_closed_in_private_networks(pulling: Any) -> None:
    async with pulling(source_hosts="*") as server:
        for host in ("169.254.169.254", "100.100.100.200", "[fd00:ec2::254]", "0.0.0.0"):
            assert (await failure(server, f"http://{host}/a"))["code"] == "source_not_allowed"


async def test_odd_spellings_of_addresses_lead_nowhere(start: Any, remote: Any) -> None:
    async with start(source_hosts=f"*:{remote.port}") as server:
        for host in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1"):
            error = await failure(server, f"https://{host}:{remote.port}/a")
            assert error["code"] in ("source_failed", "source_not_allowed"), host
    assert remote.requests == []


async def test_http_is_for_private_networks(start: Any, remote: Any) -> None:
    async with start(source_hosts=f"{remote.host},example.org") as server:
        for source in (remote.url("/a"), "http://example.org/a"):
            refused = (await order(server, source)).json()["error"]
            assert refused["code"] == "source_not_allowed"
            assert "not encrypted" in refused["message"]
    assert remote.requests == []


@pytest.mark.parametrize(
    ("entry", "allowed", "refused"),
    [
        ("example.org", "https://example.org", "https://a.example.org"),
        ("example.org", "https://EXAMPLE.org.", "https://example.org:8443"),
        ("example.org:8443", "https://example.org:8443", "https://example.org"),
        ("*.example.org", "https://a.b.example.org", "https://example.org"),
        ("*.example.org", "https://a.example.org", "https://badexample.org"),
        ("*", "https://anything.net", "https://anything.net:22"),
        ("[0:0::1]", "https://[::1]", "https://[::2]"),
    ],
)
def test_entries_of_the_allow_list(entry: str, allowed: str, refused: str) -> None:
    hosts = HostList([entry])
    for text, expected in ((allowed, True), (refused, False)):
        url = URL(text)
        assert url.host is not None
        assert url.port is not None
        assert hosts.allows(url.scheme, url.host, url.port) is expected, text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source_hosts", "https://example.org"),
        ("source_hosts", "a b"),
        ("source_hosts", "*example.org"),
        ("source_buckets", "bucket"),
        ("source_buckets", "file:///etc"),
        ("source_buckets", "https://example.org/x"),
        ("source_buckets", "simplecache::s3://x"),
        ("source_dirs", "/srv/adapters"),
        ("source_dirs", "a=relative/path"),
        ("source_dirs", "a=/x,a=/y"),
        ("hub_endpoint", "huggingface.co"),
        ("max_pulls", "0"),
    ],
)
def test_settings_that_are_wrong_are_named(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{"model": "m", name: value})


class Rebinding(AbstractResolver):
    """A name server that answers each question with the next address."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        address = self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0
            )
        ]

    async def close(self) -> None:
        pass


async def test_a_name_that_turns_private_gains_nothing(remote: Any) -> None:
    """Public when somebody checks it, this machine when it is connected to: the address that is
    connected to is the one that is checked.
    """
    remote.files["/a"] = b"x"
    resolver = Rebinding("93.184.215.14", "127.0.0.1")
    (checked,) = await resolver.resolve("evil.example")
    refuse_address(checked["host"], allow_private=False)
    hosts = HostList([f"evil.example:{remote.port}"])
    client = HttpClient(hosts, resolver=resolver)
    try:
        with pytest.raises(ApiError, match="private network") as refused:
            async with client.open(URL(f"https://evil.example:{remote.port}/a")):
                pytest.fail("connected")
        assert refused.value.code == "source_not_allowed"
    finally:
        await client.close()
    assert remote.requests == []


async def test_the_same_name_works_where_private_addresses_are_allowed(remote: Any) -> None:
    """So that the test above proves something."""
    remote.files["/a"] = b"abc"
    hosts = HostList([f"evil.example:{remote.port}"])
    client = HttpClient(hosts, allow_private=True, resolver=Rebinding("127.0.0.1"))
    try:
        async with client.open(URL(f"http://evil.example:{remote.port}/a")) as opened:
            assert b"".join([chunk async for chunk in opened.chunks]) == b"abc"
    finally:
        await client.close()

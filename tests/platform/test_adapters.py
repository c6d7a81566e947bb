"""`/v1/adapters` through the ASGI app: upload in every form, list, versions, download, delete."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import httpx
import pytest


def stored(server: Any) -> set[str]:
    return {f"sha256:{digest}" for digest in server.runtime.store.digests()}


async def test_an_upload_becomes_an_adapter_object(server: Any) -> None:
    made = await server.upload("sql", description="writes SQL", metadata='{"team": "data"}')
    assert made["id"] == "sql"
    assert made["object"] == "adapter"
    assert (made["version"], made["rank"], made["alpha"], made["scaling"]) == (1, 4, 8.0, 2.0)
    assert made["target_modules"] == ["q_proj", "v_proj"]
    assert made["num_parameters"] == 4 * 2 * 16 * 4  # modules x factors x hidden x rank
    assert made["digest"].startswith("sha256:")
    assert (made["status"], made["residency"], made["base_model"]) == ("ready", "disk", "tiny")
    assert (made["description"], made["metadata"]) == ("writes SQL", {"team": "data"})
    assert stored(server) == {made["digest"]}


@pytest.mark.parametrize("pack", ["zipped", "tarred"])
async def test_an_archive_is_the_same_adapter_as_its_files(
    server: Any, adapter_files_module: Any, fake_engine_module: Any, pack: str
) -> None:
    files = adapter_files_module
    raw = json.dumps(files.config()).encode()
    archive = getattr(files, pack)(raw, files.weights(fake_engine_module.model_info().modules))
    answer = await server.http.post(
        "/v1/adapters", data={"name": "packed"}, files={"archive": ("a.bin", archive)}
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == (await server.upload("plain"))["digest"]


async def test_an_adapter_object_names_what_it_uses(
    server: Any, adapter_files_module: Any, fake_engine_module: Any
) -> None:
    assert (await server.upload("plain"))["features"] == []
    files, modules = adapter_files_module, fake_engine_module.model_info().modules
    archive = files.zipped(
        json.dumps(files.config(use_dora=True)).encode(), files.weights(modules, dora=True)
    )
    answer = await server.http.post(
        "/v1/adapters", data={"name": "dora"}, files={"archive": ("a.zip", archive)}
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["features"] == ["dora"]
    assert (await server.http.get("/v1/adapters/dora")).json()["features"] == ["dora"]


async def test_the_same_content_again_is_200_and_no_new_version(
    server: Any, upload_parts: Callable[..., Any]
) -> None:
    first = await server.upload("sql")
    again = await server.http.post("/v1/adapters", data={"name": "sql"}, files=upload_parts())
    assert again.status_code == 200
    assert again.json()["version"] == first["version"] == 1


async def test_new_content_is_a_new_version_and_old_content_again_too(server: Any) -> None:
    digests = [(await server.upload("sql", alpha=alpha))["digest"] for alpha in (8, 16, 8)]
    detail = (await server.http.get("/v1/adapters/sql")).json()
    assert detail["version"] == 3
    assert [v["version"] for v in detail["versions"]] == [1, 2, 3]
    assert [v["digest"] for v in detail["versions"]] == digests
    assert stored(server) == set(digests)


async def test_references_name_versions_aliases_and_contents(server: Any) -> None:
    first = await server.upload("sql", alpha=8, alias="prod")
    second = await server.upload("sql", alpha=16)
    for reference, wanted in (
        ("sql", second),
        ("sql@1", first),
        ("sql@2", second),
        ("sql:prod", first),
        (first["digest"], first),
    ):
        found = await server.http.get(f"/v1/adapters/{reference}")
        assert found.json()["digest"] == wanted["digest"], reference
    for reference in ("nobody", "sql@3", "sql:test", "sha256:" + "0" * 64, "sql@0", "SQL"):
        missing = await server.http.get(f"/v1/adapters/{reference}")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "adapter_not_found"


async def test_pages_by_name(server: Any) -> None:
    for name in ("d", "b", "a", "c", "ab"):
        await server.upload(name)
    seen: list[str] = []
    after = ""
    while True:
        page = (await server.http.get("/v1/adapters", params={"limit": 2, "after": after})).json()
        assert page["object"] == "list"
        seen += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = seen[-1]
    assert seen == ["a", "ab", "b", "c", "d"]
    found = (await server.http.get("/v1/adapters", params={"name": "b"})).json()
    assert [item["id"] for item in found["data"]] == ["ab", "b"]
    wild = (await server.http.get("/v1/adapters", params={"name": "%"})).json()
    assert wild["data"] == []


async def test_a_race_for_one_name_gives_every_content_one_version(
    server: Any, upload_parts: Callable[..., Any]
) -> None:
    async def post(alpha: int) -> httpx.Response:
        answer: httpx.Response = await server.http.post(
            "/v1/adapters", data={"name": "raced"}, files=upload_parts(alpha=alpha)
        )
        return answer

    answers = await asyncio.gather(*(post(alpha) for alpha in (1, 2, 3, 4, 5)))
    assert [answer.status_code for answer in answers] == [201] * 5
    detail = (await server.http.get("/v1/adapters/raced")).json()
    assert [v["version"] for v in detail["versions"]] == [1, 2, 3, 4, 5]
    assert len({v["digest"] for v in detail["versions"]}) == 5


async def test_the_same_content_raced_is_one_version(
    server: Any, upload_parts: Callable[..., Any]
) -> None:
    async def post() -> int:
        answer = await server.http.post("/v1/adapters", data={"name": "x"}, files=upload_parts())
        status: int = answer.status_code
        return status

    assert sorted(await asyncio.gather(*(post() for _ in range(4)))) == [200, 200, 200, 201]


async def test_patch_changes_what_is_sent(server: Any) -> None:
    await server.upload("sql", description="old", metadata='{"a": 1}')
    changed = await server.http.patch("/v1/adapters/sql", json={"description": "new"})
    assert changed.status_code == 200
    assert (changed.json()["description"], changed.json()["metadata"]) == ("new", {"a": 1})
    changed = await server.http.patch("/v1/adapters/sql", json={"metadata": {"b": [2]}})
    assert (changed.json()["description"], changed.json()["metadata"]) == ("new", {"b": [2]})
    assert (await server.http.patch("/v1/adapters/sql", json={"rank": 3})).status_code == 400
    bad = await server.http.patch(
        "/v1/adapters/sql",
        content=b'{"metadata": {"x": NaN}}',
        headers={"content-type": "application/json"},
    )
    assert bad.status_code == 400
    assert (await server.http.patch("/v1/adapters/none", json={})).status_code == 404


async def test_download_gives_back_the_very_bytes(
    server: Any, upload_parts: Callable[..., Any]
) -> None:
    made = await server.upload("sql")
    answer = await server.http.get("/v1/adapters/sql/download")
    assert answer.status_code == 200
    assert answer.headers["x-adapter-digest"] == made["digest"]
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert members["sql/adapter_model.safetensors"] == upload_parts()["weights"][1]
    assert json.loads(members["sql/adapter_config.json"]) == json.loads(upload_parts()["config"][1])
    again = await server.http.post(
        "/v1/adapters", data={"name": "copy"}, files={"archive": ("a", answer.content)}
    )
    assert again.json()["digest"] == made["digest"]


# --- deletion --------------------------------------------------------------------------------


async def test_delete_frees_every_tier_and_the_name(server: Any, fake_engine_module: Any) -> None:
    made = await server.upload("sql")
    digest = made["digest"].removeprefix("sha256:")
    await server.http.post("/v1/admin/adapters/sql/load")
    on_disk = server.runtime.store.disk_bytes(digest)
    gone = (await server.http.delete("/v1/adapters/sql")).json()
    assert gone["deleted"] is True
    assert gone["freed"] == {
        "device_bytes": fake_engine_module.DEVICE_BYTES,
        "host_bytes": fake_engine_module.HOST_BYTES,
        "disk_bytes": on_disk,
    }
    assert server.engine.forgotten == [digest, digest], "before and after its files went"
    assert stored(server) == set()
    for method in ("get", "delete"):
        assert (await getattr(server.http, method)("/v1/adapters/sql")).status_code == 404
    ask = {"adapter_id": "sql", "prompt": "x"}
    assert (await server.http.post("/v1/completions", json=ask)).status_code == 404
    assert (await server.http.get("/v1/adapters")).json()["data"] == []


async def test_a_version_number_never_means_two_contents(server: Any) -> None:
    await server.upload("sql", alpha=8, description="old")
    await server.http.delete("/v1/adapters/sql")
    reborn = await server.upload("sql", alpha=16)
    assert (reborn["version"], reborn["description"]) == (2, "")
    assert (await server.http.get("/v1/adapters/sql@1")).status_code == 404


async def test_one_version_goes_and_the_others_stay(server: Any) -> None:
    first = await server.upload("sql", alpha=8)
    await server.upload("sql", alpha=16)
    for url in ("/v1/adapters/sql?version=2", "/v1/adapters/sql@1"):
        answer = await server.http.delete(url)
        assert answer.status_code == 200, answer.text
        if "version=2" in url:
            assert stored(server) == {first["digest"]}
            assert (await server.http.get("/v1/adapters/sql")).json()["version"] == 1
    assert (await server.http.get("/v1/adapters/sql")).status_code == 404
    assert (await server.http.delete("/v1/adapters/sql?version=1")).status_code == 404


async def test_shared_content_stays_until_its_last_name_goes(server: Any) -> None:
    made = await server.upload("one")
    await server.upload("two")
    gone = (await server.http.delete("/v1/adapters/one")).json()
    assert gone["freed"] == {"device_bytes": 0, "host_bytes": 0, "disk_bytes": 0}
    assert server.engine.forgotten == []
    assert stored(server) == {made["digest"]}
    await server.http.delete("/v1/adapters/two")
    assert stored(server) == set()


async def test_the_last_two_names_of_a_content_go_at_once(
    server: Any, until: Callable[..., Any]
) -> None:
    """The bug this guards: each took the content to be the other's, and it stayed in memory."""
    made = await server.upload("one")
    await server.upload("two")
    await server.http.post("/v1/admin/adapters/one/load")
    server.engine.forget_hold = asyncio.Event()
    deletions = [
        asyncio.create_task(server.http.delete(f"/v1/adapters/{name}")) for name in ("one", "two")
    ]
    await until(lambda: server.engine.forgotten)
    server.engine.forget_hold.set()
    assert [(await deletion).status_code for deletion in deletions] == [200, 200]
    assert made["digest"].removeprefix("sha256:") not in server.engine.residents
    assert stored(server) == set()


async def test_an_upload_takes_the_deletion_of_its_content_back(
    server: Any, until: Callable[..., Any]
) -> None:
    """The bug this guards: its requests were told `adapter_deleted` until the other name had
    drained.
    """
    made = await server.upload("old")
    digest = made["digest"].removeprefix("sha256:")
    server.engine.kept.clear()
    server.engine.forget_hold = asyncio.Event()
    deletion = asyncio.create_task(server.http.delete("/v1/adapters/old"))
    await until(lambda: server.engine.forgotten)
    await server.upload("new")
    assert server.engine.kept == [digest]
    server.engine.forget_hold.set()
    assert (await deletion).status_code == 200
    assert server.engine.forgotten == [digest], "the content is somebody's"
    assert stored(server) == {made["digest"]}


async def test_an_adapter_in_use_is_deleted_only_by_force(
    server: Any, until: Callable[..., Any]
) -> None:
    await server.upload("sql")
    server.engine.hold = asyncio.Event()
    ask = {"adapter_id": "sql", "prompt": "x", "max_tokens": 3}
    running = asyncio.create_task(server.http.post("/v1/completions", json=ask))
    await until(lambda: len(server.engine.running) == 1)
    refused = await server.http.delete("/v1/adapters/sql")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
    detail = (await server.http.get("/v1/adapters/sql")).json()
    assert detail["status"] == "ready", "a refused delete leaves everything as it was"
    forced = await server.http.delete("/v1/adapters/sql?force=true")
    assert forced.status_code == 200
    server.engine.hold.set()
    assert (await running).status_code == 200


async def test_new_requests_are_refused_while_it_drains(
    server: Any, until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.upload("sql", alpha=8)
    await server.upload("sql", alpha=16)
    draining = asyncio.Event()
    forget = server.engine.forget

    async def slow_forget(digest: str, **options: Any) -> Any:
        if go_on.is_set():  # the second time, when its files are gone
            return await forget(digest, **options)
        assert options["timeout_s"] == 30
        draining.set()
        await go_on.wait()
        return await forget(digest, force=True)

    go_on = asyncio.Event()
    monkeypatch.setattr(server.engine, "forget", slow_forget)
    deletion = asyncio.create_task(
        server.http.delete("/v1/adapters/sql?version=2&drain_timeout_s=30")
    )
    await draining.wait()
    assert (await server.http.get("/v1/adapters/sql")).json()["status"] == "draining"
    again = await server.http.delete("/v1/adapters/sql?version=2")
    assert again.status_code == 409
    old = await server.http.post("/v1/completions", json={"adapter_id": "sql@2", "prompt": "x"})
    assert old.status_code == 404
    bare = await server.http.post("/v1/completions", json={"adapter_id": "sql", "prompt": "x"})
    assert bare.json()["adapter"]["version"] == 1
    go_on.set()
    assert (await deletion).status_code == 200


async def test_every_change_is_in_the_audit_log(server: Any) -> None:
    await server.upload("sql", alpha=8, alias="prod")
    await server.http.patch("/v1/adapters/sql", json={"description": "d"})
    await server.http.delete("/v1/adapters/sql/aliases/prod")
    await server.http.post("/v1/admin/adapters/sql/pin")
    await server.http.delete("/v1/adapters/sql")
    events = (await server.http.get("/v1/admin/events")).json()["data"]
    assert [event["action"] for event in events] == [
        "adapter.register",
        "alias.set",
        "adapter.patch",
        "alias.delete",
        "adapter.pin",
        "adapter.delete",
    ]
    same = {"metadata": {}, "visibility": "private", "shared_with": [], "defaults": None}
    assert events[2]["before"] == {"description": "", **same}
    assert events[2]["after"] == {"description": "d", **same}
    page = (await server.http.get("/v1/admin/events", params={"limit": 2, "after": 1})).json()
    assert [event["id"] for event in page["data"]] == [2, 3]
    assert page["has_more"] is True

"""Aliases over HTTP: moving, splitting, stickiness, history, rollback, what protects versions."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

PROD = "/v1/adapters/sql/aliases/prod"


@pytest.fixture
async def sql(server: Any) -> dict[int, str]:
    """The adapter `sql` in three versions: version -> digest."""
    made = [await server.upload("sql", alpha=alpha) for alpha in (8, 16, 32)]
    return {item["version"]: item["digest"] for item in made}


def split(**weights: int) -> dict[str, Any]:
    """split(v1=90, v2=10)"""
    return {"split": [{"version": int(v[1:]), "weight": w} for v, w in weights.items()]}


async def put(server: Any, body: dict[str, Any], path: str = PROD) -> Any:
    answer = await server.http.put(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def rollback(server: Any, **body: Any) -> Any:
    answer = await server.http.post(f"{PROD}/rollback", json=body or None)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def served(
    server: Any, reference: str = "sql:prod", *, key: str | None = None, **body: Any
) -> int:
    """The version that a request gets, the same everywhere it is told."""
    answer = await server.http.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 1, "adapter_id": reference, **body},
        headers={} if key is None else {"x-sticky-key": key},
    )
    assert answer.status_code == 200, answer.text
    adapter = answer.json()["adapter"]
    assert adapter["digest"] == answer.headers["x-adapter-digest"]
    assert answer.headers["x-adapter-version"] == f"sql@{adapter['version']}"
    assert f"sha256:{server.engine.seen[-1].adapters[0].digest}" == adapter["digest"]
    version: int = adapter["version"]
    return version


def meaning(alias: dict[str, Any]) -> dict[int, int]:
    return {item["version"]: item["weight"] for item in alias["split"]}


# --- what an alias means -------------------------------------------------------------------------


async def test_an_alias_moves_and_goes(server: Any, sql: dict[int, str]) -> None:
    assert await put(server, {"version": 1}) == {
        "id": "sql",
        "object": "alias",
        "alias": "prod",
        "revision": 1,
        "version": 1,
        "split": [{"version": 1, "weight": 100}],
    }
    assert (await server.http.get("/v1/adapters/sql:prod")).json()["digest"] == sql[1]
    moved = await put(server, {"version": 2})
    assert (moved["revision"], moved["version"]) == (2, 2)
    assert (await server.http.get("/v1/adapters/sql:prod")).json()["version"] == 2
    assert (await server.http.get("/v1/adapters/sql")).json()["aliases"] == {
        "prod": [{"version": 2, "weight": 100}]
    }
    assert (await server.http.get(PROD)).json() == moved
    gone = await server.http.delete(PROD)
    assert gone.json() == {"id": "sql", "alias": "prod", "deleted": True}
    assert (await server.http.get("/v1/adapters/sql:prod")).status_code == 404
    assert (await server.http.get("/v1/adapters/sql")).json()["aliases"] == {}
    for call in (server.http.get, server.http.delete):
        assert (await call(PROD)).json()["error"]["code"] == "alias_not_found"


async def test_a_moved_alias_is_seen_by_the_next_request(server: Any, sql: dict[int, str]) -> None:
    """Resolutions are cached; a change must empty the cache."""
    for version in (1, 2, 1):
        await put(server, {"version": version})
        assert await served(server) == version
    await put(server, split(v2=1, v3=0))
    assert await served(server) == 2
    await server.http.delete(PROD)
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "sql:prod"})
    assert answer.status_code == 404


async def test_every_alias_of_an_adapter_is_listed(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=90, v2=10))
    await put(server, {"version": 3}, "/v1/adapters/sql/aliases/beta")
    await put(server, {"version": 3}, "/v1/adapters/sql/aliases/gone")
    await server.http.delete("/v1/adapters/sql/aliases/gone")
    listed = (await server.http.get("/v1/adapters/sql/aliases")).json()
    assert [(a["alias"], a["version"], meaning(a)) for a in listed["data"]] == [
        ("beta", 3, {3: 100}),
        ("prod", None, {1: 90, 2: 10}),
    ]
    models = (await server.http.get("/v1/models")).json()["data"]
    assert [m["id"] for m in models] == ["tiny", "sql", "sql:beta", "sql:prod"]
    assert (await server.http.get("/v1/models/sql:prod")).json()["root"] == "sql"


async def test_an_upload_takes_the_alias_it_names(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=90, v2=10))
    made = await server.upload("sql", alpha=64, alias="prod")
    assert made["aliases"] == {"prod": [{"version": 4, "weight": 100}]}
    again = await server.upload("sql", alpha=64, alias="prod")
    assert again["version"] == 4
    assert (await server.http.get(PROD)).json()["revision"] == 2, "the same again changes nothing"


async def test_a_bare_name_is_the_newest_or_what_default_says(
    server: Any, sql: dict[int, str]
) -> None:
    default = "/v1/adapters/sql/aliases/default"
    assert await served(server, "sql") == 3
    await put(server, {"version": 1}, default)
    assert await served(server, "sql") == await served(server, "sql:default") == 1
    await server.upload("sql", alpha=64)
    assert await served(server, "sql") == 1, "an upload is no roll-out once there is a default"
    assert await served(server, "sql:latest") == 4
    newest = (await server.http.get("/v1/adapters/sql")).json()
    assert newest["version"] == 4, "described by its newest version all the same"
    slot = (await server.http.post("/v1/admin/adapters/sql/load")).json()
    assert slot["version"] == 1, "an operator's order is about what requests get"
    await server.http.delete(default)
    assert await served(server, "sql") == await served(server, "sql:latest") == 4


# --- splits --------------------------------------------------------------------------------------


async def test_a_key_sticks_to_its_version(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=50, v2=50))
    keys = [f"user-{i}" for i in range(60)]
    first = {key: await served(server, key=key) for key in keys}
    assert set(first.values()) == {1, 2}
    assert {key: await served(server, key=key) for key in keys} == first
    assert {key: await served(server, user=key) for key in keys} == first
    assert {key: await served(server, key=key, user="another") for key in keys} == first
    assert {key: await served(server, model="sql:prod", key=key) for key in keys} == first
    chat = {"messages": [{"role": "user", "content": "x"}], "model": "sql:prod", "max_tokens": 1}
    for key in keys[:8]:
        answer = await server.http.post("/v1/chat/completions", json={**chat, "user": key})
        assert answer.json()["adapter"]["version"] == first[key]


async def test_a_bare_name_sticks_like_its_default(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=50, v2=50), "/v1/adapters/sql/aliases/default")
    for key in (f"user-{i}" for i in range(30)):
        assert await served(server, "sql", key=key) == await served(server, "sql:default", key=key)


async def test_without_a_key_requests_spread(server: Any, sql: dict[int, str]) -> None:
    """1 - 2 * 0.5^60: it does not fail by chance."""
    await put(server, split(v1=50, v2=50))
    assert {await served(server) for _ in range(60)} == {1, 2}
    assert {await served(server, key="") for _ in range(60)} == {1, 2}, "an empty key is none"


async def test_requests_are_shared_by_weight(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=80, v3=20))
    counts = Counter([await served(server, key=f"key-{i}") for i in range(400)])
    assert set(counts) == {1, 3}
    assert abs(counts[3] - 80) <= 6 * (400 * 0.2 * 0.8) ** 0.5


async def test_all_choices_of_a_request_run_on_one_version(
    server: Any, sql: dict[int, str]
) -> None:
    await put(server, split(v1=50, v2=50))
    for _ in range(8):
        server.engine.seen.clear()
        await served(server, prompt=["a", "b"], n=3)
        assert len(server.engine.seen) == 6
        assert len({request.adapters for request in server.engine.seen}) == 1
    both = {"model": "sql:prod", "adapter_id": "sql:prod"}
    for _ in range(16):
        await served(server, "sql:prod", **both)


async def test_a_composition_takes_aliases(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=50, v2=50))
    polite = (await server.upload("polite", fill=0.25))["digest"]
    for key in ("a", "b", "c", "d", "e"):
        alone = await served(server, key=key)
        answer = await server.http.post(
            "/v1/completions",
            json={
                "prompt": "x",
                "user": key,
                "adapters": [{"id": "sql:prod", "weight": 0.5}, {"id": "polite@1"}],
            },
        )
        assert [(a["id"], a["version"], a["digest"]) for a in answer.json()["adapters"]] == [
            ("sql", alone, sql[alone]),
            ("polite", 1, polite),
        ]


async def test_operators_name_one_version(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=90, v2=10))
    for order in ("load", "evict", "pin", "unpin"):
        answer = await server.http.post(f"/v1/admin/adapters/sql:prod/{order}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (409, "alias_is_split")
        assert "sql@1, sql@2" in error["message"]
    assert (await server.http.get("/v1/adapters/sql:prod/download")).status_code == 409
    shown = (await server.http.get("/v1/adapters/sql:prod")).json()
    assert shown["version"] == 1, "a split is shown by its heaviest version"


async def test_a_version_that_cannot_be_used_fails_its_share_only(
    server: Any, sql: dict[int, str]
) -> None:
    """Going to another version instead would hide that the canary is dead."""
    await put(server, split(v1=50, v2=50))
    async with server.runtime.db.unit_of_work() as session:
        from loraplex.platform.models import AdapterVersion

        row = await session.get(AdapterVersion, 2)
        row.status, row.error = "failed", "its files are gone"
    server.runtime.resolver.forget()
    seen = set()
    for i in range(40):
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "x", "model": "sql:prod", "user": f"u{i}"}
        )
        if answer.status_code == 200:
            assert answer.json()["adapter"]["version"] == 1
        else:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (409, "adapter_not_ready")
            assert "sql@2" in error["message"]
        seen.add(answer.status_code)
    assert seen == {200, 409}
    refused = await server.http.put(PROD, json={"version": 2})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_not_ready")


# --- what is refused -----------------------------------------------------------------------------

BAD_ORDERS: dict[str, tuple[Any, int, str]] = {
    "nothing": ({}, 400, "either"),
    "both": ({"version": 1, **split(v1=1)}, 400, "either"),
    "empty split": ({"split": []}, 400, "at least 1"),
    "weights all zero": (split(v1=0, v2=0), 400, "every weight is 0"),
    "negative weight": (split(v1=-1, v2=2), 400, "greater than or equal to 0"),
    "weight beyond reason": (split(v1=10**7), 400, "less than or equal to"),
    "fraction": ({"split": [{"version": 1, "weight": 0.9}]}, 400, "integer"),
    "weight missing": ({"split": [{"version": 1}]}, 400, "required"),
    "boolean": ({"version": True}, 400, "integer"),
    "text": ({"version": "1"}, 400, "integer"),
    "twice": ({"split": [{"version": 1, "weight": 1}] * 2}, 400, "named twice"),
    "too many": (split(**{f"v{i}": 1 for i in range(1, 18)}), 400, "at most 16"),
    "version zero": ({"version": 0}, 400, "greater than or equal to 1"),
    "version huge": ({"version": 10**30}, 400, "less than"),
    "unknown version": ({"version": 7}, 404, "sql@7"),
    "unknown in split": (split(v1=1, v9=0), 404, "sql@9"),
    "unknown field": ({"version": 1, "sticky": True}, 400, "not permitted"),
    "a list": ([1], 400, "dictionary"),
}


async def test_bad_orders_change_nothing(server: Any, sql: dict[int, str]) -> None:
    await put(server, {"version": 3})
    for kind, (body, status, word) in BAD_ORDERS.items():
        answer = await server.http.put(PROD, json=body)
        assert answer.status_code == status, (kind, answer.text)
        assert word in answer.json()["error"]["message"], kind
    assert (await server.http.get(PROD)).json()["revision"] == 1


async def test_bad_names_are_refused(
    server: Any, sql: dict[int, str], upload_parts: Callable[..., Any]
) -> None:
    for name in ("Bad!", "latest", "3", "x" * 129, "a b", "-a"):
        put_ = await server.http.put(f"/v1/adapters/sql/aliases/{name}", json={"version": 1})
        form = {"name": "sql", "alias": name}
        uploaded = await server.http.post("/v1/adapters", data=form, files=upload_parts())
        for answer in (put_, uploaded):
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "alias"), error
            assert error["code"] == "invalid_request"
    assert (await server.http.get("/v1/adapters/sql/aliases")).json()["data"] == []


async def test_aliases_of_nobody(server: Any) -> None:
    path = "/v1/adapters/nobody/aliases"
    for answer in (
        await server.http.get(path),
        await server.http.get(f"{path}/prod"),
        await server.http.get(f"{path}/prod/history"),
        await server.http.put(f"{path}/prod", json={"version": 1}),
        await server.http.delete(f"{path}/prod"),
        await server.http.post(f"{path}/prod/rollback"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


async def test_an_alias_belongs_to_the_id_not_to_a_version(
    server: Any, sql: dict[int, str]
) -> None:
    for reference in ("sql@1", "sql:prod", sql[1]):
        path = f"/v1/adapters/{reference}/aliases/prod"
        answer = await server.http.put(path, json={"version": 1})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_request")
        assert "id alone" in error["message"]


# --- history and rollback ------------------------------------------------------------------------


async def test_the_history_tells_who_made_it_what(start: Any) -> None:
    async with start(api_key="alices-key,robots-key") as server:
        server.http.headers["authorization"] = "Bearer alices-key"
        for alpha in (8, 16):
            await server.upload("sql", alpha=alpha)
        await put(server, {"version": 1})
        server.http.headers["authorization"] = "Bearer robots-key"
        await put(server, split(v1=90, v2=10))
        await server.http.delete(PROD)
        found = (await server.http.get(f"{PROD}/history")).json()
        assert [(r["revision"], meaning(r), r["restores"]) for r in found["data"]] == [
            (3, {}, None),
            (2, {1: 90, 2: 10}, None),
            (1, {1: 100}, None),
        ]
        robot, again, alice = (r["actor"] for r in found["data"])
        assert robot == again != alice
        assert all(isinstance(r["at"], int) for r in found["data"])
        page = (await server.http.get(f"{PROD}/history", params={"limit": 1, "before": 3})).json()
        assert [r["revision"] for r in page["data"]] == [2]
        assert page["has_more"] is True
        for bad in ({"before": 10**30}, {"before": 0}, {"limit": 0}):
            answer = await server.http.get(f"{PROD}/history", params=bad)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(bad)))
        logged = (await server.http.get("/v1/admin/events")).json()["data"][2:]
        assert [(e["action"], e["subject"], e["actor"]) for e in logged] == [
            ("alias.set", "sql:prod", alice),
            ("alias.set", "sql:prod", robot),
            ("alias.delete", "sql:prod", robot),
        ]
        assert logged[1]["before"] == {"split": [{"version": 1, "weight": 100}]}
        assert logged[1]["after"] == split(v1=90, v2=10)
        assert logged[2]["after"] is None


async def test_a_rollback_is_one_call(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=90, v2=10))
    await put(server, {"version": 3})
    back = await rollback(server)
    assert (back["revision"], meaning(back)) == (3, {1: 90, 2: 10})
    assert await served(server) in (1, 2)
    history = (await server.http.get(f"{PROD}/history")).json()["data"]
    assert [(r["revision"], r["restores"]) for r in history] == [(3, 1), (2, None), (1, None)]


async def test_a_second_rollback_goes_further_back_not_to_the_bad_one(
    server: Any, sql: dict[int, str]
) -> None:
    for version in (1, 2, 3):
        await put(server, {"version": version})
    assert (await rollback(server))["version"] == 2
    assert (await rollback(server))["version"] == 1
    answer = await server.http.post(f"{PROD}/rollback")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "rollback_impossible")
    await put(server, {"version": 3})
    assert (await rollback(server))["version"] == 1
    assert (await server.http.post(f"{PROD}/rollback")).status_code == 409


async def test_a_rollback_to_a_revision_can_be_repeated(server: Any, sql: dict[int, str]) -> None:
    for version in (1, 2, 3):
        await put(server, {"version": version})
    for _ in range(3):
        back = await rollback(server, revision=1)
        assert (back["version"], back["revision"]) == (1, 4)


async def test_a_deleted_alias_comes_back(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=1, v2=2))
    await server.http.delete(PROD)
    assert meaning(await rollback(server)) == {1: 1, 2: 2}
    await server.http.delete(PROD)
    again = await put(server, {"version": 3})
    assert again["revision"] == 5, "revisions go on counting"


async def test_rollbacks_that_lead_nowhere(server: Any, sql: dict[int, str]) -> None:
    assert (await server.http.post(f"{PROD}/rollback")).json()["error"]["code"] == "alias_not_found"
    await put(server, {"version": 1})
    await put(server, {"version": 2})
    await server.http.delete(PROD)
    for revision, code in ((9, "rollback_impossible"), (3, "rollback_impossible")):
        answer = await server.http.post(f"{PROD}/rollback", json={"revision": revision})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (409, code, "revision")
    for bad in ({"revision": 0}, {"revision": "1"}, {"steps": 2}):
        assert (await server.http.post(f"{PROD}/rollback", json=bad)).status_code == 400
    await server.http.delete("/v1/adapters/sql@1")
    gone = await server.http.post(f"{PROD}/rollback", json={"revision": 1})
    assert gone.status_code == 404
    assert "sql@1" in gone.json()["error"]["message"]
    assert (await server.http.get(PROD)).status_code == 404


# --- deletion ------------------------------------------------------------------------------------


async def test_an_alias_protects_its_versions(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=90, v2=10))
    await put(server, {"version": 1}, "/v1/adapters/sql/aliases/stable")
    refused = await server.http.delete("/v1/adapters/sql?version=1")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (409, "version_has_alias")
    assert "sql:prod, sql:stable" in error["message"]
    assert "force=true" in error["message"]
    assert await served(server, "sql@1") == 1
    forced = await server.http.delete("/v1/adapters/sql@1?force=true")
    assert forced.status_code == 200
    left = (await server.http.get("/v1/adapters/sql")).json()["aliases"]
    assert left == {"prod": [{"version": 2, "weight": 10}]}
    assert {await served(server) for _ in range(10)} == {2}
    history = (await server.http.get(f"{PROD}/history")).json()["data"]
    assert [meaning(r) for r in history] == [{2: 10}, {1: 90, 2: 10}]
    stable = (await server.http.get("/v1/adapters/sql/aliases/stable/history")).json()["data"]
    assert [meaning(r) for r in stable] == [{}, {1: 100}]
    actions = [e["action"] for e in (await server.http.get("/v1/admin/events")).json()["data"]]
    assert actions[-3:] == ["alias.set", "alias.delete", "adapter.delete"]


async def test_a_split_left_without_weight_goes(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=100, v2=0))
    assert (await server.http.delete("/v1/adapters/sql@2")).status_code == 409, "named is named"
    await server.http.delete("/v1/adapters/sql@1?force=true")
    assert (await server.http.get("/v1/adapters/sql")).json()["aliases"] == {}


async def test_an_adapter_takes_its_aliases_with_it(server: Any, sql: dict[int, str]) -> None:
    await put(server, split(v1=90, v2=10))
    await server.http.delete("/v1/adapters/sql")
    await server.upload("sql", alpha=64)
    assert (await server.http.get("/v1/adapters/sql")).json()["aliases"] == {}
    answer = await server.http.post(f"{PROD}/rollback")
    assert answer.json()["error"]["code"] == "alias_not_found"


async def test_a_draining_version_gets_no_requests_and_no_alias(
    server: Any, sql: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(server, split(v1=50, v2=50))
    draining, go_on = asyncio.Event(), asyncio.Event()
    forget = server.engine.forget

    async def slow_forget(digest: str, **options: Any) -> Any:
        draining.set()
        await go_on.wait()
        return await forget(digest, **options)

    monkeypatch.setattr(server.engine, "forget", slow_forget)
    deletion = asyncio.create_task(server.http.delete("/v1/adapters/sql@2?force=true"))
    await draining.wait()
    assert {await served(server, key=f"u{i}") for i in range(20)} == {1}
    refused = await server.http.put(PROD, json={"version": 2})
    assert refused.json()["error"]["code"] == "adapter_not_found"
    go_on.set()
    assert (await deletion).status_code == 200
    assert meaning((await server.http.get(PROD)).json()) == {1: 50}


async def test_a_refused_deletion_leaves_the_alias(
    server: Any, sql: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex.engine.errors import AdapterInUse

    async def refuse(digest: str, **options: Any) -> Any:
        raise AdapterInUse("pinned", code="adapter_pinned")

    await put(server, split(v1=50, v2=50))
    monkeypatch.setattr(server.engine, "forget", refuse)
    assert (await server.http.delete("/v1/adapters/sql@2?force=true")).status_code == 409
    assert meaning((await server.http.get(PROD)).json()) == {1: 50, 2: 50}
    assert {await served(server, key=f"u{i}") for i in range(40)} == {1, 2}


# --- under load, and over restarts ---------------------------------------------------------------


async def test_running_requests_end_on_the_version_they_began_with(
    server: Any, sql: dict[int, str], until: Callable[..., Any]
) -> None:
    """A request resolves once. Moving its alias, and even deleting it, is for later ones."""
    await put(server, {"version": 1})
    server.engine.hold = asyncio.Event()
    body = {"prompt": "x", "model": "sql:prod", "max_tokens": 5, "stream": True}
    running = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await until(lambda: len(server.engine.running) == 1)
    await put(server, {"version": 2})
    later = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await until(lambda: len(server.engine.running) == 2)
    await server.http.delete(PROD)
    server.engine.hold.set()
    for request, version in ((running, 1), (later, 2)):
        answer = await request
        assert answer.headers["x-adapter-digest"] == sql[version]
        last = json.loads(answer.text.strip().split("\n\n")[-2].removeprefix("data: "))
        assert last["adapter"] == {"id": "sql", "version": version, "digest": sql[version]}
        assert last["choices"][0]["finish_reason"] == "length"


async def test_a_switch_under_load_mixes_nothing(server: Any, sql: dict[int, str]) -> None:
    numbers = itertools.count()
    switched = asyncio.Event()
    answers: dict[tuple[int, ...], httpx.Response] = {}

    async def client() -> None:
        while not switched.is_set():
            number = next(numbers)
            prompt = [number % 250, number // 250]
            body = {
                "prompt": prompt,
                "model": "sql:prod",
                "max_tokens": 3,
                "stream": number % 2 > 0,
            }
            answers[tuple(prompt)] = await server.http.post("/v1/completions", json=body)

    async def switch() -> None:
        for i in range(12):
            await put(server, split(v1=1, v2=1 + i) if i % 3 else {"version": 1 + i % 2})
        switched.set()

    await put(server, {"version": 3})
    await asyncio.gather(switch(), *(client() for _ in range(20)))
    ran = {tuple(r.prompt_token_ids): f"sha256:{r.adapters[0].digest}" for r in server.engine.seen}
    assert len(ran) == len(answers)
    for prompt, answer in answers.items():
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-adapter-digest"] == ran[prompt], "reported is what ran"
        version = int(answer.headers["x-adapter-version"].removeprefix("sql@"))
        assert sql[version] == ran[prompt]
    assert set(ran.values()) >= {sql[1], sql[2]}, "no switch was seen: this proved nothing"


async def test_changes_at_once_are_one_history(server: Any, sql: dict[int, str]) -> None:
    orders = [split(v1=i, v2=1) for i in range(1, 21)]
    answers = await asyncio.gather(*(put(server, order) for order in orders))
    assert sorted(answer["revision"] for answer in answers) == list(range(1, 21))
    history = (await server.http.get(f"{PROD}/history")).json()["data"]
    assert {r["revision"]: meaning(r) for r in history} == {
        answer["revision"]: meaning(answer) for answer in answers
    }
    assert meaning((await server.http.get(PROD)).json()) == meaning(history[0])


async def test_a_restart_keeps_aliases_history_and_assignments(start: Any) -> None:
    keys = [f"user-{i}" for i in range(40)]
    async with start() as server:
        for alpha in (8, 16):
            await server.upload("sql", alpha=alpha)
        await put(server, {"version": 1})
        await put(server, split(v1=50, v2=50))
        before = {key: await served(server, key=key) for key in keys}
        history = (await server.http.get(f"{PROD}/history")).json()
    async with start() as server:
        assert {key: await served(server, key=key) for key in keys} == before
        assert (await server.http.get(f"{PROD}/history")).json() == history
        assert (await rollback(server))["version"] == 1

"""Tenants: each has names of its own, and sees of the others what they share."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex.engine.api import AdapterEvent, AdapterState
from loraplex.platform.models import Pull

OPERATOR = "operator-key"


@pytest.fixture
async def server(start: Any) -> Any:
    async with start(api_key=OPERATOR) as running:
        running.http.headers["authorization"] = f"Bearer {OPERATOR}"
        for name in ("acme", "beta"):
            made = await running.http.post("/v1/admin/tenants", json={"name": name})
            assert made.status_code == 201
        yield running


async def key_of(server: Any, tenant: str | None, **order: Any) -> dict[str, str]:
    order.setdefault("scopes", ["infer", "upload", "admin"])
    made = await server.http.post("/v1/admin/keys", json={"tenant": tenant, **order})
    assert made.status_code == 201, made.text
    return {"authorization": f"Bearer {made.json()['key']}"}


async def upload(
    server: Any, headers: dict[str, str], name: str, upload_parts: Any, **content: Any
) -> Any:
    return await server.http.post(
        "/v1/adapters", data={"name": name}, files=upload_parts(**content), headers=headers
    )


async def complete(server: Any, headers: dict[str, str], adapter: str) -> Any:
    body = {"prompt": "x", "max_tokens": 1, "adapter_id": adapter}
    return await server.http.post("/v1/completions", json=body, headers=headers)


async def test_names_are_per_tenant(server: Any, upload_parts: Any) -> None:
    acme, beta = await key_of(server, "acme"), await key_of(server, "beta")
    digests = {}
    for headers, alpha in ((acme, 8), (beta, 16)):
        made = await upload(server, headers, "sql", upload_parts, alpha=alpha)
        assert made.status_code == 201
        digests[made.json()["tenant"]] = made.json()["digest"]
    assert len(set(digests.values())) == 2
    for headers, tenant in ((acme, "acme"), (beta, "beta")):
        answer = (await complete(server, headers, "sql")).json()
        assert answer["adapter"] == {"id": "sql", "version": 1, "digest": digests[tenant]}
        listed = (await server.http.get("/v1/adapters", headers=headers)).json()["data"]
        assert [(item["id"], item["tenant"]) for item in listed] == [("sql", tenant)]
    assert (await complete(server, acme, "acme/sql")).json()["adapter"]["id"] == "sql"
    # An operator's bare names are the tenant default's; the others' are qualified.
    operator = {"authorization": f"Bearer {OPERATOR}"}
    assert (await complete(server, operator, "sql")).status_code == 404
    answer = (await complete(server, operator, "beta/sql")).json()["adapter"]
    assert (answer["id"], answer["digest"]) == ("beta/sql", digests["beta"])
    as_beta = {**operator, "x-tenant": "beta"}
    assert (await complete(server, as_beta, "sql")).json()["adapter"]["id"] == "sql"


async def test_what_another_tenant_keeps_to_itself_does_not_exist(
    server: Any, upload_parts: Any
) -> None:
    acme, beta = await key_of(server, "acme"), await key_of(server, "beta")
    digest = (await upload(server, acme, "sql", upload_parts)).json()["digest"]
    for there, missing in (
        ("acme/sql", "acme/nix"),
        ("acme/sql@1", "acme/nix@1"),
        (digest, "sha256:" + "0" * 64),
    ):
        real, unreal = await complete(server, beta, there), await complete(server, beta, missing)
        assert real.status_code == unreal.status_code == 404
        assert real.text.replace(there, "X") == unreal.text.replace(missing, "X")
        assert real.json()["error"]["code"] == "adapter_not_found"


async def test_shared_and_public_adapters_are_used_but_not_taken(
    server: Any, upload_parts: Any
) -> None:
    acme, beta = await key_of(server, "acme"), await key_of(server, "beta")
    await upload(server, acme, "sql", upload_parts)
    other = {**beta, "x-tenant": "acme"}
    for change in ({"visibility": "shared", "shared_with": ["beta"]}, {"visibility": "public"}):
        changed = await server.http.patch("/v1/adapters/sql", json=change, headers=acme)
        assert changed.json()["visibility"] == change["visibility"]
        used = await complete(server, beta, "acme/sql")
        assert used.json()["adapter"]["id"] == "acme/sql"
        seen = (await server.http.get("/v1/adapters/sql", headers=other)).json()
        assert (seen["id"], seen["tenant"], seen["shared_with"]) == ("sql", "acme", [])
        listed = (await server.http.get("/v1/models", headers=beta)).json()["data"]
        assert [model["id"] for model in listed] == ["tiny", "acme/sql"]
        for method, path in (
            ("GET", "/v1/adapters/sql/download"),
            ("DELETE", "/v1/adapters/sql"),
            ("POST", "/v1/adapters/sql/verify"),
            ("POST", "/v1/admin/adapters/sql/load"),
            ("DELETE", "/v1/adapters/sql/aliases/prod"),
            ("GET", "/v1/adapters/sql/aliases/prod/history"),
        ):
            answer = await server.http.request(method, path, headers=other)
            assert answer.status_code == 403, path
            assert answer.json()["error"]["code"] == "permission_denied"
    await server.http.patch(
        "/v1/adapters/sql", json={"visibility": "shared", "shared_with": []}, headers=acme
    )
    assert (await complete(server, beta, "acme/sql")).status_code == 404


async def test_a_key_for_some_adapters_sees_no_others(server: Any, upload_parts: Any) -> None:
    acme = await key_of(server, "acme")
    for name, alpha in (("sql", 8), ("fr", 16)):
        await upload(server, acme, name, upload_parts, alpha=alpha)
    only = await key_of(server, "acme", adapters=["sql"])
    assert (await complete(server, only, "sql")).status_code == 200
    assert (await complete(server, only, "fr")).status_code == 404
    listed = (await server.http.get("/v1/adapters", headers=only)).json()["data"]
    assert [item["id"] for item in listed] == ["sql"]
    refused = await upload(server, only, "fr", upload_parts)
    assert refused.status_code == 403
    more = await server.http.post("/v1/admin/keys", json={"adapters": ["fr"]}, headers=only)
    assert more.status_code == 403
    fewer = await server.http.post("/v1/admin/keys", json={"adapters": ["sql"]}, headers=only)
    assert fewer.status_code == 201


async def test_an_operator_works_for_a_tenant_that_exists(server: Any, upload_parts: Any) -> None:
    made = await upload(server, {"x-tenant": "acme"}, "sql", upload_parts)
    assert (made.status_code, made.json()["tenant"]) == (201, "acme")
    nowhere = await upload(server, {"x-tenant": "nobody"}, "sql", upload_parts)
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "tenant_not_found")
    odd = await server.http.get("/v1/adapters", headers={"x-tenant": "../etc"})
    assert (odd.status_code, odd.json()["error"]["code"]) == (400, "invalid_request")


async def test_a_tenant_makes_keys_of_its_own_only(server: Any) -> None:
    acme = await key_of(server, "acme")
    made = await server.http.post("/v1/admin/keys", json={"name": "ci"}, headers=acme)
    assert (made.status_code, made.json()["tenant"]) == (201, "acme")
    other = await server.http.post("/v1/admin/keys", json={"tenant": "beta"}, headers=acme)
    nobody = await server.http.post("/v1/admin/keys", json={"tenant": "nobody"}, headers=acme)
    assert other.status_code == nobody.status_code == 404
    assert other.text.replace("beta", "X") == nobody.text.replace("nobody", "X")
    operators = (await server.http.get("/v1/admin/keys")).json()["data"]
    acmes = (await server.http.get("/v1/admin/keys", headers=acme)).json()["data"]
    assert {key["tenant"] for key in acmes} == {"acme"}
    assert len(operators) == len(acmes) == 2
    await key_of(server, "beta")
    (foreign,) = (
        key["id"]
        for key in (await server.http.get("/v1/admin/keys")).json()["data"]
        if key["tenant"] == "beta"
    )
    gone = await server.http.delete(f"/v1/admin/keys/{foreign}", headers=acme)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "key_not_found")


async def test_the_audit_log_says_who_changed_what(server: Any, upload_parts: Any) -> None:
    acme = await key_of(server, "acme", name="ops")
    await upload(server, acme, "sql", upload_parts)
    change = {"limits": {"max_concurrent": 3}}
    await server.http.patch("/v1/admin/tenants/acme", json=change)
    mine = (await server.http.get("/v1/admin/events", headers=acme)).json()["data"]
    assert [event["action"] for event in mine] == ["key.create", "adapter.register"]
    assert mine[1]["actor"] == f"key:{mine[0]['subject']}"
    everything = (await server.http.get("/v1/admin/events")).json()["data"]
    patch = everything[-1]
    assert (patch["action"], patch["subject"], patch["tenant"]) == ("tenant.patch", "acme", "")
    assert patch["before"]["limits"] == {}
    assert patch["after"]["limits"] == {"max_concurrent": 3}
    secret = acme["authorization"].removeprefix("Bearer ")
    assert secret not in str(everything)


async def test_who_made_way_for_whom_is_told_of_own_adapters_only(
    server: Any, upload_parts: Any
) -> None:
    acme, beta = await key_of(server, "acme"), await key_of(server, "beta")
    mine = (await upload(server, acme, "mine", upload_parts, alpha=8)).json()["digest"][7:]
    more = (await upload(server, acme, "more", upload_parts, alpha=4)).json()["digest"][7:]
    other = (await upload(server, beta, "sql", upload_parts, alpha=16)).json()["digest"][7:]
    gone = AdapterState.DEVICE, AdapterState.HOST
    for leaving, coming in ((mine, other), (mine, more), (more, mine)):
        detail = f"makes room for {coming}"
        server.engine.tell(AdapterEvent(leaving, *gone, 1.0, 100.0, detail, "room"))
    path = "/v1/admin/transitions"
    answer = await server.http.get(path, headers=acme)
    assert other not in answer.text
    assert [t["detail"] for t in answer.json()["data"]] == [
        f"makes room for {mine}",
        f"makes room for {more}",
        "makes room for another adapter",
    ]
    assert other in (await server.http.get(path)).text  # an operator's


async def test_an_operator_tells_pulls_of_one_name_apart(server: Any) -> None:
    acme, beta = await key_of(server, "acme"), await key_of(server, "beta")
    async with server.runtime.db.unit_of_work() as session:
        for tenant in ("acme", "default"):
            row = Pull(tenant=tenant, name="sql", source=f"dir:shared/{tenant}", actor="key:x")
            row.status = "ready"
            session.add(row)
    ids = []
    for headers in ({}, acme, beta):
        answer = await server.http.get("/v1/admin/pulls", headers=headers)
        ids.append([(pull["id"], pull["source"]) for pull in answer.json()["data"]])
    assert ids == [
        [("acme/sql", "dir:shared/acme"), ("sql", "dir:shared/default")],
        [("sql", "dir:shared/acme")],
        [],
    ]

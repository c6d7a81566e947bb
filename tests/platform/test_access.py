"""Every route of the app times every kind of caller: the right status, and nothing leaks.

The routes come from the app itself, so one that is added cannot be forgotten here; one without a
rule in `platform/access.py` fails a test of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from loraplex.platform import access
from loraplex.platform.app import create_app
from loraplex.platform.callers import Caller, Scope
from loraplex.platform.keys import new_key
from loraplex.platform.models import ApiKey, utc_now
from loraplex.platform.settings import Settings

OPERATOR = "operator-key"
SECRET = "zebra-launch-plan"  # acme's, in the description of its adapter
FRAMEWORK = {"/docs", "/openapi.json", "/docs/oauth2-redirect"}


def _leaves(routes: Any) -> Iterator[Any]:
    """Routes of the app, those of included routers too."""
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", None
        )
        if inner:
            yield from _leaves(inner)
        else:
            yield route


def operations(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything the app answers."""
    found = {
        (method, route.path)
        for route in _leaves(app.routes)
        if isinstance(route, APIRoute)
        for method in route.methods - {"HEAD"}
    }
    published = {
        (method.upper(), path)
        for path, item in app.openapi()["paths"].items()
        for method in item
        if method in {"get", "put", "post", "delete", "patch"}
    }
    assert published <= {(method, path.replace(":path}", "}")) for method, path in found}
    return sorted(found)


@pytest.fixture
def app(tmp_path: Path, fake_engine_module: Any) -> FastAPI:
    """Not started."""
    settings = Settings(model="tiny", data_dir=tmp_path)
    return create_app(settings, fake_engine_module.FakeEngine())


def filled(path: str, adapter: str) -> str:
    path = path.replace("{adapter_id}", adapter).replace("{model_id:path}", f"acme/{adapter}")
    return re.sub(r"\{[^}]+\}", "x1", path)


def body_of(path: str, adapter: str) -> dict[str, Any]:
    """A body that the route takes, about this adapter of acme's wherever it can be."""
    strict: dict[str, dict[str, Any]] = {
        "/v1/adapters/{adapter_id}": {"description": "d"},
        "/v1/adapters/{adapter_id}/aliases/{alias}": {"version": 1},
        "/v1/adapters/{adapter_id}/aliases/{alias}/rollback": {},
        "/v1/adapters/{adapter_id}/verify": {},
        "/v1/adapters/pull": {"name": adapter, "source": "hub:org/name"},
        "/v1/admin/tenants": {"name": "new"},
        "/v1/admin/tenants/{tenant}": {},
        "/v1/admin/keys": {},
        "/v1/admin/adapters/{adapter_id}/load": {},
        "/v1/admin/adapters/{adapter_id}/evict": {},
        "/detokenize": {"model": f"acme/{adapter}", "tokens": [97]},
        "/tokenize": {"model": f"acme/{adapter}", "prompt": "x"},
    }
    if path in strict:
        return strict[path]
    reference = f"acme/{adapter}"
    return {
        "model": reference,
        "prompt": "x",
        "input": "x",
        "inputs": "x",
        "text": "x",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "x"}],
        "parameters": {"adapter_id": reference, "max_new_tokens": 1},
        "lora_name": adapter,
        "lora_path": reference,
    }


async def call(
    server: Any, method: str, path: str, key: str | None, adapter: str = "sql", **headers: str
) -> Any:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    body = None if method in ("GET", "DELETE") else body_of(path, adapter)
    return await server.http.request(
        method, filled(path, adapter), json=body, headers={"x-tenant": "acme", **headers}
    )


def test_every_route_is_named_by_a_rule(app: FastAPI) -> None:
    found = operations(app)
    assert len(found) > 40
    missing = [
        (method, path)
        for method, path in found
        if access.rule_of(method, filled(path, "sql")) is access.UNKNOWN
    ]
    assert missing == [], "name them in platform/access.py"


def test_only_these_routes_are_open(app: FastAPI) -> None:
    found = {p for m, p in operations(app) if access.rule_of(m, filled(p, "sql")).open}
    assert found <= {"/healthz", "/readyz", "/version", "/health", "/ping"}


def test_a_route_without_a_rule_is_for_operators_only() -> None:
    assert access.rule_of("POST", "/v2/new") is access.UNKNOWN
    assert not access.UNKNOWN.admits(Caller("key:a", "acme", "acme", "a"))
    assert access.UNKNOWN.admits(Caller())


@pytest.fixture
async def server(start: Any, upload_parts: Any) -> Any:
    async with start(api_key=OPERATOR) as running:
        headers = {"authorization": f"Bearer {OPERATOR}"}
        for tenant in ("acme", "beta", "gone"):
            order = {"name": tenant, "description": SECRET}
            await running.http.post("/v1/admin/tenants", json=order, headers=headers)
        data = {"name": "sql", "description": SECRET, "alias": "x1"}
        made = await running.http.post(
            "/v1/adapters",
            data=data,
            files=upload_parts(),
            headers={**headers, "x-tenant": "acme"},
        )
        assert made.status_code == 201
        running.digest = made.json()["digest"].removeprefix("sha256:")
        yield running


async def make_key(server: Any, tenant: str | None, *scopes: str, **state: Any) -> str:
    key_id, key, hashed = new_key()
    async with server.runtime.db.unit_of_work() as session:
        row = ApiKey(id=key_id, hash=hashed, tenant=tenant, scopes=list(scopes), limits={}, **state)
        session.add(row)
    server.runtime.keys.forget()
    return key


ALL = [str(scope) for scope in Scope]


def check_no_leak(server: Any, answer: Any) -> None:
    text = answer.text + str(dict(answer.headers))
    for secret in (SECRET, server.digest, str(server.runtime.settings.data_dir), "Traceback"):
        assert secret not in text, f"{answer.request.url}: {secret}"


async def test_nobody_gets_in_without_a_good_key(server: Any) -> None:
    disabled = await make_key(server, "gone", *ALL)
    headers = {"authorization": f"Bearer {OPERATOR}"}
    await server.http.patch("/v1/admin/tenants/gone", json={"disabled": True}, headers=headers)
    past = utc_now() - timedelta(seconds=1)
    keys = {
        "none": None,
        "bad": "lpx_000000000000_" + "A" * 43,
        "expired": await make_key(server, "acme", *ALL, expires_at=past),
        "revoked": await make_key(server, "acme", *ALL, revoked_at=past),
        "disabled": disabled,
        "expired operator": await make_key(server, None, *ALL, expires_at=past),
    }
    checked = 0
    for method, path in operations(server.app):
        is_open = access.rule_of(method, filled(path, "sql")).open
        for kind, key in keys.items():
            answer = await call(server, method, path, key)
            check_no_leak(server, answer)
            if is_open:
                assert answer.status_code == 200, (method, path)
                continue
            assert answer.status_code == 401, (kind, method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            checked += 1
    assert checked > 200
    assert server.engine.seen == []


async def test_a_key_without_the_scope_is_refused(server: Any) -> None:
    """By a key that has all the others; of an operator and of the adapter's own tenant."""
    keys = {
        (tenant, scope): await make_key(server, tenant, *(s for s in ALL if s != scope))
        for tenant in (None, "acme")
        for scope in ALL
    }
    refused = 0
    for method, path in operations(server.app):
        rule = access.rule_of(method, filled(path, "sql"))
        if rule.open or len(rule.scopes) > 1:
            continue  # any scope is enough
        (scope,) = rule.scopes
        for tenant in (None, "acme"):
            answer = await call(server, method, path, keys[tenant, str(scope)])
            check_no_leak(server, answer)
            assert answer.status_code == 403, (tenant, method, path)
            assert answer.json()["error"]["code"] == "permission_denied"
            refused += 1
    assert refused > 40
    assert server.engine.seen == []
    events = await server.http.get(
        "/v1/admin/events", headers={"authorization": f"Bearer {OPERATOR}"}
    )
    assert events.json()["data"][-1]["action"] in ("adapter.register", "alias.set")


async def test_another_tenant_is_told_what_it_would_be_told_of_nothing(server: Any) -> None:
    """Of each route, about acme's adapter and about one that nobody has."""
    beta = await make_key(server, "beta", *ALL)
    about_adapters = 0
    for method, path in operations(server.app):
        rule = access.rule_of(method, filled(path, "sql"))
        real = await call(server, method, path, beta, "sql")
        unreal = await call(server, method, path, beta, "nix")
        check_no_leak(server, real)
        assert real.status_code == unreal.status_code, (method, path)
        assert real.text.replace("sql", "nix") == unreal.text or "lpx_" in real.text, (method, path)
        if rule.operator:
            assert real.status_code == 403, (method, path)
        elif "{adapter_id}" in path or "{model_id" in path or rule.scopes == {Scope.INFER}:
            assert real.status_code == 404, (method, path, real.text)
            about_adapters += 1
    assert about_adapters > 20
    assert server.engine.seen == []


async def test_its_own_tenant_is_let_through_everywhere(server: Any) -> None:
    """The companion of the tests above: they would pass on a server that refuses everything."""
    acme = await make_key(server, "acme", *ALL)
    for method, path in operations(server.app):
        rule = access.rule_of(method, filled(path, "sql"))
        if method == "DELETE" or rule.operator:
            continue
        answer = await call(server, method, path, acme)
        assert answer.status_code not in (401, 500), (method, path, answer.text)
        assert '"permission_denied"' not in answer.text, (method, path)
        if "{adapter_id}" in path and "pull" not in path:
            assert answer.status_code in (200, 202, 409), (method, path, answer.text)


async def test_what_operators_see_of_all_tenants_a_tenant_sees_of_itself(server: Any) -> None:
    acme, beta = await make_key(server, "acme", *ALL), await make_key(server, "beta", *ALL)
    headers = {"authorization": f"Bearer {acme}"}
    await server.http.post("/v1/admin/adapters/sql/load", headers=headers)
    body = {"model": "sql", "prompt": "x", "max_tokens": 1}
    assert (
        await server.http.post("/v1/completions", json=body, headers=headers)
    ).status_code == 200
    for path in ("slots", "adapters", "transitions", "requests", "events", "pulls", "keys"):
        for key, expected in ((beta, {"keys"}), (acme, {"slots", "adapters", "events", "keys"})):
            answer = await server.http.get(
                f"/v1/admin/{path}", headers={"authorization": f"Bearer {key}"}
            )
            assert answer.status_code == 200
            assert bool(answer.json()["data"]) == (path in expected), (path, answer.text)
    slots = await server.http.get("/v1/admin/slots", headers=headers)
    assert slots.json()["totals"] is None

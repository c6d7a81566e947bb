"""API keys: who gets in, and what stays open."""

from __future__ import annotations

from itertools import product
from typing import Any

KEYS = ("first-secret", "second-secret")


WRONG = (
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong-secret",
    "Bearer first-secre",
    "Bearer first-secret2",
    "Basic first-secret",
    "first-secret",
)


async def test_without_a_key_nothing_but_probes(start: Any) -> None:
    async with start(api_key=KEYS) as server:
        for header, (method, path) in product(
            WRONG,
            (
                ("GET", "/v1/adapters"),
                ("POST", "/v1/completions"),
                ("GET", "/v1/admin/memory"),
                ("GET", "/metrics"),
                ("GET", "/nowhere"),
            ),
        ):
            headers = {} if header is None else {"authorization": header}
            answer = await server.http.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/version", "/docs", "/openapi.json"):
            assert (await server.http.get(path)).status_code == 200


async def test_every_key_opens(start: Any) -> None:
    async with start(api_key=KEYS) as server:
        for key, scheme in product(KEYS, ("Bearer", "bearer")):
            headers = {"authorization": f"{scheme} {key}"}
            answer = await server.http.get("/v1/adapters", headers=headers)
            assert answer.status_code == 200


async def test_the_audit_log_tells_keys_apart_without_telling_them(start: Any) -> None:
    async with start(api_key=KEYS) as server:
        for key, name in zip(KEYS, ("one", "two"), strict=True):
            server.http.headers["authorization"] = f"Bearer {key}"
            await server.upload(name)
        events = (await server.http.get("/v1/admin/events")).json()["data"]
        actors = [event["actor"] for event in events]
        assert len(set(actors)) == 2
        assert all(actor.startswith("key:") for actor in actors)
        assert not any(key in str(events) for key in KEYS)


async def test_without_keys_everyone_is_anonymous(server: Any) -> None:
    await server.upload("sql")
    events = (await server.http.get("/v1/admin/events")).json()["data"]
    assert [event["actor"] for event in events] == ["anonymous"]

"""Usage: every request once, by hour, tenant, key and adapters; seen by whom it concerns."""

from __future__ import annotations

import asyncio
import csv
import io
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from loraplex.platform import usage as usage_module

OPERATOR = {"authorization": "Bearer operator-key"}
MORNING = datetime(2026, 11, 29, 9, 59, 30, tzinfo=UTC)


@pytest.fixture
async def server(start: Any) -> Any:
    async with start(api_key="operator-key") as running:
        running.runtime.usage._now = lambda: MORNING
        yield running


async def key(server: Any, tenant: str, *scopes: str) -> tuple[str, dict[str, str]]:
    await server.http.post("/v1/admin/tenants", json={"name": tenant}, headers=OPERATOR)
    order = {"tenant": tenant, "scopes": scopes or ["infer", "upload"]}
    made = (await server.http.post("/v1/admin/keys", json=order, headers=OPERATOR)).json()
    return made["id"], {"authorization": f"Bearer {made['key']}"}


async def upload(
    server: Any, headers: dict[str, str], name: str, parts: Any, **content: Any
) -> None:
    answer = await server.http.post(
        "/v1/adapters", data={"name": name}, files=parts(**content), headers=headers
    )
    assert answer.status_code == 201


async def complete(server: Any, headers: dict[str, str], **body: Any) -> Any:
    answer = await server.http.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 3, **body}, headers=headers
    )
    return answer


async def rows(server: Any, headers: dict[str, str] = OPERATOR, **query: Any) -> list[Any]:
    answer = await server.http.get("/v1/usage", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    data: list[Any] = answer.json()["data"]
    return data


async def test_every_token_is_counted_once(server: Any, upload_parts: Any) -> None:
    key_id, acme = await key(server, "acme")
    for name, alpha in (("a", 1), ("b", 2)):
        await upload(server, acme, name, upload_parts, alpha=alpha)
    for _ in range(2):
        await complete(server, acme, adapter_id="a")
    both = [{"id": "a", "weight": 1}, {"id": "b", "weight": 1}]
    await complete(server, acme, adapters=both, stream=True)
    await complete(server, acme, n=2)
    found = await rows(server, acme)
    counts = ("adapter", "requests", "prompt_tokens", "generated_tokens")
    seen = {tuple(row[name] for name in counts) for row in found}
    assert seen == {("a@1", 2, 2, 6), ("a@1+b@1", 1, 1, 3), ("", 1, 1, 6)}
    assert {(row["tenant"], row["key_id"]) for row in found} == {("acme", key_id)}
    assert {row["hour"] for row in found} == {int(MORNING.timestamp()) // 3600 * 3600}
    assert all(row["seconds"] >= 0 for row in found)


async def test_a_failure_is_counted_as_one(server: Any) -> None:
    _, acme = await key(server, "acme")
    server.engine.fail_after = 1
    assert (await complete(server, acme)).status_code == 503
    (row,) = await rows(server, acme)
    assert (row["requests"], row["failures"], row["generated_tokens"]) == (1, 1, 1)


async def test_hours_and_filters(server: Any, upload_parts: Any) -> None:
    _, acme = await key(server, "acme")
    await upload(server, acme, "a", upload_parts)
    await upload(server, acme, "a", upload_parts, alpha=3)
    for hour in (9, 10, 11):
        server.runtime.usage._now = lambda hour=hour: MORNING.replace(hour=hour)
        await complete(server, acme, adapter_id=f"a@{1 + hour % 2}")
        await complete(server, acme)
    ten = int(MORNING.replace(hour=10, minute=0, second=0).timestamp())
    assert len(await rows(server)) == 6
    assert [row["adapter"] for row in await rows(server, start=ten, end=ten + 3600)] == ["a@1", ""]
    assert len(await rows(server, adapter="a")) == 3
    assert len(await rows(server, adapter="a@2")) == 2
    assert len(await rows(server, adapter="")) == 3
    assert len(await rows(server, tenant="acme")) == 6
    assert await rows(server, tenant="nobody") == []
    assert await rows(server, key="nobody") == []
    first = await rows(server, limit=4)
    assert first + await rows(server, limit=4, offset=4) == await rows(server)


async def test_who_sees_whose(server: Any) -> None:
    acme_id, acme = await key(server, "acme")
    _, admin = await key(server, "acme", "admin", "infer")
    beta_id, beta = await key(server, "beta")
    for headers in (acme, admin, beta, OPERATOR):
        await complete(server, headers)
    assert {row["key_id"] for row in await rows(server, acme)} == {acme_id}
    assert {row["tenant"] for row in await rows(server, admin)} == {"acme"}
    assert len(await rows(server, admin)) == 2
    assert {row["tenant"] for row in await rows(server)} == {"acme", "beta", "default"}
    for headers, query in (
        (acme, {"key": beta_id}),
        (acme, {"tenant": "beta"}),
        (admin, {"tenant": "beta"}),
    ):
        answer = await server.http.get("/v1/usage", params=query, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    assert await rows(server, admin, key=beta_id) == []


async def test_csv(server: Any) -> None:
    _, acme = await key(server, "acme")
    await complete(server, acme)
    answers = [
        await server.http.get("/v1/usage", params={"format": "csv"}, headers=acme),
        await server.http.get("/v1/usage", headers={**acme, "accept": "text/csv"}),
    ]
    for answer in answers:
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        (row,) = csv.DictReader(io.StringIO(answer.text))
        assert row["hour"] == "2026-11-29T09:00:00Z"
        assert (row["tenant"], row["requests"], row["generated_tokens"]) == ("acme", "1", "3")


async def test_a_normal_stop_loses_nothing(start: Any) -> None:
    async with start() as server:
        await complete(server, {})
    async with start() as server:
        await complete(server, {})
        (row,) = await rows(server, {})
        assert row["requests"] == 2


async def test_a_kill_loses_two_seconds_at_most(
    start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The writer works by itself: nobody asks, nothing is stopped."""
    assert usage_module.FLUSH_INTERVAL_S <= 2
    monkeypatch.setattr(usage_module, "FLUSH_INTERVAL_S", 0.05)
    async with start() as server:
        await complete(server, {})
        query = "SELECT requests, generated_tokens FROM usage_hour"
        for _ in range(200):
            with closing(sqlite3.connect(tmp_path / "data" / "registry.sqlite")) as registry:
                found = list(registry.execute(query))
            if found:
                break
            await asyncio.sleep(0.02)
        assert found == [(1, 3)]


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("INSERT", {}, Exception("database is locked")),
        ConnectionRefusedError("nobody listens"),  # asyncpg's, which SQLAlchemy lets through
    ],
)
async def test_a_write_that_fails_is_tried_again(
    server: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _, acme = await key(server, "acme")
    await complete(server, acme)
    meter = server.runtime.usage

    class Locked:
        def __init__(self, session: Any) -> None:
            raise error

    with monkeypatch.context() as broken:
        broken.setattr(usage_module, "UsageRepository", Locked)
        assert await meter.flush() is False
        await complete(server, acme)
    (row,) = await rows(server, acme)
    assert (row["requests"], row["generated_tokens"]) == (2, 6)

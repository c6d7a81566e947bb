"""Limits: what is over one is told when to come again, and bothers nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.limits import Admission

OPERATOR = {"authorization": "Bearer operator-key"}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def server(start: Any) -> Any:
    async with start(api_key="operator-key") as running:
        running.clock = Clock()
        running.runtime.admission.clock = running.clock
        yield running


async def tenant(server: Any, name: str = "acme", **limits: Any) -> None:
    order = {"name": name, "limits": limits}
    made = await server.http.post("/v1/admin/tenants", json=order, headers=OPERATOR)
    assert made.status_code == 201, made.text


async def key(server: Any, tenant: str = "acme", **limits: Any) -> dict[str, str]:
    order = {"tenant": tenant, "scopes": ["infer", "upload"], "limits": limits}
    made = await server.http.post("/v1/admin/keys", json=order, headers=OPERATOR)
    return {"authorization": f"Bearer {made.json()['key']}"}


async def complete(server: Any, headers: dict[str, str], **body: Any) -> Any:
    return await server.http.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 1, **body}, headers=headers
    )


def check_refused(answer: Any, retry_after: str, *words: str) -> None:
    assert answer.status_code == 429, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert answer.headers["retry-after"] == retry_after
    assert all(word in error["message"] for word in words), error["message"]


async def test_requests_per_second(server: Any) -> None:
    await tenant(server)
    headers = await key(server, requests_per_s=2)
    first = await complete(server, headers)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "500ms"
    assert (await complete(server, headers)).status_code == 200
    refused = await complete(server, headers)
    check_refused(refused, "1", "this API key", "requests_per_s of 2")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(server.engine.seen) == 2
    server.clock.now += 0.5
    assert (await complete(server, headers)).status_code == 200
    assert (await complete(server, headers)).status_code == 429


async def test_a_slow_rate_says_how_long_to_wait(server: Any) -> None:
    await tenant(server)
    headers = await key(server, requests_per_s=0.1)
    assert (await complete(server, headers)).status_code == 200
    check_refused(await complete(server, headers), "10")


async def test_tokens_per_minute_of_prompts_and_outputs(server: Any) -> None:
    """60 a minute are one a second."""
    await tenant(server, tokens_per_min=60)
    headers = await key(server)
    answer = await complete(server, headers, max_tokens=10)
    used = answer.json()["usage"]["total_tokens"]
    assert answer.headers["x-ratelimit-limit-tokens"] == "60"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(60 - used)
    long = await complete(server, headers, prompt=[97] * (60 - used + 1))
    check_refused(long, "1", "tenant 'acme'", "tokens_per_min of 60")
    assert len(server.engine.seen) == 1
    # Output is not cut: what it takes too much is waited for by the next.
    assert (await complete(server, headers, prompt=[97] * 40, max_tokens=28)).status_code == 200
    overdrawn = used + 40 + 28 - 60
    check_refused(await complete(server, headers), str(overdrawn))
    server.clock.now += overdrawn + 2
    assert (await complete(server, headers)).status_code == 200


async def test_all_keys_of_a_tenant_share_its_limits(server: Any) -> None:
    await tenant(server, requests_per_s=2)
    await tenant(server, "beta", requests_per_s=2)
    one, two = await key(server), await key(server)
    assert (await complete(server, one)).status_code == 200
    assert (await complete(server, two)).status_code == 200
    check_refused(await complete(server, one), "1", "tenant 'acme'")
    assert (await complete(server, await key(server, "beta"))).status_code == 200


async def test_limits_change_while_the_server_runs(server: Any) -> None:
    await tenant(server, requests_per_s=1)
    headers = await key(server)
    assert (await complete(server, headers)).status_code == 200
    assert (await complete(server, headers)).status_code == 429
    change = {"limits": {"requests_per_s": 5}}
    await server.http.patch("/v1/admin/tenants/acme", json=change, headers=OPERATOR)
    assert [(await complete(server, headers)).status_code for _ in range(6)] == [200] * 5 + [429]


@pytest.mark.parametrize("end", ["finish", "cut", "fail"])
async def test_concurrent_requests_give_their_place_back(
    server: Any, until: Callable[..., Any], end: str
) -> None:
    await tenant(server)
    headers = await key(server, max_concurrent=1)
    server.engine.hold = asyncio.Event()
    if end == "fail":
        server.engine.fail_after = 2
    running = asyncio.create_task(complete(server, headers, max_tokens=5))
    await until(lambda: len(server.engine.running) == 1)
    check_refused(await complete(server, headers), "1", "1 requests running")
    if end == "cut":
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    else:
        server.engine.hold.set()
        assert (await running).status_code == (503 if end == "fail" else 200)
    server.engine.hold, server.engine.fail_after = None, None
    assert (await complete(server, headers)).status_code == 200
    assert server.runtime.admission.running == {}


async def test_quota_of_adapters_and_bytes(server: Any, upload_parts: Any, tmp_path: Any) -> None:
    await tenant(server, max_adapters=2)
    headers = await key(server)

    async def upload(name: str, alpha: int) -> Any:
        return await server.http.post(
            "/v1/adapters", data={"name": name}, files=upload_parts(alpha=alpha), headers=headers
        )

    first = await upload("a", 1)
    assert [first.status_code, (await upload("b", 2)).status_code] == [201, 201]
    assert (await upload("a", 3)).status_code == 201  # a version is no new adapter
    refused = await upload("c", 4)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert refused.headers["retry-after"] == "60"
    assert "has 2 adapters; its limit is max_adapters 2" in refused.json()["error"]["message"]
    assert len(list(server.runtime.store.digests())) == 3  # nothing is left of what was refused
    await server.http.delete("/v1/adapters/b", headers=headers)
    assert (await upload("c", 4)).status_code == 201
    size = first.json()["size_bytes"]
    change = {"limits": {"max_bytes": 4 * size - 1}}
    await server.http.patch("/v1/admin/tenants/acme", json=change, headers=OPERATOR)
    refused = await upload("d", 5)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    change = {"limits": {"max_bytes": 4 * size}}
    await server.http.patch("/v1/admin/tenants/acme", json=change, headers=OPERATOR)
    assert (await upload("d", 5)).status_code == 201
    assert (await upload("e", 6)).status_code == 429
    assert len(list(server.runtime.store.digests())) == 4


async def test_a_tenant_cannot_jump_the_queue_or_feel_anothers_prompts(server: Any) -> None:
    await tenant(server)
    headers = await key(server)
    await complete(server, headers, priority=-5, cache_salt="s")
    await complete(server, OPERATOR, priority=-5)
    mine, operators = server.engine.seen
    assert (mine.priority, mine.cache_salt) == (0, "acme/s")
    assert (operators.priority, operators.cache_salt) == (-5, "")


@given(
    rate=st.floats(0.5, 50),
    arrivals=st.lists(st.floats(0, 0.5), min_size=1, max_size=80),
)
def test_no_window_lets_through_more_than_its_rate(rate: float, arrivals: list[float]) -> None:
    clock = Clock()
    admission = Admission(clock)
    caller = Caller("key:a", "acme", "acme", "a", key_limits={"requests_per_s": rate})
    admitted = []
    for gap in arrivals:
        clock.now += gap
        try:
            admission.admit(caller).end()
        except ApiError:
            continue
        admitted.append(clock.now)
    for i, begin in enumerate(admitted):
        for j in range(i, len(admitted)):
            assert j - i + 1 <= max(1.0, rate) + rate * (admitted[j] - begin) + 1e-6


def test_a_refusal_by_one_limit_takes_nothing_of_another() -> None:
    clock = Clock()
    admission = Admission(clock)
    caller = Caller(
        "key:a",
        "acme",
        "acme",
        "a",
        key_limits={"max_concurrent": 1},
        tenant_limits={"requests_per_s": 3},
    )
    lease = admission.admit(caller)
    for _ in range(5):
        with pytest.raises(ApiError):
            admission.admit(caller)
    lease.end()
    lease.end()  # once is enough, twice does no harm
    admission.admit(caller).end()
    admission.admit(caller).end()
    with pytest.raises(ApiError):
        admission.admit(caller)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/v1/embeddings": {"input": "x"},
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 3}},
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 3}},
    "/": {"inputs": "x", "parameters": {"max_new_tokens": 3}},
}


@pytest.mark.parametrize("path", BODIES)
async def test_every_dialect_takes_tokens_and_is_counted(server: Any, path: str) -> None:
    await tenant(server, tokens_per_min=1000)
    headers = await key(server)
    answer = await server.http.post(path, json=BODIES[path], headers=headers)
    assert answer.status_code == 200, answer.text
    (row,) = (await server.http.get("/v1/usage", headers=headers)).json()["data"]
    assert row["requests"] == 1
    used = row["prompt_tokens"] + row["generated_tokens"]
    assert used >= 1 + 3 * ("embeddings" not in path)
    meter = server.runtime.admission._meters["tenant", "acme"]
    assert meter.tokens is not None
    assert meter.tokens.level == 1000 - used
    assert server.runtime.admission.running == {}
    # In debt, every dialect is refused before the engine hears of it.
    meter.tokens.level = -1
    seen = len(server.engine.seen)
    refused = await server.http.post(path, json=BODIES[path], headers=headers)
    assert refused.status_code == 429
    assert len(server.engine.seen) == seen

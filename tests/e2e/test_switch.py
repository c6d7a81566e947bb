"""A canary on a real server: an alias is switched under 200 streams, split, rolled back, restarted,
and every token is the one of the version that the answer names.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.platform.split import choose

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VERSIONS = (
    "reverse",
    "rot13",
    "spell",
)  # the demo adapters that become versions 1, 2, 3 of `skill`
STREAMS = 200
TOKENS = 40
PROD = "/v1/adapters/skill/aliases/prod"
KEYS = [f"user-{i}" for i in range(120)]

Tokens = list[int]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, assets: Path, server_class: Any, upload_adapter: Any
) -> Iterator[Any]:
    """In float32: greedy tokens then do not depend on what shares a batch."""
    data = tmp_path_factory.mktemp("switch") / "data"
    with server_class(assets / "model", data, "--dtype", "float32") as running:
        for version, name in enumerate(VERSIONS, start=1):
            made = upload_adapter(running.url, "skill", assets / "adapters" / name)
            assert made["version"] == version
        yield running


@asynccontextmanager
async def connected(server: Any) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=STREAMS + 20)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        yield http


async def put(http: httpx.AsyncClient, weights: dict[int, int]) -> None:
    split = [{"version": version, "weight": weight} for version, weight in weights.items()]
    answer = await http.put(PROD, json={"split": split})
    assert answer.status_code == 200, answer.text


def body(reference: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "model": reference,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **more,
    }


async def stream(http: httpx.AsyncClient, reference: str, prompt: str) -> tuple[str, Tokens]:
    """The digest that a stream names, in its head and its last chunk, and its tokens."""
    tokens: Tokens = []
    last: dict[str, Any] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body(reference, prompt)) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
                tokens += last["choices"][0].get("token_ids") or []
    assert last["adapter"]["digest"] == answer.headers["x-adapter-digest"]
    assert answer.headers["x-adapter-version"] == f"skill@{last['adapter']['version']}"
    return last["adapter"]["digest"], tokens


async def version_of(http: httpx.AsyncClient, key: str) -> int:
    order = {"model": "skill:prod", "prompt": "a", "max_tokens": 1, "user": key}
    answer = await http.post("/v1/completions", json=order)
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["adapter"]["version"]
    return version


async def assignments(http: httpx.AsyncClient) -> dict[str, int]:
    few = asyncio.Semaphore(16)

    async def one(key: str) -> int:
        async with few:
            return await version_of(http, key)

    versions = await asyncio.gather(*(one(key) for key in KEYS))
    return dict(zip(KEYS, versions, strict=True))


async def test_streams_end_on_the_version_they_began_with(
    server: Any, skills: dict[str, Any]
) -> None:
    prompts = [pair["input"] for pair in skills["reverse"]["heldout"][:20]]
    async with connected(server) as http:
        detail = (await http.get("/v1/adapters/skill")).json()
        digests = [version["digest"] for version in detail["versions"]]
        cases = list(itertools.product(digests, prompts))
        alone = await asyncio.gather(*(stream(http, digest, prompt) for digest, prompt in cases))
        reference = {case: tokens for case, (_, tokens) in zip(cases, alone, strict=True)}
        for prompt in prompts:
            told = {tuple(reference[digest, prompt]) for digest in digests}
            assert len(told) == len(digests), "versions that say the same would prove nothing"

        await put(http, {1: 1})
        finished = asyncio.Event()

        async def switch() -> int:
            """Every kind of change, one after the other, until all streams are through."""
            meanings = itertools.cycle([{2: 1}, {1: 1, 3: 1}, {3: 1}, {1: 1, 2: 1, 3: 1}, {1: 1}])
            count = 0
            while not finished.is_set():
                await put(http, next(meanings))
                if count % 7 == 3:
                    assert (await http.post(f"{PROD}/rollback")).status_code == 200
                count += 1
            return count

        async def one(number: int) -> tuple[str, str, Tokens]:
            await asyncio.sleep(number * 0.01)  # they begin over two seconds, between the switches
            prompt = prompts[number % len(prompts)]
            return (prompt, *await stream(http, "skill:prod", prompt))

        switching = asyncio.create_task(switch())
        streams = await asyncio.gather(*(one(number) for number in range(STREAMS)))
        finished.set()
        assert await switching >= 10, "hardly a switch: this proved nothing"
    for prompt, digest, tokens in streams:
        assert tokens == reference[digest, prompt], f"not the tokens of {digest} for {prompt!r}"
    served = Counter(digest for _, digest, _ in streams)
    assert set(served) == set(digests), served


async def test_a_canary_is_sticky_and_has_its_share(server: Any) -> None:
    async with connected(server) as http:
        await put(http, {1: 90, 2: 10})
        first = await assignments(http)
        assert first == {key: choose("skill:prod", {1: 90, 2: 10}, key) for key in KEYS}
        assert await assignments(http) == first
        share = Counter(first.values())[2]
        assert abs(share - 12) <= 4 * (120 * 0.1 * 0.9) ** 0.5
        await put(http, {1: 50, 2: 50})
        more = await assignments(http)
        assert all(more[key] == 2 for key in KEYS if first[key] == 2), "who has it keeps it"
        assert abs(Counter(more.values())[2] - 60) <= 4 * (120 / 4) ** 0.5
        assert (await http.post(f"{PROD}/rollback")).status_code == 200
        assert await assignments(http) == first
        metrics = (await http.get("/metrics")).text
        for version in (1, 2):
            labels = f'adapter="skill",model_name="model",version="{version}"'
            assert f"loraplex:adapter_requests_total{{{labels}}}" in metrics


async def test_a_restart_forgets_nothing(server: Any) -> None:
    async with connected(server) as http:
        await put(http, {1: 60, 2: 30, 3: 10})
        before = await assignments(http)
        history = (await http.get(f"{PROD}/history")).json()
        alias = (await http.get(PROD)).json()
    server.kill()
    server.start()
    async with connected(server) as http:
        assert (await http.get(PROD)).json() == alias
        assert (await http.get(f"{PROD}/history")).json() == history
        assert await assignments(http) == before
        back = (await http.post(f"{PROD}/rollback")).json()
        assert back["split"] == [{"version": 1, "weight": 90}, {"version": 2, "weight": 10}]

"""The demo adapters do their skill through the server, the base does not: in one mixed burst,
exact match.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.e2e

HELD_OUT_PER_SKILL = 40


async def ask(
    http: httpx.AsyncClient, adapter: str | None, text: str
) -> tuple[str, dict[str, Any] | None]:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 48,
        "adapter_id": adapter,
    }
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["message"]["content"], found.get("adapter")


async def test_exact_match_with_and_without_the_adapter(
    demo_server: Any, uploaded: list[str], skills: dict[str, Any]
) -> None:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=demo_server.url, timeout=120, limits=limits) as http:
        cases = [
            (name, pair["input"], pair["expected"])
            for name in uploaded
            for pair in skills[name]["heldout"][:HELD_OUT_PER_SKILL]
        ]
        cases.sort(key=lambda case: case[1])  # adapters interleave, so every step mixes them
        adapted = await asyncio.gather(*(ask(http, name, text) for name, text, _ in cases))
        base = await asyncio.gather(*(ask(http, None, text) for _, text, _ in cases))
    for name in uploaded:
        mine = [i for i, case in enumerate(cases) if case[0] == name]
        assert len(mine) == HELD_OUT_PER_SKILL
        right = sum(adapted[i][0] == cases[i][2] for i in mine) / len(mine)
        right_base = sum(base[i][0] == cases[i][2] for i in mine) / len(mine)
        assert right >= 0.95, f"{name}: {right:.0%} right with its adapter"
        assert right_base <= 0.05, f"{name}: {right_base:.0%} right without it"
        proofs = {adapted[i][1]["digest"] for i in mine if adapted[i][1]}
        assert len(proofs) == 1, f"{name}: every answer names the one digest that made it"
    assert all(proof is None for _, proof in base)


async def test_a_swapped_adapter_does_not_pass(
    demo_server: Any, uploaded: list[str], skills: dict[str, Any]
) -> None:
    """The companion: were requests served with another adapter's weights, the test above would
    fail.
    """
    wrong = dict(zip(uploaded, uploaded[1:] + uploaded[:1], strict=True))
    async with httpx.AsyncClient(base_url=demo_server.url, timeout=120) as http:
        for name in uploaded:
            pairs = skills[name]["heldout"][:10]
            answers = await asyncio.gather(
                *(ask(http, wrong[name], pair["input"]) for pair in pairs)
            )
            right = sum(
                text == pair["expected"] for (text, _), pair in zip(answers, pairs, strict=True)
            )
            assert right <= 1, f"{wrong[name]} does {name}'s work"


async def test_evicted_adapters_come_back_by_themselves(
    demo_server: Any, uploaded: list[str], skills: dict[str, Any]
) -> None:
    name = uploaded[0]
    pair = skills[name]["tour"][0]
    async with httpx.AsyncClient(base_url=demo_server.url, timeout=60) as http:
        assert (await ask(http, name, pair["input"]))[0] == pair["expected"]
        for tier in ("device", "host"):
            evicted = await http.post(f"/v1/admin/adapters/{name}/evict", json={"tier": tier})
            assert evicted.status_code == 200, evicted.text
        slots = (await http.get("/v1/admin/slots")).json()
        assert name not in {slot["id"] for slot in slots["data"]}
        assert (await ask(http, name, pair["input"]))[0] == pair["expected"]
        slots = (await http.get("/v1/admin/slots")).json()
        assert name in {slot["id"] for slot in slots["data"]}

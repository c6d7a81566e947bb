"""`/v1/admin`: what the operator sees and can do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from loraplex.engine.api import AdapterEvent, AdapterState


async def test_slots_show_what_is_on_the_device(server: Any, fake_engine_module: Any) -> None:
    page = fake_engine_module.DEVICE_BYTES
    made = await server.upload("sql")
    await server.upload("idle", alpha=16)
    assert (await server.http.get("/v1/admin/slots")).json()["data"] == []
    loaded = await server.http.post("/v1/admin/adapters/sql/load")
    assert (loaded.status_code, loaded.json()["state"]) == (200, "device")
    slots = (await server.http.get("/v1/admin/slots")).json()
    assert [(s["id"], s["version"], s["digest"]) for s in slots["data"]] == [
        ("sql", 1, made["digest"])
    ]
    assert slots["totals"] == {
        "adapters": 1,
        "pages_total": 10,
        "pages_used": 1,
        "pages_free": 9,
        "bytes_total": 10 * page,
        "bytes_used": page,
        "bytes_free": 9 * page,
    }
    assert (await server.http.get("/v1/adapters/sql")).json()["residency"] == "device"


async def test_loading_without_waiting_is_accepted(server: Any) -> None:
    await server.upload("sql")
    answer = await server.http.post("/v1/admin/adapters/sql/load", json={"wait": False})
    assert (answer.status_code, answer.json()["state"]) == (202, "host_loading")
    assert (await server.http.get("/v1/adapters/sql")).json()["residency"] == "loading"


async def test_evicting_tier_by_tier(server: Any, fake_engine_module: Any) -> None:
    fakes = fake_engine_module
    made = await server.upload("sql")
    await server.http.post("/v1/admin/adapters/sql/load")
    device = (await server.http.post("/v1/admin/adapters/sql/evict")).json()
    assert device["evicted"] is True
    assert (device["id"], device["version"], device["digest"]) == ("sql", 1, made["digest"])
    assert device["freed"]["device_bytes"] == fakes.DEVICE_BYTES
    assert (await server.http.get("/v1/adapters/sql")).json()["residency"] == "host"
    host = await server.http.post("/v1/admin/adapters/sql/evict", json={"tier": "host"})
    assert host.json()["freed"]["host_bytes"] == fakes.HOST_BYTES
    assert (await server.http.get("/v1/adapters/sql")).json()["residency"] == "disk"
    wrong = await server.http.post("/v1/admin/adapters/sql/evict", json={"tier": "disk"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tier")


async def test_what_runs_is_not_evicted_unless_drained(
    server: Any, until: Callable[..., Any]
) -> None:
    await server.upload("sql")
    server.engine.hold = asyncio.Event()
    ask = {"adapter_id": "sql", "prompt": "x", "max_tokens": 2}
    running = asyncio.create_task(server.http.post("/v1/completions", json=ask))
    await until(lambda: len(server.engine.running) == 1)
    refused = await server.http.post("/v1/admin/adapters/sql/evict")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
    requests = (await server.http.get("/v1/admin/requests")).json()
    assert [(r["state"], r["adapters"]) for r in requests["data"]] == [("running", ["sql@1"])]
    assert (await server.http.get("/v1/admin/slots")).json()["data"][0]["running"] == 1
    drained = await server.http.post("/v1/admin/adapters/sql/evict", json={"drain": True})
    assert drained.status_code == 200
    server.engine.hold.set()
    await running


async def test_pins(server: Any) -> None:
    await server.upload("sql")
    assert (await server.http.post("/v1/admin/adapters/sql/pin")).json()["pinned"] is True
    listed = (await server.http.get("/v1/admin/adapters")).json()["data"]
    assert [(a["id"], a["pinned"], a["tier"]) for a in listed] == [("sql", True, "device")]
    assert (await server.http.post("/v1/admin/adapters/sql/unpin")).json()["pinned"] is False


async def test_every_version_with_its_tier_and_bytes(server: Any) -> None:
    await server.upload("sql", alpha=8)
    await server.upload("sql", alpha=16)
    await server.http.post("/v1/admin/adapters/sql@1/load")
    listed = (await server.http.get("/v1/admin/adapters")).json()["data"]
    assert [(a["id"], a["version"], a["tier"]) for a in listed] == [
        ("sql", 1, "device"),
        ("sql", 2, "disk"),
    ]
    assert all(a["bytes"]["disk"] > 2048 for a in listed)
    assert [a["bytes"]["device"] > 0 for a in listed] == [True, False]


async def test_memory_says_how_many_more_adapters_fit(server: Any) -> None:
    memory = (await server.http.get("/v1/admin/memory")).json()
    assert memory["weights_bytes"] == 1000
    assert memory["kv_blocks_used"] == 0
    room = {entry["rank"]: entry["adapters"] for entry in memory["adapters_that_fit"]}
    assert room == {8: 10, 16: 10, 32: 5, 64: 2, 128: 1}
    await server.upload("sql")
    await server.http.post("/v1/admin/adapters/sql/load")
    memory = (await server.http.get("/v1/admin/memory")).json()
    of_rank_32 = next(entry for entry in memory["adapters_that_fit"] if entry["rank"] == 32)
    assert of_rank_32 == {"rank": 32, "adapters": 4, "in_all": 5}
    parts = {part["purpose"]: part for part in memory["explanation"]}
    assert list(parts) == [
        *("weights", "kv cache", "adapters on the device", "adapters on the host"),
        *("workspace", "left to others"),
    ]
    assert parts["adapters on the device"]["used"] == memory["adapter_bytes_used"] > 0
    assert parts["kv cache"]["text"].startswith("256 tokens in 16 blocks of 16")
    assert memory["tokens_that_fit"] == {"tokens": 256, "in_all": 256}
    assert (memory["shared"], memory["not_shared_because"]) == (None, "fixed by --adapter-memory")


async def test_shared_memory_is_explained(server: Any) -> None:
    server.engine.memory_changes = {
        "static_because": "",
        "superblock_bytes": 256,
        "shared_bytes": 4096,
        "kv_blocks_min": 4,
        "kv_blocks_max": 60,
        "kv_blocks_obtainable": 8,
        "adapter_bytes_max": 3 * await _adapter_bytes(server),
        "adapter_bytes_obtainable": await _adapter_bytes(server),
        "superblocks_to_kv": 5,
        "superblocks_to_adapters": 7,
    }
    memory = (await server.http.get("/v1/admin/memory")).json()
    total = await _adapter_bytes(server)
    assert memory["shared"] == {
        "bytes": 4096,
        "superblock_bytes": 256,
        "kv_cache_bytes_min": 4 * 64,
        "kv_cache_bytes_max": 60 * 64,
        "adapter_bytes_min": 4096 - 60 * 64,
        "adapter_bytes_max": 3 * total,
        "to_kv_cache": 5,
        "to_adapters": 7,
        "lost": 0,
    }
    assert memory["not_shared_because"] == ""
    assert memory["tokens_that_fit"] == {"tokens": (16 + 8) * 16, "in_all": 60 * 16}
    of_rank_16 = next(entry for entry in memory["adapters_that_fit"] if entry["rank"] == 16)
    assert of_rank_16 == {"rank": 16, "adapters": 20, "in_all": 30}
    parts = {part["purpose"]: part["text"] for part in memory["explanation"]}
    assert "never fewer than 64, up to 960 tokens" in parts["kv cache"]
    assert "up to 30 pages" in parts["adapters on the device"]


async def _adapter_bytes(server: Any) -> int:
    return int((await server.engine.memory()).adapter_bytes_total)


async def test_what_came_and_went_is_told_newest_first(server: Any) -> None:
    made = await server.upload("sql")
    digest = made["digest"].removeprefix("sha256:")
    for number, (before, after) in enumerate(
        (("absent", "host_loading"), ("host_loading", "host"), ("device_loading", "device"))
    ):
        phases = {"read": 2.0, "copy": 0.5} if after == "device" else {}
        states = AdapterState(before), AdapterState(after)
        server.engine.tell(AdapterEvent(digest, *states, 0.5, 100.0 + number, phases=phases))
    gone = AdapterState.DEVICE, AdapterState.HOST
    server.engine.tell(AdapterEvent("0" * 64, *gone, 9.0, 200.0, "deleted", "deleted"))
    listed = (await server.http.get("/v1/admin/transitions?limit=2")).json()["data"]
    assert [(t["id"], t["after"], t["reason"]) for t in listed] == [
        (None, "host", "deleted"),
        ("sql", "device", ""),
    ]
    assert listed[1]["phases"] == {"read": 2.0, "copy": 0.5}
    assert (listed[1]["version"], listed[1]["digest"]) == (1, made["digest"])
    mine = (await server.http.get("/v1/admin/transitions?adapter=sql@1")).json()["data"]
    assert [t["after"] for t in mine] == ["device", "host", "host_loading"]
    missing = await server.http.get("/v1/admin/transitions?adapter=nobody")
    assert missing.status_code == 404

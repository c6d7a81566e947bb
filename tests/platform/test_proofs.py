"""Probes in the background and by order: what they find, keep, show and take out of service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select

from loraplex.engine.errors import EngineDead, EngineError
from loraplex.platform import proofs
from loraplex.platform.models import Proof, utc_now

OFF = {"agrees": False, "error": 0.2, "effect": 0.21}
Until = Callable[[Callable[[], bool]], Awaitable[None]]
UNUSABLE = (409, "adapter_proof_failed")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(proofs, "FIRST_DELAY_S", 0.05)


async def shown(server: Any, name: str) -> Any:
    return (await server.http.get(f"/v1/adapters/{name}")).json()


async def proven(server: Any, name: str, status: str | None = None) -> Any:
    """The adapter object once it was probed and, if one is named, has this status."""
    async with asyncio.timeout(10):
        while True:
            found = await shown(server, name)
            if found["proof"] is not None and status in (None, found["status"]):
                return found
            await asyncio.sleep(0.005)


async def used(server: Any, reference: str) -> tuple[int, str | None]:
    body = {"prompt": "x", "adapter_id": reference, "max_tokens": 1}
    answer = await server.http.post("/v1/completions", json=body)
    return answer.status_code, answer.json().get("error", {}).get("code")


async def verified(server: Any, reference: str, **order: bool) -> Any:
    answer = await server.http.post(f"/v1/adapters/{reference}/verify", json=order)
    assert answer.status_code == 200, answer.text
    return answer.json()


def digest(adapter: Any) -> str:
    return str(adapter["digest"]).removeprefix("sha256:")


async def events(server: Any, action: str) -> list[tuple[str, str]]:
    found = (await server.http.get("/v1/admin/events?limit=1000")).json()["data"]
    return [(e["actor"], e["subject"]) for e in found if e["action"] == action]


async def test_an_upload_is_answered_before_its_probe_and_shows_it_afterwards(server: Any) -> None:
    server.engine.probe_hold = asyncio.Event()
    made = await server.upload("sql")
    assert (made["proof"], made["status"]) == (None, "ready")
    assert await used(server, "sql") == (200, None)
    server.engine.probe_hold.set()
    found = await proven(server, "sql")
    proof = found["proof"]
    assert (proof["agrees"], proof["flags"], proof["accepted"]) == (True, [], False)
    assert (proof["error"], proof["tolerance"], proof["effect"]) == (1e-7, 2e-6, 0.25)
    assert (proof["device"], proof["dtype"], proof["backend"]) == ("cpu", "float32", "torch")
    assert proof["probed_at"] >= made["created_at"]
    assert found["versions"][0]["proof"] == proof
    assert server.engine.probed == [digest(made)]
    listed = (await server.http.get("/v1/adapters")).json()["data"]
    assert listed[0]["proof"] == proof


async def test_the_same_content_is_probed_once_whatever_its_names(server: Any) -> None:
    first = await server.upload("sql")
    await proven(server, "sql")
    assert (await server.upload("copy"))["proof"]["agrees"]
    assert (await server.upload("sql"))["proof"]["agrees"]
    second = await server.upload("sql", alpha=16)
    assert second["proof"] is None
    await proven(server, "sql")
    assert server.engine.probed == [digest(first), digest(second)]


async def test_one_that_disagrees_is_taken_out_of_service_loudly(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await server.upload("sql", alias="prod")
    await proven(server, "sql")
    server.engine.probe_result = OFF
    await server.upload("sql", alpha=16)
    bad = await proven(server, "sql")
    assert (bad["version"], bad["status"], bad["proof"]["flags"]) == (2, "failed", ["disagrees"])
    for named in ("0.2", "2e-06", "0.21", "torch", "float32", "--accept"):
        assert named in bad["error"]
    assert [v["status"] for v in bad["versions"]] == ["ready", "failed"]
    for reference in ("sql", "sql@2", bad["digest"]):
        assert await used(server, reference) == UNUSABLE
    assert await used(server, "sql:prod") == (200, None)
    moved = await server.http.put("/v1/adapters/sql/aliases/prod", json={"version": 2})
    assert (moved.status_code, moved.json()["error"]["code"]) == UNUSABLE
    loaded = await server.http.post("/v1/admin/adapters/sql@2/load")
    assert (loaded.status_code, loaded.json()["error"]["code"]) == UNUSABLE
    assert await events(server, "adapter.proof.disproved") == [("probe", "sql@2")]
    record = next(r for r in caplog.records if r.message == "adapter_disproved")
    assert (record.levelno, record.__dict__["adapter"]) == (logging.ERROR, "sql@2")
    tiers = (await server.http.get("/v1/admin/adapters")).json()["data"]
    assert [row["status"] for row in tiers] == ["ready", "failed"]
    # The same content under another name is no way round it.
    await server.upload("other", alpha=16)
    assert await used(server, "other") == UNUSABLE
    models = {m["id"] for m in (await server.http.get("/v1/models")).json()["data"]}
    assert models == {"tiny", "sql", "sql:prod"}


async def test_numbers_that_are_none_disagree_and_cannot_be_accepted(server: Any) -> None:
    server.engine.probe_result = {"agrees": False, "error": float("nan"), "effect": float("inf")}
    await server.upload("sql")
    proof = (await proven(server, "sql"))["proof"]
    assert (proof["error"], proof["effect"], proof["flags"]) == (None, None, ["disagrees"])
    assert not (await verified(server, "sql", accept=True))["ok"]
    assert await used(server, "sql") == UNUSABLE
    async with server.runtime.db.read() as session:
        row = await session.scalar(select(Proof))
        assert (row.error, row.effect) == (None, None)  # in every database


async def test_an_operator_can_accept_it_up_to_the_error_seen(server: Any) -> None:
    server.engine.probe_result = OFF
    await server.upload("sql")
    await proven(server, "sql")
    assert not (await verified(server, "sql"))["ok"]
    assert await used(server, "sql") == UNUSABLE
    accepted = await verified(server, "sql", accept=True)
    assert accepted["ok"]
    assert (accepted["proof"]["agrees"], accepted["proof"]["accepted"]) == (False, True)
    assert await used(server, "sql") == (200, None)
    assert await events(server, "adapter.proof.accepted") == [("anonymous", "sql@1")]
    assert (await verified(server, "sql"))["ok"]
    server.engine.probe_result = OFF | {"error": 0.3}
    assert not (await verified(server, "sql"))["ok"]
    assert await used(server, "sql") == UNUSABLE
    server.engine.probe_result = {}
    assert (await verified(server, "sql"))["ok"]
    server.engine.probe_result = OFF  # what agreed since is not accepted any more
    assert not (await verified(server, "sql"))["ok"]


@pytest.mark.parametrize(
    ("effect", "flags"), [(0.0, ["no_effect"]), (4e-7, ["no_effect"]), (1e-6, [])]
)
async def test_one_without_effect_is_flagged_and_served(
    server: Any, effect: float, flags: list[str]
) -> None:
    server.engine.probe_result = {"effect": effect}
    await server.upload("sql")
    found = await proven(server, "sql")
    assert (found["proof"]["flags"], found["status"]) == (flags, "ready")
    assert await used(server, "sql") == (200, None)
    assert (await verified(server, "sql"))["ok"]


async def test_an_engine_that_restarts_in_the_middle_is_asked_again(
    server: Any, until: Until
) -> None:
    server.engine.probe_hold = asyncio.Event()
    made = await server.upload("sql")
    await until(lambda: server.engine.probed == [digest(made)])
    server.engine.alive = False
    server.engine.probe_hold.set()
    await asyncio.sleep(0.1)
    assert server.engine.probed == [digest(made)]  # nobody asks an engine that is away
    server.engine.alive = True
    assert (await proven(server, "sql"))["proof"]["agrees"]


async def test_a_probe_that_kills_the_engine_is_not_tried_at_once_again(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "FIRST_DELAY_S", 3600.0)
    server.engine.probe_error = EngineDead("the engine process died")
    await server.upload("sql")
    await server.upload("other", alpha=16)
    await proven(server, "other")
    assert (await shown(server, "sql"))["proof"] is None
    await asyncio.sleep(0.1)
    assert len(server.engine.probed) == 2
    assert (await verified(server, "sql"))["ok"]


async def test_a_probe_that_fails_leaves_the_adapter_unproven(server: Any) -> None:
    server.engine.probe_error = EngineError("out of memory", code="probe_failed")
    await server.upload("sql")
    assert (await proven(server, "sql"))["proof"]["agrees"]  # the second time
    server.engine.probe_error = EngineError("out of memory", code="probe_failed")
    answer = await server.http.post("/v1/adapters/sql/verify")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "probe_failed")
    assert (await shown(server, "sql"))["proof"]["agrees"]


async def test_one_deleted_in_the_middle_leaves_nothing(server: Any, until: Until) -> None:
    server.engine.probe_hold = asyncio.Event()
    made = await server.upload("sql")
    await until(lambda: bool(server.engine.probed))
    ordered = asyncio.create_task(server.http.post("/v1/adapters/sql/verify"))
    await asyncio.sleep(0.05)
    assert (await server.http.delete("/v1/adapters/sql")).status_code == 200
    server.engine.probe_hold.set()
    answer = await ordered
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    assert sum((await server.runtime.proofs.counts()).values()) == 0
    assert (await server.upload("sql"))["proof"] is None  # nothing is known of it any more
    assert made["digest"] == (await proven(server, "sql"))["digest"]
    assert (await server.http.delete("/v1/adapters/sql")).status_code == 200
    server.engine.probe_hold = asyncio.Event()
    assert (await server.upload("sql"))["proof"] is None


async def test_none_is_loaded_where_another_had_to_leave(server: Any) -> None:
    from loraplex.engine.api import AdapterState

    for i in range(10):  # all the room there is
        server.engine.residents[f"{i:064}"] = AdapterState.DEVICE
    made = await server.upload("sql")
    await asyncio.sleep(0.1)
    assert server.engine.probed == []
    server.engine.residents[digest(made)] = AdapterState.DEVICE  # a request brought it
    assert (await proven(server, "sql"))["proof"]["agrees"]


async def test_versions_of_before_and_of_another_engine_are_probed_at_start(
    start: Any, fake_engine_module: Any
) -> None:
    async with start() as server:
        await server.upload("sql")
        await proven(server, "sql")
    async with start() as server:
        await asyncio.sleep(0.1)
        assert server.engine.probed == []
    info = fake_engine_module.model_info(dtype="bfloat16")
    engine = fake_engine_module.FakeEngine(info)
    engine.probe_result = OFF
    async with start(engine) as server:
        assert (await proven(server, "sql", "failed"))["proof"]["dtype"] == "bfloat16"
    async with start(fake_engine_module.FakeEngine(info)) as server:  # a restart heals nothing
        assert await used(server, "sql") == UNUSABLE
        assert server.engine.probed == []


async def test_verify_finds_a_flipped_byte_and_an_upload_mends_it(server: Any) -> None:
    made = await server.upload("sql")
    await proven(server, "sql")
    assert (await verified(server, "sql"))["damage"] is None
    weights = server.runtime.store.path(digest(made)) / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(raw)
    found = await verified(server, "sql@1")
    assert not found["ok"]
    assert "adapter_model.safetensors" in found["damage"]
    assert await used(server, "sql") == (409, "adapter_not_ready")
    failed = await shown(server, "sql")
    assert failed["status"] == "failed"
    assert "has changed since it was stored; upload it again" in failed["error"]
    assert await events(server, "adapter.proof.damaged") == [("anonymous", "sql@1")]
    assert (await server.upload("sql"))["version"] == 1
    assert await used(server, "sql") == (200, None)
    assert (await proven(server, "sql"))["status"] == "ready"
    assert len(server.engine.probed) == 3  # what was loaded of the damaged file is checked, too


async def test_verify_refuses_what_is_not_there(server: Any, start: Any) -> None:
    for reference, status in (("nobody", 404), ("sql@7", 404)):
        answer = await server.http.post(f"/v1/adapters/{reference}/verify")
        assert answer.status_code == status
    await server.upload("sql")
    answer = await server.http.post("/v1/adapters/sql/verify", json={"force": True})
    assert answer.status_code == 400
    server.engine.alive = False
    answer = await server.http.post("/v1/adapters/sql/verify")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_while_requests_run_probes_keep_their_distance(
    server: Any, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(proofs, "BUSY_REST", 1e9)
    server.engine.hold = asyncio.Event()
    running = asyncio.create_task(server.http.post("/v1/completions", json={"prompt": "x"}))
    await until(lambda: bool(server.engine.running))
    await server.upload("a")
    await server.upload("b", alpha=16)
    await until(lambda: len(server.engine.probed) == 1)
    await asyncio.sleep(0.1)
    assert len(server.engine.probed) == 1
    server.engine.hold.set()
    await running
    await until(lambda: len(server.engine.probed) == 2)


PROBED = {"probed_at": utc_now()}


@pytest.mark.parametrize(
    ("columns", "refused"),
    [
        ({}, False),
        ({"agrees": False}, False),  # of before a repair
        ({**PROBED, "agrees": True, "error": 0.1}, False),
        ({**PROBED, "agrees": False, "error": 0.1}, True),
        ({**PROBED, "agrees": False, "error": None}, True),
        ({**PROBED, "agrees": False, "error": None, "accepted_error": 0.1}, True),
        ({**PROBED, "agrees": False, "error": 0.1, "accepted_error": 0.1}, False),
        ({**PROBED, "agrees": False, "error": 0.2, "accepted_error": 0.1}, True),
        ({**PROBED, "agrees": True, "error": 0.1, "damage": "gone"}, True),
        ({"damage": "gone"}, True),
    ],
)
async def test_the_database_and_python_refuse_the_same(
    server: Any, columns: dict[str, Any], refused: bool
) -> None:
    server.engine.probe_hold = asyncio.Event()  # no probe comes between
    made = await server.upload("sql", alias="prod")
    async with server.runtime.db.unit_of_work() as session:
        session.add(Proof(digest=digest(made), **columns))
    server.runtime.resolver.forget()
    listed = {m["id"] for m in (await server.http.get("/v1/models")).json()["data"]}
    assert listed - {"tiny"} == (set() if refused else {"sql", "sql:prod"})
    assert ((await used(server, "sql"))[0] == 409) == refused
    assert ((await shown(server, "sql"))["status"] == "failed") == refused


async def test_metrics_count_versions_by_outcome(server: Any) -> None:
    await server.upload("sql")
    await proven(server, "sql")
    server.engine.probe_result = OFF
    await server.upload("sql", alpha=16)
    await proven(server, "sql")
    text = (await server.http.get("/metrics")).text
    for outcome, count in {"agrees": 1, "disagrees": 1, "damaged": 0, "unproven": 0}.items():
        line = f'loraplex:adapter_proofs{{model_name="tiny",outcome="{outcome}"}} {count}.0'
        assert line in text

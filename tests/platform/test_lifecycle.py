"""Start, readiness, restart, crash: what was acknowledged is there afterwards, and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.api import ModuleShape
from loraplex.engine.errors import ModelError

HERE = Path(__file__).parent


async def test_health_answers_while_the_model_loads(
    start: Any, fake_engine_module: Any, upload_parts: Callable[..., Any], until: Callable[..., Any]
) -> None:
    engine = fake_engine_module.FakeEngine(loaded=False)
    async with start(engine, wait=False) as server:
        assert (await server.http.get("/healthz")).status_code == 200
        assert (await server.http.get("/version")).json()["model"] == "tiny"
        not_ready = await server.http.get("/readyz")
        assert (not_ready.status_code, not_ready.json()["status"]) == (503, "loading")
        assert (await server.http.get("/v1/adapters")).json()["data"] == []
        for answer in (
            await server.http.post("/v1/completions", json={"prompt": "x"}),
            await server.http.post("/v1/adapters", data={"name": "a"}, files=upload_parts()),
            await server.http.get("/v1/models"),
            await server.http.get("/v1/admin/slots"),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "model_loading"
            assert int(answer.headers["retry-after"]) >= 1
        engine.loaded.set()
        await until(lambda: server.runtime.ready)
        assert (await server.http.get("/readyz")).status_code == 200
    assert engine.stopped


async def test_a_model_that_cannot_be_loaded_is_reported(
    start: Any, fake_engine_module: Any, tmp_path: Path, until: Callable[..., Any]
) -> None:
    from loraplex.platform.app import create_app
    from loraplex.platform.settings import Settings

    engine = fake_engine_module.FakeEngine()
    engine.start_error = ModelError("needs 9 GiB, there are 2 GiB; lower --kv-cache-memory")
    failures: list[Exception] = []
    app = create_app(
        Settings(model="tiny", data_dir=tmp_path / "data"), engine, on_engine_failed=failures.append
    )
    async with app.router.lifespan_context(app):
        await until(lambda: bool(failures))
    assert failures == [engine.start_error]
    again = fake_engine_module.FakeEngine()
    again.start_error = engine.start_error
    async with start(again, wait=False) as server:
        await until(lambda: server.runtime.failure is not None)
        ready = await server.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "failed")
        assert "9 GiB" in ready.json()["reason"]


async def test_an_engine_that_restarts_is_503_for_a_while(server: Any) -> None:
    await server.upload("sql")
    server.engine.alive = False
    ready = await server.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "engine restarting")
    answer = await server.http.post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert (await server.http.get("/v1/adapters/sql")).json()["residency"] == "disk"
    assert (await server.http.get("/metrics")).status_code == 200
    assert (await server.http.delete("/v1/adapters/sql")).status_code == 200
    server.engine.alive = True
    answer = await server.http.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 200


async def test_everything_is_there_after_a_restart(start: Any) -> None:
    async with start() as server:
        await server.upload("sql", alpha=8, alias="prod", description="d", metadata='{"a": 1}')
        await server.upload("sql", alpha=16)
        await server.upload("json")
        for _ in range(3):
            await server.http.post("/v1/completions", json={"prompt": "xyz", "adapter_id": "sql"})
        before = (await server.http.get("/v1/adapters")).json()
        events = (await server.http.get("/v1/admin/events")).json()
    async with start() as server:
        after = (await server.http.get("/v1/adapters")).json()
        assert (await server.http.get("/v1/admin/events")).json() == events
        sql = after["data"][1]
        assert (sql["num_requests"], sql["num_prompt_tokens"], sql["num_generated_tokens"]) == (
            3,
            9,
            48,
        )
        assert isinstance(sql["last_used_at"], int)
        for page in (before, after):
            for item in page["data"]:
                for moving in (
                    "num_requests",
                    "num_prompt_tokens",
                    "num_generated_tokens",
                    "last_used_at",
                    "residency",
                    "proof",  # probes run in the background
                ):
                    del item[moving]
        assert after == before
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "x", "adapter_id": "sql:prod"}
        )
        assert answer.json()["adapter"]["version"] == 1


async def test_a_failure_between_files_and_rows_leaves_no_adapter(
    start: Any, upload_parts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as server:
        await server.upload("kept")

        async def broken(*_: Any) -> None:
            raise RuntimeError("the disk is on fire")

        with monkeypatch.context() as patch:
            patch.setattr(server.runtime.adapters, "_insert", broken)
            answer = await server.http.post(
                "/v1/adapters", data={"name": "lost"}, files=upload_parts(alpha=99)
            )
            assert answer.status_code == 500
        assert [a["id"] for a in (await server.http.get("/v1/adapters")).json()["data"]] == ["kept"]
        assert len(list(server.runtime.store.digests())) == 2, "the files wait for the sweep"
    async with start() as server:
        assert len(list(server.runtime.store.digests())) == 1
        assert (await server.upload("lost", alpha=99))["version"] == 1


CRASH = """
import asyncio, os, sys
sys.path.insert(0, {here!r})
import fake_engine, adapter_files, httpx, json
from pathlib import Path
from loraplex.platform.adapter_service import AdapterService
from loraplex.platform.app import create_app
from loraplex.platform.settings import Settings

async def main():
    app = create_app(Settings(model="tiny", data_dir=Path({data!r})), fake_engine.FakeEngine())
    async with app.router.lifespan_context(app):
        while not app.state.runtime.ready:
            await asyncio.sleep(0.001)
        modules = fake_engine.model_info().modules
        files = lambda alpha: {{
            "config": json.dumps(adapter_files.config(lora_alpha=alpha)).encode(),
            "weights": adapter_files.weights(modules),
        }}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            answer = await http.post("/v1/adapters", data={{"name": "kept"}}, files=files(8))
            assert answer.status_code == 201, answer.text
            {point}
            await http.post("/v1/adapters", data={{"name": "lost"}}, files=files(99))
            await http.delete("/v1/adapters/kept")
    os._exit(1)

async def die(*_, **__):
    os.kill(os.getpid(), 9)

def die_now(*_, **__):
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("point", "survivors"),
    [
        ("AdapterService.inspect = die_now", {"kept"}),
        ("AdapterService._insert = die", {"kept"}),
        ("AdapterService._release = die", {"kept", "lost"}),
        ("app.state.runtime.store.remove = die_now", {"lost"}),
    ],
    ids=["before the files", "before the rows", "while draining", "before the files go"],
)
async def test_a_kill_at_any_point_leaves_the_old_or_the_new_state(
    start: Any, tmp_path: Path, point: str, survivors: set[str]
) -> None:
    script = CRASH.format(here=str(HERE), data=str(tmp_path / "data"), point=point)
    crashed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        env=os.environ,
    )
    assert crashed.returncode == -9, crashed.stderr.decode()[-2000:]
    async with start() as server:
        listed = (await server.http.get("/v1/adapters")).json()["data"]
        assert {item["id"] for item in listed} == survivors
        assert {item["status"] for item in listed} == {"ready"}
        digests = {item["digest"].removeprefix("sha256:") for item in listed}
        assert set(server.runtime.store.digests()) == digests
        left = [
            path
            for folder in (".staging", ".trash")
            for path in (server.runtime.settings.adapter_dir / folder).iterdir()
        ]
        assert left == []
        for name in survivors:
            answer = await server.http.post(
                "/v1/completions", json={"prompt": "x", "adapter_id": name}
            )
            assert answer.status_code == 200


async def test_rows_whose_files_are_gone_fail_with_the_reason(start: Any) -> None:
    async with start() as server:
        digest = (await server.upload("sql"))["digest"].removeprefix("sha256:")
        server.runtime.store.remove(digest)
    async with start() as server:
        detail = (await server.http.get("/v1/adapters/sql")).json()
        assert detail["status"] == "failed"
        assert "gone" in detail["error"]
        answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "sql"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_not_ready")
        assert (await server.http.get("/v1/models")).json()["data"][1:] == []
        assert (await server.upload("sql"))["version"] == 2
        answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "sql"})
        assert answer.status_code == 200


async def test_adapters_of_another_base_model_fail_until_it_is_back(
    start: Any, fake_engine_module: Any
) -> None:
    fakes = fake_engine_module
    async with start() as server:
        await server.upload("sql")
    wider = fakes.model_info(modules=[ModuleShape("model.layers.0.self_attn.q_proj", 32, 32)])
    async with start(fakes.FakeEngine(wider)) as server:
        detail = (await server.http.get("/v1/adapters/sql")).json()
        assert detail["status"] == "failed"
        assert "does not fit" in detail["error"]
    async with start() as server:
        detail = (await server.http.get("/v1/adapters/sql")).json()
        assert (detail["status"], detail["error"]) == ("ready", None)


async def test_hanging_up_on_a_delete_does_not_open_the_files_to_others(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion goes on without its client; an upload of the same content waits for its end."""
    await server.upload("first")
    adapters = server.runtime.adapters
    removing, go_on = asyncio.Event(), asyncio.Event()
    remove_unused = adapters._remove_unused

    async def slowly(digest: str) -> int:
        removing.set()
        await go_on.wait()
        removed: int = await remove_unused(digest)
        return removed

    monkeypatch.setattr(adapters, "_remove_unused", slowly)
    delete = asyncio.create_task(server.http.delete("/v1/adapters/first"))
    await removing.wait()
    delete.cancel()
    await asyncio.sleep(0)
    assert adapters._files_lock.locked(), "the lock went with the client"
    again = asyncio.create_task(server.upload("second"))
    await asyncio.sleep(0.05)
    go_on.set()
    await again
    answer = await server.http.get("/v1/adapters/second/download")
    assert answer.status_code == 200, answer.text

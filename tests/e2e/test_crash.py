"""Kill -9 during uploads and during generation: what was acknowledged is there afterwards, and
answers.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROUNDS = 3


def variants(source: Path, target: Path, count: int) -> list[Path]:
    """Adapters of different digests: one demo adapter with its alpha changed."""
    config = json.loads((source / "adapter_config.json").read_text())
    folders = []
    for i in range(count):
        folder = target / f"v{i}"
        folder.mkdir(parents=True)
        shutil.copy(source / "adapter_model.safetensors", folder)
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "lora_alpha": config["lora_alpha"] + i})
        )
        folders.append(folder)
    return folders


def upload_until_dead(
    url: str, folders: list[Path], upload: Any, acknowledged: dict[str, str]
) -> None:
    for folder in folders:
        try:
            acknowledged[folder.name] = upload(url, folder.name, folder)["digest"]
        except (httpx.TransportError, AssertionError):
            return  # the server died under us, or said 503 on its way


def generate_until_dead(url: str, model: str) -> None:
    body = {
        "model": model,
        "prompt": "hello",
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
    }
    while True:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
                for _ in answer.iter_raw():
                    pass
        except httpx.TransportError:
            return


def test_nothing_acknowledged_is_lost(
    tmp_path: Path, assets: Path, skills: dict[str, Any], server_class: Any, upload_adapter: Any
) -> None:
    source = min(
        (assets / "adapters").iterdir(),
        key=lambda p: (p / "adapter_model.safetensors").stat().st_size,
    )
    folders = variants(source, tmp_path / "variants", ROUNDS * 40)
    server = server_class(assets / "model", tmp_path / "data")
    server.start()
    acknowledged: dict[str, str] = {
        "original": upload_adapter(server.url, "original", source)["digest"]
    }
    pair = skills[source.name]["tour"][0]
    for round_number in range(ROUNDS):
        mine = folders[round_number * 40 : (round_number + 1) * 40]
        threads = [
            threading.Thread(
                target=upload_until_dead, args=(server.url, mine[:20], upload_adapter, acknowledged)
            ),
            threading.Thread(
                target=upload_until_dead, args=(server.url, mine[20:], upload_adapter, acknowledged)
            ),
            threading.Thread(target=generate_until_dead, args=(server.url, "original")),
        ]
        for thread in threads:
            thread.start()
        before = len(acknowledged)
        deadline = time.monotonic() + 20
        while len(acknowledged) < before + 2 + 3 * round_number and time.monotonic() < deadline:
            time.sleep(0.005)
        server.kill()
        for thread in threads:
            thread.join(60)
        assert len(acknowledged) > before, (
            "the kill came before any upload: this round proved nothing"
        )

        server.start()
        with httpx.Client(base_url=server.url, timeout=60) as http:
            listed: dict[str, dict[str, Any]] = {}
            after = ""
            while True:
                page = http.get(
                    "/v1/adapters",
                    params={"limit": 100, "after": after} if after else {"limit": 100},
                ).json()
                listed |= {item["id"]: item for item in page["data"]}
                if not page["has_more"]:
                    break
                after = page["data"][-1]["id"]
            assert {
                name: listed.get(name, {}).get("digest") for name in acknowledged
            } == acknowledged
            assert all(item["status"] == "ready" for item in listed.values())
            answer = http.post(
                "/v1/chat/completions",
                json={
                    "model": "original",
                    "messages": [{"role": "user", "content": pair["input"]}],
                    "temperature": 0,
                    "max_tokens": 48,
                },
            )
            assert answer.json()["choices"][0]["message"]["content"] == pair["expected"]
            for name in list(acknowledged)[-3:]:
                one = http.post(
                    "/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1}
                )
                assert one.status_code == 200, one.text
        on_disk = {p.parent.name for p in (tmp_path / "data").rglob("adapter_model.safetensors")}
        assert on_disk == {item["digest"].removeprefix("sha256:") for item in listed.values()}, (
            "left-overs on disk"
        )
    assert server.stop() == 0


def test_the_engine_process_is_restarted(
    tmp_path: Path, assets: Path, skills: dict[str, Any], server_class: Any, upload_adapter: Any
) -> None:
    source = next(p for p in sorted((assets / "adapters").iterdir()) if p.is_dir())
    with server_class(assets / "model", tmp_path / "data") as server:
        upload_adapter(server.url, source.name, source)
        pair = skills[source.name]["tour"][0]
        body = {
            "model": source.name,
            "messages": [{"role": "user", "content": pair["input"]}],
            "temperature": 0,
            "max_tokens": 48,
        }
        first = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
        assert first.json()["choices"][0]["message"]["content"] == pair["expected"]
        engines = [
            p for p in server.family()[1:] if "loraplex.engine.process" in " ".join(p.cmdline())
        ]
        assert len(engines) == 1
        engines[0].kill()
        engines[0].wait(10)
        seen = set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
            seen.add(answer.status_code)
            if answer.status_code == 200:
                break
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(0.05)
        assert answer.json()["choices"][0]["message"]["content"] == pair["expected"]
        assert httpx.get(f"{server.url}/healthz").status_code == 200

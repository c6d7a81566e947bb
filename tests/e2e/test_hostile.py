"""Hostile adapters against a real server: whatever is uploaded, or done to files on its disk, it
answers, forgets what it refused, and changes no token of anybody else.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.platform.bench.soak.hostile import Hostile, kinds, of_kind
from loraplex.platform.bench.soak.run import memory_flags
from loraplex.platform.bench.soak.world import BASE, Content, World, plain

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PER_KIND = 6
SEED = 4
VICTIMS = (0, 6, 7)  # contents whose requests run all the while: LoRA, DoRA, embedding and head
REFUSALS = {"adapter_refused", "invalid_request", "content_too_large"}
# What requests for an adapter that was taken may meet; the probe finds what cannot be served.
DISPROVED = {"adapter_proof_failed", "adapter_corrupt"}
CAUGHT = {"adapter_proof_failed", "adapter_corrupt", "adapter_load_failed", "adapter_not_found"}


@pytest.fixture(scope="module")
def server(
    soak_world: World, tmp_path_factory: pytest.TempPathFactory, server_class: Any
) -> Iterator[Any]:
    data = tmp_path_factory.mktemp("hostile") / "data"
    with server_class(soak_world.model, data, *memory_flags(soak_world)) as running:
        yield running


@asynccontextmanager
async def connected(server: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        yield http


async def upload(http: httpx.AsyncClient, name: str, sent: Content | Hostile) -> httpx.Response:
    files = {
        "config": ("adapter_config.json", sent.config),
        "weights": ("adapter_model.safetensors", sent.weights),
    }
    if isinstance(sent, Hostile) and sent.archive is not None:
        files = {"archive": ("adapter.tar.gz", sent.archive)}
    return await http.post("/v1/adapters", data={"name": name}, files=files)


def asked(world: World, prompt: int, name: str | None, **more: Any) -> dict[str, Any]:
    target = {"adapter_id": name} if name else {}
    body = {"prompt": world.prompts[prompt], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return {**body, "return_token_ids": True, **target, **more}


@asynccontextmanager
async def bystanders(http: httpx.AsyncClient, world: World) -> AsyncIterator[Counter[str]]:
    """Requests of others all the while: their tokens are peft's, or the test fails."""
    served: Counter[str] = Counter()
    over = asyncio.Event()

    async def ask(name: str | None, answers: Any) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            prompt = turn % len(world.prompts)
            expected = answers[prompt][:4]
            answer = await http.post("/v1/completions", json=asked(world, prompt, name))
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["choices"][0]["token_ids"]
            assert tokens[: len(expected)] == expected, f"{name}: tokens changed"
            served[str(name)] += 1
            await asyncio.sleep(0.01)

    others: list[tuple[str | None, Any]] = [(None, world.answers[BASE])]
    for content in VICTIMS:
        name = f"victim-{content}"
        answer = await upload(http, name, world.contents[content])
        assert answer.status_code in (200, 201), answer.text
        others.append((name, world.answers[plain(content)]))
    async with asyncio.TaskGroup() as group:
        for name, answers in others:
            group.create_task(ask(name, answers))
        try:
            yield served
        finally:
            over.set()


def error_code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


async def try_out(http: httpx.AsyncClient, world: World, kind: str, name: str) -> None:
    """An odd adapter that was taken: its own requests end, in numbers or with a reason."""
    for more in ({}, {"temperature": 1.0, "seed": 1, "logprobs": 3}, {"n": 3, "top_p": 0.5}):
        answer = await http.post("/v1/completions", json=asked(world, 0, name, **more))
        ok = answer.status_code == 200 or error_code(answer) in DISPROVED
        assert ok, f"{kind}: {answer.status_code} {answer.text}"
        json.loads(answer.text, parse_constant=lambda word: pytest.fail(f"{kind}: {word} in JSON"))


async def test_nothing_that_is_uploaded_harms_others(server: Any, soak_world: World) -> None:
    draw = random.Random(SEED)
    taken: Counter[str] = Counter()
    async with connected(server) as http, bystanders(http, soak_world) as served:
        for kind in kinds():
            for turn in range(2 if kind == "archive bomb" else PER_KIND):
                sent = of_kind(kind, draw, draw.choice(soak_world.contents))
                answer = await upload(http, "hostile", sent)
                if answer.status_code in (200, 201):
                    taken[kind] += 1
                    await try_out(http, soak_world, kind, "hostile")
                    gone = await http.delete("/v1/adapters/hostile?force=true")
                    assert gone.status_code == 200, gone.text
                    continue
                told = f"{kind} {turn}: {answer.status_code} {answer.text[:500]}"
                assert 400 <= answer.status_code < 500, told
                assert error_code(answer) in REFUSALS, told
        assert (await http.get("/readyz")).status_code == 200
        engine = (await http.get("/version")).json()
        listed = (await http.get("/v1/adapters")).json()["data"]
    assert engine
    assert min(served.values()) >= 20, f"hardly anybody was there to be harmed: {served}"
    assert {item["id"] for item in listed} == {f"victim-{i}" for i in VICTIMS}
    assert 0 < taken.total() < len(kinds()) * PER_KIND / 3, f"most must be refused: {taken}"
    assert "Traceback" not in server.log_path.read_text(errors="replace")
    assert len(engines(server)) == 1
    assert left_over(server.data_dir, len(VICTIMS)) == []


def engines(server: Any) -> list[Any]:
    return [p for p in server.family() if "loraplex.engine.process" in " ".join(p.cmdline())]


def left_over(data: Path, adapters: int) -> list[Path]:
    """Files of nobody: staged, discarded, or of an adapter that is not registered."""
    found = [p for part in (".staging", ".trash") for p in data.rglob(f"{part}/*")]
    stored = list(data.rglob("adapter_model.safetensors"))
    return found if len(stored) == adapters else found + stored


# --- files that change on the disk ----------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x40
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


FILES = (
    ("pages-*.bin",),
    ("adapter_model.safetensors",),
    ("adapter_model.safetensors", "pages-*.bin"),
    ("manifest.json",),
)
DAMAGES = {"flipped": flip, "cut off": truncate, "emptied": empty, "removed": remove}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_files_that_change_are_found_and_harm_nobody(
    damage: str, server: Any, soak_world: World
) -> None:
    """Loaded once and evicted, so all is read again. Answers are right, or say what is wrong."""
    content = len(soak_world.contents) - 1 - list(DAMAGES).index(damage)
    async with connected(server) as http, bystanders(http, soak_world) as served:
        outcomes: Counter[str] = Counter()
        for files in FILES:
            made = await upload(http, "damaged", soak_world.contents[content])
            assert made.status_code in (200, 201), made.text
            folder = next(server.data_dir.rglob(made.json()["digest"].removeprefix("sha256:")))
            await evicted(http, folder)
            for path in [path for file in files for path in folder.glob(file)]:
                DAMAGES[damage](path)
            case = " and ".join(files)
            for prompt in soak_world.sure(plain(content)):
                order = asked(soak_world, prompt, "damaged")
                answer = await http.post("/v1/completions", json=order)
                if answer.status_code != 200:
                    assert error_code(answer) in CAUGHT, f"{case}: {answer.text}"
                    outcomes[f"{case} {error_code(answer)}"] += 1
                    continue
                expected = soak_world.answers[plain(content)][prompt][:4]
                tokens = answer.json()["choices"][0]["token_ids"][: len(expected)]
                assert tokens == expected, f"{case} {damage}: wrong tokens, and nobody said so"
                outcomes[f"{case} right"] += 1
            gone = await http.delete("/v1/adapters/damaged?force=true")
            assert gone.status_code == 200, gone.text
        assert (await http.get("/readyz")).status_code == 200
    asked_each = len(soak_world.sure(plain(content)))
    assert outcomes == {
        "pages-*.bin right": asked_each,  # it is only a cache
        "adapter_model.safetensors right": asked_each,  # its page file is whole
        "manifest.json right": asked_each,  # the engine knows this one, and its pages are whole
        "adapter_model.safetensors and pages-*.bin adapter_corrupt": asked_each,
    }
    assert served.total() > 0
    assert len(engines(server)) == 1


async def evicted(http: httpx.AsyncClient, folder: Path) -> None:
    """Loaded once, so that it has a page file, and gone from memory again."""
    answer = await http.post("/v1/admin/adapters/damaged/load", json={"wait": True})
    assert answer.status_code == 200, answer.text
    for _ in range(400):
        if list(folder.glob("pages-*.bin")):
            break
        await asyncio.sleep(0.025)
    order = {"tier": "host", "drain": True}
    assert (await http.post("/v1/admin/adapters/damaged/evict", json=order)).status_code == 200

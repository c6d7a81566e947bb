"""The tour of `loraplex demo`: all of the server's promises over its REST API, with every answer
checked.

Knows the API and `assets/skills.json`; nothing of how the server is made or started.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PAIRS_PER_SKILL = 2
MAX_TOKENS = 48
TIMEOUT_S = 120.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Question:
    """`expected` is None where nobody can say what is right: the base model without an adapter."""

    adapter: str | None
    text: str
    expected: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    question: Question
    text: str
    milliseconds: float

    @property
    def right(self) -> bool:
        return self.question.expected in (None, self.text)


def run(url: str, assets: Path, console: Console) -> bool:
    """The whole tour against the server at `url`; True when every answer was right.

    Raises: httpx.HTTPError when the server refuses a step or does not answer.
    """
    return asyncio.run(_tour(url, assets, console))


async def _tour(url: str, assets: Path, console: Console) -> bool:
    skills = read_skills(assets)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
        _head(console, f"1. Upload {len(skills)} adapters over REST")
        console.print(await _upload_all(http, assets, skills))

        questions = burst(skills)
        _head(
            console,
            f"2. One burst: {len(questions)} requests, {len(skills)} adapters and the base",
        )
        started = time.perf_counter()
        answers, most = await _ask_all(http, questions)
        seconds = time.perf_counter() - started
        console.print(_answers_table(answers))
        console.print(
            f"{sum(a.right for a in answers)} of {len(answers)} right in {seconds:.2f} s"
            + (f"; up to {most} ran in the same batch" if most > 1 else "")
        )

        _head(console, "3. Where the adapters are")
        console.print(await _residency_table(http))

        name = skills[0]["id"]
        _head(console, f"4. Evict {name} to disk, then call it again")
        freed = await _post(http, f"/v1/admin/adapters/{name}/evict", {"tier": "host"})
        again = await _ask(http, questions[0])
        console.print(
            f"freed {_freed(freed)}; asked again, it came back by itself:", soft_wrap=True
        )
        console.print(_answers_table([again]))

    _head(console, "5. Your turn")
    console.print(next_steps(url, questions[0], assets), markup=False, soft_wrap=True)
    return again.right and all(a.right for a in answers)


def read_skills(assets: Path) -> list[dict[str, Any]]:
    """The entries of skills.json: id, title, and `tour` pairs of input and expected."""
    skills: list[dict[str, Any]] = json.loads((assets / "skills.json").read_text())["skills"]
    return skills


def burst(skills: Sequence[dict[str, Any]]) -> list[Question]:
    """A few questions for each adapter, interleaved, and one of them put to the base model too."""
    rounds = [
        Question(skill["id"], skill["tour"][i]["input"], skill["tour"][i]["expected"])
        for i in range(PAIRS_PER_SKILL)
        for skill in skills
        if i < len(skill["tour"])
    ]
    return [*rounds, Question(None, rounds[0].text, None)]


def next_steps(url: str, question: Question, assets: Path) -> str:
    """Lines to paste into another terminal."""
    body = json.dumps(
        {
            "adapter_id": question.adapter,
            "messages": [{"role": "user", "content": question.text}],
            "temperature": 0,
        }
    )
    folder = assets / "adapters" / str(question.adapter)
    json_type = "-H 'content-type: application/json'"
    return "\n".join(
        [
            f"curl {url}/v1/chat/completions {json_type} -d '{body}'",
            f"curl {url}/v1/adapters",
            f"curl {url}/v1/admin/slots",
            f"curl {url}/v1/adapters -F name=mine -F config=@{folder}/adapter_config.json "
            f"-F weights=@{folder}/adapter_model.safetensors",
            f"curl -X DELETE {url}/v1/adapters/mine",
            f"loraplex chat --url {url} --adapter {question.adapter}",
            f"API docs: {url}/docs",
        ]
    )


async def _upload_all(
    http: httpx.AsyncClient, assets: Path, skills: Iterable[dict[str, Any]]
) -> Table:
    rows = _table("adapter", "skill", ">rank", ">kB", ">ms", "")
    for skill in skills:
        folder = assets / "adapters" / skill["id"]
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        started = time.perf_counter()
        response = await http.post(
            "/v1/adapters",
            data={"name": skill["id"], "description": skill["title"]},
            files={k: (f"{k}.bin", v) for k, v in files.items()},
        )
        took = (time.perf_counter() - started) * 1e3
        _check(response)
        adapter = response.json()
        rows.add_row(
            adapter["id"],
            escape(skill["title"]),
            str(adapter["rank"]),
            f"{adapter['size_bytes'] / 1e3:.0f}",
            f"{took:.0f}",
            "[green]added[/]" if response.status_code == 201 else "[dim]was there[/]",
        )
    return rows


async def _ask_all(
    http: httpx.AsyncClient, questions: Sequence[Question]
) -> tuple[list[Answer], int]:
    """All at once; also the most requests that were seen running at the same moment."""
    asking = asyncio.gather(*(_ask(http, question) for question in questions))
    most = 0
    while not asking.done():
        response = await http.get("/v1/admin/requests")
        if response.status_code == 200:
            running = [r for r in response.json()["data"] if r["state"] == "running"]
            most = max(most, len(running))
        await asyncio.wait([asking], timeout=_POLL_S)
    return list(await asking), most


async def _ask(http: httpx.AsyncClient, question: Question) -> Answer:
    body = {
        "messages": [{"role": "user", "content": question.text}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "adapter_id": question.adapter,
    }
    started = time.perf_counter()
    found = await _post(http, "/v1/chat/completions", body)
    took = (time.perf_counter() - started) * 1e3
    return Answer(question, found["choices"][0]["message"]["content"], took)


async def _post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post(path, json=body)
    _check(response)
    answer: dict[str, Any] = response.json()
    return answer


def _check(response: httpx.Response) -> None:
    """Raises: httpx.HTTPStatusError with the server's own words."""
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{response.request.method} {response.request.url.path}: {response.text}",
            request=response.request,
            response=response,
        )


async def _residency_table(http: httpx.AsyncClient) -> Table:
    response = await http.get("/v1/admin/slots")
    _check(response)
    slots = response.json()
    rows = _table("adapter", ">rank", ">pages", ">kB on the device", "state")
    for slot in sorted(slots["data"], key=lambda s: str(s["id"])):
        rows.add_row(
            str(slot["id"]),
            str(slot["rank"]),
            str(slot["pages"]),
            f"{slot['device_bytes'] / 1e3:.0f}",
            slot["state"],
        )
    return rows


def _answers_table(answers: Iterable[Answer]) -> Table:
    rows = _table("input", "adapter", "output", "", ">ms")
    for a in answers:
        verdict = "[green]right[/]"
        if a.question.expected is None:
            verdict = "[dim]no adapter, no skill[/]"
        elif not a.right:
            verdict = f"[bold red]wrong[/], should be {escape(a.question.expected)}"
        rows.add_row(
            escape(a.question.text),
            a.question.adapter or "[dim]base[/]",
            escape(a.text),
            verdict,
            f"{a.milliseconds:.0f}",
        )
    return rows


def _freed(evicted: dict[str, Any]) -> str:
    freed = evicted["freed"]
    device, host = freed["device_bytes"] / 1e3, freed["host_bytes"] / 1e3
    return f"{device:.0f} kB on the device, {host:.0f} kB on the host"


def _head(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return made

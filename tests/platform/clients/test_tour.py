"""The tour against a stub of the API: every answer is checked, and a wrong one is seen."""

from __future__ import annotations

import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from loraplex.platform.demo import tour

SKILLS = [
    {
        "id": "reverse",
        "title": "Reverse",
        "tour": [
            {"input": "galaxy", "expected": "yxalag"},
            {"input": "pepper", "expected": "reppep"},
            {"input": "never asked", "expected": "?"},
        ],
    },
    {
        "id": "kv-json",
        "title": "To [JSON]",
        "tour": [
            {"input": "a=1", "expected": '{"a": 1}'},
            {"input": "b=[red]", "expected": '{"b": "[red]"}'},
        ],
    },
]
ANSWERS = {(s["id"], p["input"]): p["expected"] for s in SKILLS for p in s["tour"]}


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    (tmp_path / "skills.json").write_text(json.dumps({"skills": SKILLS}))
    for skill in SKILLS:
        folder = tmp_path / "adapters" / str(skill["id"])
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


class Api:
    """Answers right, unless told otherwise; refuses an adapter that was not uploaded first."""

    def __init__(self, stub: Any, adapter_object: Any) -> None:
        self.adapter_object = adapter_object
        self.uploaded: list[str] = []
        self.evicted: list[str] = []
        self.wrong: set[str] = set()
        # The burst ends only when the tour has looked at it: no race between the two.
        self.looked = threading.Event()
        stub.routes |= {
            "POST /v1/adapters": self.upload,
            "POST /v1/chat/completions": self.chat,
            "GET /v1/admin/requests": self.requests,
            "GET /v1/admin/slots": (200, {"data": [self.slot("reverse"), self.slot("kv-json")]}),
            "POST /v1/admin/adapters/reverse/evict": self.evict,
        }

    def upload(self, asked: Any) -> tuple[int, Any]:
        (name,) = re.findall(rb'name="name"\r\n\r\n([\w-]+)', asked.body)
        assert b"weights" in asked.body
        self.uploaded.append(name.decode())
        return 201, self.adapter_object(name.decode())

    def requests(self, asked: Any) -> tuple[int, Any]:
        self.looked.set()
        return 200, {"data": [{"state": "running"}] * 5 + [{"state": "waiting"}]}

    def chat(self, asked: Any) -> tuple[int, Any]:
        assert self.looked.wait(10)
        adapter, text = asked.json["adapter_id"], asked.json["messages"][0]["content"]
        assert adapter is None or adapter in self.uploaded
        said = ANSWERS.get((adapter, text), "hm")
        if text in self.wrong and (not self.evicted or text == "galaxy"):
            said = "wrong"
        return 200, {"choices": [{"message": {"content": said}}]}

    def evict(self, asked: Any) -> tuple[int, Any]:
        assert asked.json == {"tier": "host"}
        self.evicted.append("reverse")
        return 200, {"evicted": True, "freed": {"device_bytes": 4000, "host_bytes": 8000}}

    def slot(self, name: str) -> dict[str, Any]:
        figures = {"rank": 8, "pages": 1, "device_bytes": 4000}
        return {"id": name, "state": "device", **figures}


@pytest.fixture
def api(stub: Any, adapter_object: Any) -> Api:
    return Api(stub, adapter_object)


def take(stub: Any, assets: Path) -> tuple[bool, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    right = tour.run(stub.url, assets, console)
    return right, console.export_text()


def test_all_right(stub: Any, api: Api, assets: Path) -> None:
    right, shown = take(stub, assets)
    assert right
    assert api.uploaded == ["reverse", "kv-json"]
    assert api.evicted == ["reverse"]
    assert "5 of 5 right" in shown
    assert "up to 5 ran in the same batch" in shown
    assert "To [JSON]" in shown
    assert '{"b": "[red]"}' in shown, "brackets are text here, not markup"
    assert "freed 4 kB on the device, 8 kB on the host" in shown
    assert f"{stub.url}/docs" in shown
    assert "never asked" not in shown


def test_one_wrong_answer_fails_the_tour_and_is_shown(stub: Any, api: Api, assets: Path) -> None:
    api.wrong = {"a=1"}
    right, shown = take(stub, assets)
    assert not right
    assert "4 of 5 right" in shown
    assert 'wrong, should be {"a": 1}' in shown


def test_the_base_model_is_asked_but_not_judged(stub: Any, api: Api, assets: Path) -> None:
    questions = tour.burst(SKILLS)
    assert [q.adapter for q in questions] == ["reverse", "kv-json", "reverse", "kv-json", None]
    assert questions[-1].text == "galaxy"
    right, shown = take(stub, assets)
    assert right
    assert re.search(r"galaxy +base +hm +no adapter", shown)


def test_an_adapter_that_does_not_come_back_fails_the_tour(
    stub: Any, api: Api, assets: Path
) -> None:
    chat = api.chat

    def after_eviction(asked: Any) -> tuple[int, Any]:
        if api.evicted:
            return 200, {"choices": [{"message": {"content": "the base model's words"}}]}
        return chat(asked)

    stub.routes["POST /v1/chat/completions"] = after_eviction
    assert take(stub, assets)[0] is False


def test_a_refused_step_carries_the_servers_words(stub: Any, api: Api, assets: Path) -> None:
    stub.routes["POST /v1/adapters"] = (422, {"error": {"message": "adapter refused: no B"}})
    with pytest.raises(httpx.HTTPStatusError, match="adapter refused: no B"):
        take(stub, assets)


def test_the_curl_lines_are_complete(assets: Path) -> None:
    lines = tour.next_steps("http://x:1", tour.Question("kv-json", "a=1", '{"a": 1}'), assets)
    body = re.search(r"chat/completions .* -d '(.*)'", lines)
    assert body is not None
    assert json.loads(body[1])["adapter_id"] == "kv-json"
    for path in re.findall(r"@(\S+)", lines):
        assert Path(path).is_file()

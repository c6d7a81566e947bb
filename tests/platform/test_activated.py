"""Activated LoRAs over HTTP: the adapter object, and answers that say whether they were invoked."""

from __future__ import annotations

import json
from typing import Any

import pytest

CALL = "<go>"  # a token a byte
TOKENS = list(CALL.encode())


@pytest.fixture
def upload(server: Any, adapter_files_module: Any) -> Any:
    async def send(name: str, tokens: list[int] | None) -> Any:
        files = adapter_files_module
        config = files.config(alora_invocation_tokens=tokens)
        weights = files.weights(server.engine.info.modules)
        return await server.http.post(
            "/v1/adapters",
            data={"name": name},
            files={"config": ("c", json.dumps(config).encode()), "weights": ("w", weights)},
        )

    return send


async def test_the_adapter_object_has_its_tokens(server: Any, upload: Any) -> None:
    plain, activated = [(await upload(name, t)).json() for name, t in (("p", None), ("a", TOKENS))]
    assert plain["invocation_tokens"] is None
    assert activated["invocation_tokens"] == TOKENS
    assert activated["digest"] != plain["digest"]
    detail = (await server.http.get("/v1/adapters/a")).json()
    assert detail["versions"][0]["invocation_tokens"] == TOKENS


async def test_tokens_the_model_does_not_know_are_refused(upload: Any) -> None:
    answer = await upload("a", [5, 258])
    assert answer.status_code == 422
    [problem] = answer.json()["error"]["details"]
    assert problem["code"] == "invocation_impossible"
    assert "258" in problem["message"]


@pytest.mark.parametrize(
    ("prompt", "invoked"),
    [
        (f"hi {CALL}", True),
        (f"{CALL} hi", True),
        ("hi", False),
        ("<go", False),
        ([f"a {CALL}", f"b {CALL}"], True),
        ([f"a {CALL}", "b"], False),
    ],
)
async def test_answers_say_whether_it_was_invoked(
    prompt: Any, invoked: bool, server: Any, upload: Any
) -> None:
    assert (await upload("a", TOKENS)).status_code == 201
    body = {"prompt": prompt, "adapter_id": "a", "max_tokens": 1}
    whole = await server.http.post("/v1/completions", json=body)
    assert whole.json()["adapter"]["invoked"] is invoked
    stream = await server.http.post("/v1/completions", json={**body, "stream": True})
    last = json.loads(stream.text.split("\n\n")[-3].removeprefix("data: "))
    assert last["adapter"]["invoked"] is invoked
    for answer in (whole, stream):
        assert answer.headers["x-adapter-invoked"] == str(invoked).lower()


async def test_what_is_cut_off_does_not_invoke(server: Any, upload: Any) -> None:
    await upload("a", TOKENS)
    body = {"prompt": f"{CALL} and on", "adapter_id": "a", "max_tokens": 1}
    for cut, invoked in ((11, True), (10, False)):
        body["truncate_prompt_tokens"] = cut
        answer = await server.http.post("/v1/completions", json=body)
        assert answer.json()["adapter"]["invoked"] is invoked


async def test_a_chat_is_searched_as_the_template_writes_it(server: Any, upload: Any) -> None:
    await upload("a", list(b"<assistant>"))
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "a", "max_tokens": 1}
    answer = await server.http.post("/v1/chat/completions", json=chat)
    assert answer.json()["adapter"]["invoked"] is True


async def test_members_of_a_composition_say_it_each(server: Any, upload: Any) -> None:
    await upload("a", TOKENS)
    await upload("never", [1, 2])
    await upload("plain", None)
    members = [{"id": "a"}, {"id": "plain"}, {"id": "never"}]
    body = {"prompt": CALL, "adapters": members, "max_tokens": 1}
    answer = await server.http.post("/v1/completions", json=body)
    found = [item.get("invoked") for item in answer.json()["adapters"]]
    assert found == [True, None, False]
    assert answer.headers["x-adapter-invoked"] == "true,true,false"
    alone = await server.http.post("/v1/completions", json={"prompt": CALL, "adapter_id": "plain"})
    assert "x-adapter-invoked" not in alone.headers
    assert "invoked" not in alone.json()["adapter"]


async def test_an_embedding_says_it_too(server: Any, upload: Any) -> None:
    await upload("a", TOKENS)
    for texts, invoked in ((["x"], False), ([CALL], True), ([CALL, "x"], False)):
        answer = await server.http.post("/v1/embeddings", json={"input": texts, "model": "a"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["adapter"]["invoked"] is invoked
        assert answer.headers["x-adapter-invoked"] == str(invoked).lower()

"""How adapters want to be used: set by PATCH, shipped in their files, and what wins over what."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest


def archive(parts: Any, use_files: dict[str, Any], folder: str = "a/", **others: Any) -> bytes:
    out = io.BytesIO()
    files = {
        f"{folder}adapter_config.json": parts["config"][1],
        f"{folder}adapter_model.safetensors": parts["weights"][1],
        **{f"{folder}{name}": content for name, content in use_files.items()},
        **others,
    }
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


async def upload(server: Any, packed: bytes, name: str = "sql") -> Any:
    return await server.http.post(
        "/v1/adapters", data={"name": name}, files={"archive": ("a.tar.gz", packed)}
    )


async def patch(server: Any, defaults: Any, name: str = "sql") -> Any:
    answer = await server.http.patch(f"/v1/adapters/{name}", json={"defaults": defaults})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def complete(server: Any, model: str = "sql", **body: Any) -> Any:
    body = {"prompt": "x", "model": model, **body}
    answer = await server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return server.engine.seen[-1].sampling


async def chat_prompt(server: Any, *messages: dict[str, Any], **body: Any) -> str:
    body = {"model": "sql", "max_tokens": 1, **body}
    body["messages"] = messages or [{"role": "user", "content": "hi"}]
    answer = await server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return bytes(server.engine.seen[-1].prompt_token_ids).decode()


async def test_defaults_set_by_hand_hold_until_a_request_says_otherwise(server: Any) -> None:
    await server.upload("sql")
    defaults = {"temperature": 0.25, "top_k": 7, "max_tokens": 5, "min_tokens": 4, "stop": ["q"]}
    shown = await patch(server, {**defaults, "stop_token_ids": [99]})
    assert shown["defaults"] == {**defaults, "stop_token_ids": [99]}
    sampling = await complete(server)
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.25, 7, 5)
    assert (sampling.min_tokens, sampling.stop_token_ids) == (4, (99,))
    given = await complete(server, temperature=1.5, top_k=0, max_tokens=2, stop_token_ids=[])
    assert (given.temperature, given.top_k, given.max_tokens) == (1.5, 0, 2)
    assert (given.min_tokens, given.stop_token_ids) == (2, ())
    assert (await complete(server, model="tiny")).max_tokens == 16
    mixed = await complete(server, model="tiny", adapters=[{"id": "sql"}])
    assert mixed.top_k == 7
    cleared = await patch(server, {})
    assert cleared["defaults"] == {}
    assert (await complete(server)).temperature == 1.0


async def test_stop_strings_and_seed_of_an_adapter(server: Any) -> None:
    await server.upload("sql")
    await patch(server, {"stop": "de", "seed": 4})
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "sql"})
    assert answer.json()["choices"][0]["text"] == "abc"
    assert server.engine.seen[-1].sampling.seed == 4
    own = await server.http.post(
        "/v1/completions", json={"prompt": "x", "model": "sql", "stop": "gh"}
    )
    assert own.json()["choices"][0]["text"] == "abcdef"


async def test_a_mixture_has_nobodys_defaults(server: Any) -> None:
    await server.upload("sql")
    await server.upload("other", alpha=16)
    await patch(server, {"top_k": 7})
    sampling = await complete(server, model="tiny", adapters=[{"id": "sql"}, {"id": "other"}])
    assert sampling.top_k == 0


async def test_a_system_prompt_and_a_template(server: Any) -> None:
    await server.upload("sql")
    await patch(server, {"system_prompt": "Be SQL."})
    assert await chat_prompt(server) == "<system>Be SQL.\n<user>hi\n<assistant>"
    own = {"role": "system", "content": "Mine."}
    assert await chat_prompt(server, own) == "<system>Mine.\n<assistant>"
    template = "{% for m in messages %}[{{ m.role }} {{ mood }}]{% endfor %}"
    await patch(
        server,
        {"chat_template": template, "chat_template_kwargs": {"mood": "ok"}, "system_prompt": "s"},
    )
    assert await chat_prompt(server) == "[system ok][user ok]"
    bent = await chat_prompt(server, chat_template_kwargs={"mood": "sad"})
    assert bent == "[system sad][user sad]"
    assert await chat_prompt(server, chat_template="{{ messages[-1].content }}") == "hi"
    tokens = await server.http.post(
        "/tokenize", json={"model": "sql", "messages": [{"role": "user", "content": "hi"}]}
    )
    assert bytes(tokens.json()["tokens"]).decode() == "[system ok][user ok]"
    assert await chat_prompt(server, model="tiny") == "<user>hi\n<assistant>"


async def test_tools_and_pooling_of_an_adapter(server: Any) -> None:
    await server.upload("sql")
    await patch(
        server, {"pooling": "mean", "tool_format": "mistral", "chat_template": "{{ tools }}t"}
    )
    await server.http.post("/v1/embeddings", json={"input": "a", "model": "sql"})
    assert server.engine.seen[-1].pooling == "mean"
    server.engine.say = b'[TOOL_CALLS]add{"a": 1}'
    server.engine.end_after = len(server.engine.say)
    tool = {"type": "function", "function": {"name": "add"}}
    body = {"model": "sql", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    answer = await server.http.post("/v1/chat/completions", json=body)
    [call] = answer.json()["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], len(call["id"])) == ("add", 9)


@pytest.mark.parametrize(
    ("defaults", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"colour": "red"}, "colour"),
        ({"stop_token_ids": [9999]}, "9999"),
        ({"chat_template": "{% for %}"}, "chat_template"),
        ({"chat_template": "{{ raise_exception('never') }}"}, "never"),
        ({"chat_template": "{{ messages[5].role.x }}"}, "chat_template"),
        ({"system_prompt": ""}, "system_prompt"),
        ({"tool_format": "smoke"}, "tool_format"),
        ("warm", "defaults"),
    ],
)
async def test_bad_defaults_are_refused(server: Any, defaults: Any, word: str) -> None:
    await server.upload("sql")
    answer = await server.http.patch("/v1/adapters/sql", json={"defaults": defaults})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "defaults")
    assert word in error["message"]
    assert (await server.http.get("/v1/adapters/sql")).json()["defaults"] == {}


async def test_a_template_that_refuses_system_messages_refuses_a_system_prompt(server: Any) -> None:
    await server.upload("sql")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    await patch(server, {"chat_template": template})
    both = {"chat_template": template, "system_prompt": "s"}
    answer = await server.http.patch("/v1/adapters/sql", json={"defaults": both})
    assert answer.status_code == 400
    assert "no system" in answer.json()["error"]["message"]


async def test_changes_are_audited_and_end_with_the_adapter(server: Any) -> None:
    await server.upload("sql")
    await patch(server, {"top_k": 7})
    events = (await server.http.get("/v1/admin/events")).json()["data"]
    [event] = [item for item in events if item["action"] == "adapter.patch"]
    assert (event["before"]["defaults"], event["after"]["defaults"]) == (None, {"top_k": 7})
    await server.http.delete("/v1/adapters/sql")
    assert (await server.upload("sql"))["defaults"] == {}
    assert (await complete(server)).top_k == 0


# --- shipped in files ----------------------------------------------------------------------------


async def test_files_beside_the_weights_say_how(server: Any, upload_parts: Any) -> None:
    generation = {
        "temperature": 0.5,
        "top_k": None,
        "max_new_tokens": 6,
        "eos_token_id": [256, 100],
        "transformers_version": "5",
    }
    use_files = {"generation_config.json": generation, "chat_template.jinja": b"T{{ 1 + 1 }}"}
    decoy = {"checkpoint/generation_config.json": {"temperature": 2}}
    answer = await upload(server, archive(upload_parts(), use_files, "a/", **decoy))
    assert answer.status_code == 201, answer.text
    shipped = {
        "temperature": 0.5,
        "max_tokens": 6,
        "stop_token_ids": [100],
        "chat_template": "T{{ 1 + 1 }}",
    }
    assert answer.json()["shipped_defaults"] == shipped
    sampling = await complete(server)
    assert (sampling.temperature, sampling.max_tokens, sampling.stop_token_ids) == (0.5, 6, (100,))
    assert await chat_prompt(server) == "T2"
    await patch(server, {"temperature": 0.75})
    mixed = await complete(server)
    assert (mixed.temperature, mixed.max_tokens) == (0.75, 6)


async def test_the_tokenizers_template_counts_unless_it_is_the_models(
    server: Any, upload_parts: Any, fake_engine_module: Any
) -> None:
    same = {"tokenizer_config.json": {"chat_template": fake_engine_module.CHAT_TEMPLATE}}
    assert (await upload(server, archive(upload_parts(), same))).json()["shipped_defaults"] == {}
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    other = {"tokenizer_config.json": {"chat_template": named}}
    answer = await upload(server, archive(upload_parts(), other))
    assert answer.json()["shipped_defaults"] == {"chat_template": "yes"}


async def test_other_use_of_the_same_weights_is_a_version(server: Any, upload_parts: Any) -> None:
    def packed(**generation: Any) -> bytes:
        files = {"generation_config.json": generation} if generation else {}
        return archive(upload_parts(), files)

    first = await upload(server, packed())
    assert (first.status_code, first.json()["version"]) == (201, 1)
    second = await upload(server, packed(top_k=3))
    assert (second.status_code, second.json()["version"]) == (201, 2)
    assert second.json()["digest"] == first.json()["digest"]
    assert (await upload(server, packed(top_k=3))).status_code == 200
    assert (await complete(server, model="sql@1")).top_k == 0
    assert (await complete(server, model="sql@2")).top_k == 3
    assert (await complete(server)).top_k == 3
    greedy = await upload(server, packed(do_sample=False, temperature=0.7))
    assert greedy.json()["shipped_defaults"] == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", b"{"),
        ("generation_config.json", [1]),
        ("generation_config.json", {"temperature": -2}),
        ("generation_config.json", {"eos_token_id": 9999}),
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"nope"),
        ("tokenizer_config.json", {"chat_template": "{{ 1 / 0 }}"}),
    ],
)
async def test_bad_use_files_refuse_the_upload(
    server: Any, upload_parts: Any, name: str, content: Any
) -> None:
    answer = await upload(server, archive(upload_parts(), {name: content}))
    assert answer.status_code == 422, answer.text
    [problem] = answer.json()["error"]["details"]
    assert problem["file"] == name
    assert (await server.http.get("/v1/adapters/sql")).status_code == 404


async def test_use_files_named_twice_are_ambiguous(server: Any, upload_parts: Any) -> None:
    twice = {"./a/generation_config.json": {}}
    packed = archive(upload_parts(), {"generation_config.json": {}}, "a/", **twice)
    answer = await upload(server, packed)
    assert answer.status_code == 422
    assert "generation_config.json" in answer.json()["error"]["message"]


# --- whose templates run -------------------------------------------------------------------------

OPERATOR = "operator-key"
RUNAWAY = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}x"


async def tenant(server: Any) -> dict[str, str]:
    operator = {"authorization": f"Bearer {OPERATOR}"}
    made = await server.http.post("/v1/admin/tenants", json={"name": "acme"}, headers=operator)
    assert made.status_code == 201, made.text
    order = {"tenant": "acme", "scopes": ["infer", "upload"]}
    key = await server.http.post("/v1/admin/keys", json=order, headers=operator)
    return {"authorization": f"Bearer {key.json()['key']}"}


@pytest.mark.parametrize("allowed", [False, True])
async def test_templates_of_tenants_run_only_where_allowed(
    start: Any, upload_parts: Any, allowed: bool
) -> None:
    async with start(api_key=OPERATOR, tenant_templates=allowed) as server:
        server.http.headers.update(await tenant(server))
        use_files = {"chat_template.jinja": b"T", "generation_config.json": {"top_k": 3}}
        answer = await upload(server, archive(upload_parts(), use_files))
        assert answer.status_code == 201, answer.text
        shipped, warnings = answer.json()["shipped_defaults"], answer.json()["warnings"]
        assert shipped == ({"top_k": 3, "chat_template": "T"} if allowed else {"top_k": 3})
        assert [w["code"] for w in warnings] == ([] if allowed else ["chat_template_left_out"])
        messages = [{"role": "user", "content": "hi"}]
        own = {"messages": messages, "chat_template": "x", "max_tokens": 1}
        answers = [
            await server.http.post("/v1/chat/completions", json=own),
            await server.http.post("/tokenize", json={k: own[k] for k in list(own)[:2]}),
            await server.http.patch("/v1/adapters/sql", json={"defaults": {"chat_template": "x"}}),
        ]
        assert {answer.status_code for answer in answers} == ({200} if allowed else {403})
        if not allowed:
            params = [answer.json()["error"]["param"] for answer in answers]
            assert params == ["chat_template", "chat_template", "defaults"]
        system = await server.http.patch(
            "/v1/adapters/sql", json={"defaults": {"system_prompt": "s"}}
        )
        assert system.status_code == 200


async def test_a_template_that_an_operator_pulls_is_an_operators(
    start: Any, upload_parts: Any, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    packed = archive(upload_parts(), {"chat_template.jinja": b"T"})
    (shelf / "a.tar.gz").write_bytes(packed)
    async with start(api_key=OPERATOR, source_dirs=f"shelf={shelf}") as server:
        acme = await tenant(server)
        operator = {"authorization": f"Bearer {OPERATOR}"}
        for headers, expected in ((operator, {"chat_template": "T"}), (acme, {})):
            order = {"name": "sql", "source": "dir:shelf/a.tar.gz"}
            pull = await server.http.post("/v1/adapters/pull", json=order, headers=headers)
            assert pull.status_code == 202, pull.text
            found = pull.json()
            while found["pull"]["status"] not in ("ready", "failed"):
                await asyncio.sleep(0.01)
                found = (await server.http.get("/v1/adapters/sql", headers=headers)).json()
            assert found["shipped_defaults"] == expected


async def test_a_template_that_does_not_end_is_ended(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.platform.chat_prompt.MAX_SECONDS", 0.2)
    await server.upload("sql")
    before = threading.active_count()
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template": RUNAWAY}
    answer = await server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "more than 0.2 s" in answer.json()["error"]["message"]
    defaults = {"defaults": {"chat_template": RUNAWAY}}
    assert (await server.http.patch("/v1/adapters/sql", json=defaults)).status_code == 400
    for _ in range(1000):
        if threading.active_count() <= before:
            break
        await asyncio.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name == "chat-template"]

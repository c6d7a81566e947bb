"""`/v1/completions`, `/v1/chat/completions`, `/v1/models`: shapes, sampling, adapters, streams."""

from __future__ import annotations

import json
from typing import Any

import pytest


async def complete(server: Any, **body: Any) -> Any:
    answer = await server.http.post("/v1/completions", json={"prompt": "x", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def chat(server: Any, **body: Any) -> Any:
    messages = [{"role": "user", "content": "hi"}]
    answer = await server.http.post(
        "/v1/chat/completions", json={"messages": messages, "max_tokens": 3, **body}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(server: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream without the final [DONE]."""
    default = (
        {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "x"}
    )
    answer = await server.http.post(path, json={**default, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# --- completions -----------------------------------------------------------------------------


async def test_a_completion_has_openais_shape(server: Any) -> None:
    answer = await complete(server, max_tokens=4)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "abcd",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["adapter"] is None


async def test_the_default_is_sixteen_tokens(server: Any) -> None:
    assert (await complete(server))["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [[104, 105]]),
        ([104, 105], [[104, 105]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompts_in_every_form(server: Any, prompt: Any, ids: list[list[int]]) -> None:
    answer = await complete(server, prompt=prompt, max_tokens=1)
    assert [request.prompt_token_ids for request in server.engine.seen] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_n_choices_of_every_prompt_with_seeds_of_their_own(server: Any) -> None:
    answer = await complete(server, prompt=["a", "b"], n=2, seed=7, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    seen = sorted(server.engine.seen, key=lambda request: request.request_id)
    assert [(r.prompt_token_ids, r.sampling.seed) for r in seen] == [
        ([97], 7),
        ([97], 8),
        ([98], 7),
        ([98], 8),
    ]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 8


async def test_sampling_parameters_reach_the_engine(server: Any) -> None:
    await complete(
        server,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        seed=-3,
        min_tokens=2,
        stop_token_ids=[5],
        ignore_eos=True,
        logit_bias={"97": -1.5},
        allowed_token_ids=[97, 98],
        prompt_logprobs=0,
        priority=-4,
        cache_salt="s",
        user="someone",
        an_unknown_field={"is": "ignored"},
    )
    request = server.engine.seen[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.5,
        0.9,
        0,
        0.1,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, 0.3)
    assert (sampling.repetition_penalty, sampling.seed) == (1.1, -3)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (9, 2, True)
    assert (sampling.stop_token_ids, sampling.logit_bias) == ((5,), {97: -1.5})
    assert (sampling.allowed_token_ids, sampling.prompt_logprobs) == ((97, 98), 0)
    assert (request.priority, request.cache_salt) == (-4, "s")


async def test_generation_config_gives_the_defaults(start: Any, fake_engine_module: Any) -> None:
    fakes = fake_engine_module
    info = fakes.model_info(generation_defaults={"temperature": 0.6, "top_k": 20})
    async with start(fakes.FakeEngine(info)) as server:
        await complete(server)
        await complete(server, temperature=0, top_k=0)
    (default, given) = (request.sampling for request in server.engine.seen)
    assert (default.temperature, default.top_k, default.top_p) == (0.6, 20, 1.0)
    assert (given.temperature, given.top_k) == (0, 0)


async def test_stop_strings_cut_the_text_and_cancel_the_rest(server: Any) -> None:
    answer = await complete(server, max_tokens=20, stop=["ef", "zz"])
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "abcd",
        "stop",
        "ef",
    )
    assert server.engine.cancelled == [server.engine.seen[0].request_id]
    assert answer["usage"]["completion_tokens"] == 6
    kept = await complete(server, max_tokens=20, stop="ef", include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "abcdef"
    later = await complete(server, max_tokens=40, stop="ef", min_tokens=10)
    assert later["usage"]["completion_tokens"] == 32


async def test_the_end_token_is_no_text(server: Any) -> None:
    server.engine.end_after = 3
    choice = (await complete(server, skip_special_tokens=False))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", None)


async def test_a_stop_token_is_named_and_no_text(server: Any) -> None:
    choice = (await complete(server, stop_token_ids=[ord("c")]))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", 99)


async def test_text_never_breaks_a_character(server: Any) -> None:
    server.engine.say = "aé€😀".encode()
    texts = [
        e["choices"][0]["text"] for e in await events(server, "/v1/completions", max_tokens=10)
    ]
    assert "".join(texts) == "aé€😀"
    assert texts == ["a", "é", "€", "😀"]


async def test_logprobs(server: Any) -> None:
    choice = (await complete(server, max_tokens=3, logprobs=2))["choices"][0]
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "tokens": ["a", "b", "c"],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "a": -1.5}, {"c": -0.5, "a": -1.5}],
    }
    zero = (await complete(server, max_tokens=1, logprobs=0))["choices"][0]
    assert zero["logprobs"]["top_logprobs"] == [{"a": -0.5}]
    named = await complete(server, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)
    assert named["choices"][0]["logprobs"]["tokens"] == ["token_id:97"]


async def test_echo_repeats_the_prompt_with_its_logprobs(server: Any) -> None:
    choice = (await complete(server, prompt="xy", max_tokens=2, echo=True, logprobs=1))["choices"][
        0
    ]
    assert choice["text"] == "xyab"
    assert choice["logprobs"]["tokens"] == ["x", "y", "a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


async def test_echo_alone_scores_a_prompt(server: Any) -> None:
    """What evaluation harnesses send: only the prompt's log-probabilities are wanted."""
    answer = await complete(server, prompt=[120, 121], max_tokens=0, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("xy", ["x", "y"])
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)


async def test_prompt_logprobs(server: Any) -> None:
    choice = (await complete(server, prompt="xy", max_tokens=1, prompt_logprobs=1))["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {"121": {"logprob": -0.5, "rank": 1, "decoded_token": "y"}},
    ]


async def test_token_ids_on_demand(server: Any) -> None:
    choice = (await complete(server, prompt="x", max_tokens=2, return_token_ids=True))["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([97, 98], [120])
    streamed = await events(server, "/v1/completions", max_tokens=2, return_token_ids=True)
    assert [e["choices"][0]["token_ids"] for e in streamed] == [[97], [98]]
    assert [e["choices"][0].get("prompt_token_ids") for e in streamed] == [[120], None]
    said = await chat(server, return_token_ids=True, prompt_logprobs=0)
    assert said["choices"][0]["token_ids"] == [97, 98, 99]
    assert said["prompt_token_ids"] == server.engine.seen[-1].prompt_token_ids
    assert len(said["prompt_logprobs"]) == len(said["prompt_token_ids"])


async def test_the_best_of_several(server: Any) -> None:
    """The fake's log-probabilities are all -0.5: fewer tokens are likelier."""
    server.engine.lengths = {0: 5, 1: 2, 2: 3, 3: 4}
    answer = await complete(server, best_of=4, n=2, max_tokens=9)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "ab"), (1, "abc")]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 5 + 2 + 3 + 4 + 4  # with the ends
    server.engine.lengths = {0: 3, 1: 1, 2: 2, 3: 4}
    both = await complete(server, prompt=["a", "b"], best_of=2, logprobs=0, max_tokens=9)
    assert [(c["index"], c["text"]) for c in both["choices"]] == [(0, "a"), (1, "ab")]
    assert both["choices"][1]["logprobs"]["tokens"][:2] == ["a", "b"]


async def test_bad_words_of_one_token_are_banned(server: Any) -> None:
    await complete(server, bad_words=["a", "b"], logit_bias={"97": 5, "99": 1})
    assert server.engine.seen[0].sampling.logit_bias == {97: -100, 98: -100, 99: 1}


async def test_bad_words_of_several_tokens_are_kept_out_by_a_grammar(server: Any) -> None:
    await complete(server, bad_words=["a", "so so", "n\n/é"])
    sampling = server.engine.seen[0].sampling
    assert sampling.logit_bias == {97: -100}
    assert sampling.grammar.kind == "grammar"
    assert r"(so\x{20}so|n\x{a}\x{2f}\x{e9})" in sampling.grammar.text
    both = {"prompt": "x", "bad_words": ["so so"], "response_format": {"type": "json_object"}}
    answer = await server.http.post("/v1/completions", json=both)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "bad_words")


async def test_a_request_may_bring_its_own_id(server: Any) -> None:
    assert (await complete(server, request_id="mine"))["id"] == "cmpl-mine"
    assert (await chat(server, request_id="mine"))["id"] == "chatcmpl-mine"


async def test_a_prompt_that_is_cut_is_echoed_as_it_runs(server: Any) -> None:
    answer = await complete(server, prompt="abcdef", truncate_prompt_tokens=2, echo=True)
    assert answer["choices"][0]["text"].startswith("efab")
    await complete(server, prompt="x" * 500, truncate_prompt_tokens=-1, max_tokens=1)
    assert len(server.engine.seen[-1].prompt_token_ids) == 127


async def test_long_prompts_can_be_cut(server: Any) -> None:
    await complete(server, prompt="a" * 300 + "bc", truncate_prompt_tokens=3, max_tokens=1)
    assert server.engine.seen[0].prompt_token_ids == [97, 98, 99]


# --- streams ---------------------------------------------------------------------------------


async def test_a_streamed_completion(server: Any) -> None:
    chunks = await events(server, "/v1/completions", max_tokens=3)
    assert [c["choices"][0]["text"] for c in chunks] == ["a", "b", "c"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}
    assert all(c["object"] == "text_completion" and "usage" not in c for c in chunks)
    assert "adapter" in chunks[-1]


async def test_usage_comes_last_when_asked_for(server: Any) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        chunks = await events(server, path, max_tokens=3, stream_options={"include_usage": True})
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 3
    chunks = await events(
        server, "/v1/completions", max_tokens=3, stream_options={"continuous_usage_stats": True}
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


async def test_streamed_choices_interleave_and_each_ends_once(server: Any) -> None:
    chunks = await events(server, "/v1/completions", prompt=["x", "y"], n=2, max_tokens=3)
    for index in range(4):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "abc"
        assert [choice["finish_reason"] for choice in mine] == [None, None, "length"]


async def test_streamed_logprobs_and_echo(server: Any) -> None:
    chunks = await events(
        server, "/v1/completions", prompt="xy", max_tokens=2, echo=True, logprobs=0
    )
    assert "".join(c["choices"][0]["text"] for c in chunks) == "xyab"
    tokens = [t for c in chunks for t in c["choices"][0]["logprobs"]["tokens"]]
    offsets = [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert (tokens, offsets) == (["x", "y", "a", "b"], [0, 1, 2, 3])


async def test_streams_escape_what_json_must(server: Any) -> None:
    server.engine.say = b'"\\\n\x01</script>'
    chunks = await events(server, "/v1/completions", max_tokens=13)
    assert "".join(c["choices"][0]["text"] for c in chunks) == '"\\\n\x01</script>'


# --- chat ------------------------------------------------------------------------------------


async def test_a_chat_has_openais_shape(server: Any) -> None:
    answer = await chat(server)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "tool_calls": []},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert prompt_of(server) == "<user>hi\n<assistant>"


def prompt_of(server: Any) -> str:
    return bytes(server.engine.seen[-1].prompt_token_ids).decode()


async def test_messages_in_every_form(server: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await chat(
        server,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
    )
    assert prompt_of(server) == "<system>s\n<user>a\nb\n<assistant>"
    await chat(server, add_generation_prompt=False)
    assert prompt_of(server) == "<user>hi\n"
    await chat(
        server,
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "An"}],
        continue_final_message=True,
    )
    assert prompt_of(server) == "<user>q\n<assistant>An"
    await chat(
        server,
        chat_template="{{ messages[0].content }}{{ mood }}",
        chat_template_kwargs={"mood": "!"},
    )
    assert prompt_of(server) == "hi!"


async def test_chat_limits_its_output_by_either_name(server: Any) -> None:
    assert (await chat(server, max_tokens=5))["usage"]["completion_tokens"] == 5
    both = await chat(server, max_tokens=5, max_completion_tokens=2)
    assert both["usage"]["completion_tokens"] == 2
    await chat(server, max_tokens=None, stop="d")
    assert server.engine.seen[-1].sampling.max_tokens is None


async def test_chat_logprobs(server: Any) -> None:
    answer = await chat(server, max_tokens=1, logprobs=True, top_logprobs=2)
    assert answer["choices"][0]["logprobs"]["content"] == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": -1.5, "bytes": [98]},
            ],
        }
    ]
    chunks = await events(server, "/v1/chat/completions", max_tokens=2, logprobs=True)
    tokens = [
        t["token"] for c in chunks for t in (c["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert tokens == ["a", "b"]


async def test_a_streamed_chat_opens_with_the_role(server: Any) -> None:
    chunks = await events(server, "/v1/chat/completions", max_tokens=3)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:]] == ["a", "b", "c"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "length"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


# --- adapters --------------------------------------------------------------------------------


async def test_the_adapter_is_named_by_adapter_id_or_model(server: Any) -> None:
    made = await server.upload("sql")
    digest = made["digest"].removeprefix("sha256:")
    for body in (
        {"adapter_id": "sql"},
        {"model": "sql"},
        {"model": "sql@1"},
        {"model": "tiny", "adapter_id": made["digest"]},
        {"model": "sql", "adapter_id": "sql@1"},
        {"adapters": [{"id": "sql"}]},
    ):
        for path, text in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            answer = await server.http.post(path, json={**text, **body, "max_tokens": 1})
            assert answer.json()["adapter"] == {"id": "sql", "version": 1, "digest": made["digest"]}
            assert answer.headers["x-adapter-digest"] == made["digest"]
            assert answer.headers["x-adapter-version"] == "sql@1"
            assert answer.json()["model"] == body.get("model", "tiny")
            assert [(u.digest, u.weight) for u in server.engine.seen[-1].adapters] == [
                (digest, 1.0)
            ]
    streamed = await server.http.post(
        "/v1/completions", json={"prompt": "x", "model": "sql", "stream": True}
    )
    assert streamed.headers["x-adapter-digest"] == made["digest"]
    assert made["digest"] in streamed.text


async def test_without_an_adapter_the_base_answers(server: Any) -> None:
    for body in ({}, {"model": "tiny"}, {"adapter_id": None}, {"adapter_id": ""}, {"adapters": []}):
        answer = await server.http.post("/v1/completions", json={"prompt": "x", **body})
        assert answer.json()["adapter"] is None
        assert "x-adapter-digest" not in answer.headers
        assert server.engine.seen[-1].adapters == ()


async def test_a_composition(server: Any) -> None:
    one, two = await server.upload("one", alpha=8), await server.upload("two", alpha=16)
    members = [{"id": "one", "weight": 0.7}, {"id": "two", "weight": -0.3}]
    body = {"prompt": "x", "adapters": members}
    whole = await server.http.post("/v1/completions", json=body)
    assert whole.headers["x-adapter-version"] == "one@1,two@1"
    assert whole.headers["x-adapter-digest"] == f"{one['digest']},{two['digest']}"
    answer = whole.json()
    assert "adapter" not in answer
    assert [(a["id"], a["weight"]) for a in answer["adapters"]] == [("one", 0.7), ("two", -0.3)]
    assert [(f"sha256:{u.digest}", u.weight) for u in server.engine.seen[0].adapters] == [
        (one["digest"], 0.7),
        (two["digest"], -0.3),
    ]


# --- models ----------------------------------------------------------------------------------


async def test_models_lists_the_base_and_its_adapters(server: Any) -> None:
    await server.upload("sql", alpha=8, alias="prod")
    await server.upload("sql", alpha=16)
    await server.upload("json")
    listed = (await server.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(m["id"], m["parent"]) for m in listed["data"]] == [
        ("tiny", None),
        ("json", "tiny"),
        ("sql", "tiny"),
        ("sql:prod", "tiny"),
    ]
    assert listed["data"][-1]["root"] == "sql"
    assert listed["data"][0]["max_model_len"] == 128
    assert all(m["object"] == "model" and isinstance(m["created"], int) for m in listed["data"])
    for name in ("tiny", "sql", "sql@1", "sql:prod"):
        assert (await server.http.get(f"/v1/models/{name}")).json()["id"] == name
    missing = await server.http.get("/v1/models/nobody")
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_a_served_name_may_have_slashes(start: Any) -> None:
    async with start(served_model_name="meta/Tiny-1") as server:
        assert (await server.http.get("/v1/models/meta/Tiny-1")).json()["id"] == "meta/Tiny-1"
        assert (await complete(server, model="meta/Tiny-1"))["model"] == "meta/Tiny-1"


async def test_models_tell_what_clients_of_other_servers_read(start: Any, tmp_path: Any) -> None:
    """By `parent` routers find adapters; `root` is no path of this server."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    async with start(model=str(folder)) as server:
        await server.upload("sql")
        answer = await server.http.get("/v1/models")
        base, sql = answer.json()["data"]
        assert (base["id"], base["root"], base["parent"]) == ("my-model", "tiny", None)
        assert (sql["id"], sql["root"], sql["parent"]) == ("sql", "sql", "my-model")
        assert (base["max_model_len"], sql["max_model_len"]) == (128, None)
        assert base["permission"][0]["object"] == "model_permission"
        assert str(tmp_path) not in answer.text

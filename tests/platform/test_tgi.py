"""LoRAX's and TGI's forms, S-LoRA's and SGLang's, over the fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loraplex.engine.api import Grammar, GrammarKind
from loraplex.engine.errors import EngineDead, QueueFull

HI = "hi"


def events(text: str) -> list[dict[str, Any]]:
    found = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data:{") for line in found)
    return [json.loads(line.removeprefix("data:")) for line in found]


async def generate(server: Any, path: str = "/generate", **parameters: Any) -> Any:
    stream = parameters.pop("stream", None)
    body = {"inputs": HI, "parameters": parameters}
    if stream is not None:
        body["stream"] = stream
    answer = await server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


async def test_generate_with_and_without_details(server: Any) -> None:
    server.engine.say, server.engine.end_after = "aé".encode(), 3
    plain = await generate(server, max_new_tokens=9)
    assert plain.json() == {"generated_text": "aé"}
    answer = await generate(server, max_new_tokens=9, details=True, decoder_input_details=True)
    details = answer.json()["details"]
    assert details["finish_reason"] == "eos_token"
    assert (details["prompt_tokens"], details["generated_tokens"]) == (2, 4)
    assert details["seed"] is None
    assert details["best_of_sequences"] is None
    assert [t["text"] for t in details["prefill"]] == ["h", "i"]
    assert details["prefill"][0]["logprob"] is None
    assert isinstance(details["prefill"][1]["logprob"], float)
    assert [t["special"] for t in details["tokens"]] == [False, False, False, True]
    assert {"id", "text", "logprob", "special", "skipped"} == set(details["tokens"][0])


async def test_the_headers_of_an_answer(server: Any) -> None:
    await server.upload("sql")
    answer = await generate(server, max_new_tokens=3, adapter_id="sql")
    headers = answer.headers
    assert headers["x-model-id"] == "tiny"
    assert headers["x-adapter-id"] == "sql@1"
    assert headers["x-adapter-digest"].startswith("sha256:")
    counts = {name: headers[f"x-{name}-tokens"] for name in ("prompt", "generated", "total")}
    assert counts == {"prompt": "2", "generated": "3", "total": "5"}
    assert float(headers["x-compute-time"]) >= 0
    for name in ("total-time", "queue-time", "inference-time", "time-per-token", "validation-time"):
        assert int(headers[f"x-{name}"]) >= 0


async def test_the_root_route_answers_with_a_list_or_a_stream(server: Any) -> None:
    for stream in (None, False):
        answer = await generate(server, "/", max_new_tokens=3, stream=stream)
        assert [set(item) for item in answer.json()] == [{"generated_text"}]
    answer = await generate(server, "/", max_new_tokens=3, stream=True)
    assert len(events(answer.text)) == 3


async def test_a_stream_is_an_event_for_each_token(server: Any) -> None:
    server.engine.say, server.engine.end_after = "aé!".encode(), 4
    answer = await generate(server, "/generate_stream", max_new_tokens=9, return_full_text=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert [event["index"] for event in found] == [1, 2, 3, 4, 5]
    assert "".join(event["token"]["text"] for event in found) == "aé!"
    assert [event["generated_text"] for event in found[:-1]] == [None] * 4
    last = found[-1]
    assert last["generated_text"] == "hiaé!"
    assert last["token"]["special"]
    assert last["details"] == {
        "finish_reason": "eos_token",
        "prompt_tokens": 2,
        "input_length": 2,
        "generated_tokens": 5,
        "seed": None,
    }


async def test_stop_sequences_stay_in_the_text_as_there(server: Any) -> None:
    server.engine.say = b"one. two"
    answer = await generate(server, max_new_tokens=20, stop=[". "], details=True)
    assert answer.json()["generated_text"] == "one. "
    assert answer.json()["details"]["finish_reason"] == "stop_sequence"
    answer = await generate(server, max_new_tokens=2, details=True)
    assert answer.json()["details"]["finish_reason"] == "length"


async def test_sampling_is_greedy_unless_asked_for(server: Any) -> None:
    for parameters, temperature in (
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 5}, 1.0),
    ):
        await generate(server, max_new_tokens=1, **parameters)
        assert server.engine.seen[-1].sampling.temperature == temperature
    answer = await generate(server, max_new_tokens=1, do_sample=True, details=True)
    assert answer.json()["details"]["seed"] == server.engine.seen[-1].sampling.seed
    assert server.engine.seen[-1].sampling.seed is not None


async def test_best_of_gives_the_likeliest_and_the_others(server: Any) -> None:
    answer = await generate(server, max_new_tokens=2, best_of=3, do_sample=True, details=True)
    assert len(server.engine.seen) == 3
    assert len(answer.json()["details"]["best_of_sequences"]) == 2


async def test_alternatives(server: Any) -> None:
    answer = await generate(server, max_new_tokens=2, return_k_alternatives=2, details=True)
    for token in answer.json()["details"]["tokens"]:
        assert len(token["alternative_tokens"]) == 2
    answer = await generate(server, max_new_tokens=2, top_n_tokens=2, details=True)
    assert [len(tokens) for tokens in answer.json()["details"]["top_tokens"]] == [2, 2]


async def test_merged_adapters_are_a_composition(server: Any) -> None:
    for name, alpha in (("a", 8), ("b", 4)):
        await server.upload(name, alpha=alpha)
    merged = {"ids": ["a", "b"], "weights": [0.7, 0.3], "density": 0.0}
    await generate(server, max_new_tokens=1, merged_adapters=merged)
    assert [use.weight for use in server.engine.seen[-1].adapters] == [0.7, 0.3]


async def test_structured_outputs_in_both_forms(server: Any) -> None:
    schema = {"type": "integer"}
    wanted = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "integer"}')
    for parameters in (
        {"response_format": {"type": "json_object", "schema": schema}},
        {"grammar": {"type": "json", "value": schema}},
        {"grammar": {"type": "json", "value": json.dumps(schema)}},
        {"grammar": {"type": "json_schema", "value": {"name": "x", "schema": schema}}},
    ):
        await generate(server, max_new_tokens=1, **parameters)
        assert server.engine.seen[-1].sampling.grammar == wanted
    await generate(server, max_new_tokens=1, grammar={"type": "regex", "value": "a+"})
    assert server.engine.seen[-1].sampling.grammar == Grammar(kind=GrammarKind.REGEX, text="a+")


BAD: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": -1},
    "typical_p": {"typical_p": 0.5},
    "watermark": {"watermark": True},
    "apply_chat_template": {"apply_chat_template": True},
    "best_of": {"best_of": 2},
    "max_new_tokens": {"max_new_tokens": 0},
    "adapter_source": {"adapter_source": "ftp"},
    "ties": {"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "ties"}},
    "weights": {"merged_adapters": {"ids": ["a"], "weights": [1, 2]}},
    "merged_adapters and adapter_id": {
        "adapter_id": "a",
        "merged_adapters": {"ids": ["a"], "weights": [1]},
    },
    "response_format": {"response_format": {"type": "xml"}},
    "structured_outputs": {"grammar": {"type": "regex", "value": ""}},
}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("word", "parameters"), BAD.items(), ids=list(BAD))
async def test_bad_parameters_are_422_by_name(
    server: Any, path: str, word: str, parameters: dict[str, Any]
) -> None:
    answer = await server.http.post(path, json={"inputs": HI, "parameters": parameters})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == "validation"
    assert word in body["error"]
    assert server.engine.seen == []


async def test_other_errors_have_their_forms(server: Any) -> None:
    async def refused(body: Any) -> tuple[int, dict[str, Any]]:
        answer = await server.http.post("/generate", json=body)
        return answer.status_code, answer.json()

    for body in ({}, {"inputs": ""}, {"inputs": 3}, {"inputs": HI, "parameters": 7}):
        assert (await refused(body))[0] == 422
    broken = await server.http.post("/", content="{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error_type"]) == (422, "validation")
    status, error = await refused({"inputs": HI, "parameters": {"adapter_id": "nobody"}})
    assert (status, error["error_type"]) == (404, "not_found")
    assert "nobody" in error["error"]
    server.engine.refuse = QueueFull("full")
    status, error = await refused({"inputs": HI})
    assert (status, error["error_type"]) == (429, "overloaded")
    server.engine.refuse = EngineDead("gone")
    status, error = await refused({"inputs": HI})
    assert (status, error["error_type"]) == (503, "generation")


async def test_an_error_in_a_stream_is_its_last_event(server: Any) -> None:
    server.engine.fail_after = 2
    answer = await generate(server, "/generate_stream", max_new_tokens=9)
    *_, last = events(answer.text)
    assert last == {"error": "the engine process died", "error_type": "generation"}


async def test_info_and_health(server: Any) -> None:
    info = (await server.http.get("/info")).json()
    assert info["model_id"] == "tiny"
    assert info["max_total_tokens"] == info["max_input_length"] + 1
    for path in ("/health", "/ping"):
        answer = await server.http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert set((await server.http.get("/load")).json()) == {"server_load"}
    server.engine.alive = False
    assert (await server.http.get("/health")).status_code == 503


# --- S-LoRA -----------------------------------------------------------------------------------


async def test_slora_is_known_by_its_lora_dir(server: Any) -> None:
    await server.upload("a")
    for adapter, uses in ((None, 0), ("a", 1)):
        body = {
            "model_dir": "m", "lora_dir": adapter, "inputs": HI, "req_id": "1",
            "parameters": {"do_sample": False, "ignore_eos": True, "max_new_tokens": 4},
        }  # fmt: skip
        answer = await server.http.post("/generate", json=body)
        [text] = answer.json()["generated_text"]
        assert len(text) == 4
        assert answer.json()["count_output_tokens"] == 4
        assert len(server.engine.seen[-1].adapters) == uses
        assert server.engine.seen[-1].sampling.ignore_eos
        streamed = await server.http.post("/generate_stream", json=body)
        assert len(events(streamed.text)) == 4


# --- SGLang -----------------------------------------------------------------------------------


async def sglang(server: Any, **body: Any) -> Any:
    answer = await server.http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer


async def test_sglang_is_known_by_its_text(server: Any) -> None:
    await server.upload("a")
    server.engine.say = b"one two"
    answer = await sglang(
        server, text=HI, sampling_params={"max_new_tokens": 3, "temperature": 0}, lora_path="a"
    )
    body = answer.json()
    assert body["text"] == "one"
    assert body["output_ids"] == list(b"one")
    meta = body["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 3, 0)
    assert meta["e2e_latency"] > 0
    assert meta["adapter"]["id"] == "a"
    stopped = await sglang(server, input_ids=list(b"hi"), sampling_params={"stop": " "})
    assert stopped.json()["text"] == "one"
    assert stopped.json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": " "}


async def test_sglang_batches_logprobs_and_streams(server: Any) -> None:
    params = {"max_new_tokens": 2, "temperature": 0}
    batch = await sglang(server, text=["a", "b"], sampling_params=params, lora_path=[None, None])
    assert len(batch.json()) == 2
    several = await sglang(server, text="a", sampling_params={**params, "n": 2})
    assert len(several.json()) == 2
    scored = await sglang(
        server, text="a", sampling_params=params, return_logprob=True, top_logprobs_num=1
    )
    meta = scored.json()["meta_info"]
    assert [len(entry) for entry in meta["output_token_logprobs"]] == [3, 3]
    assert [len(entry) for entry in meta["output_top_logprobs"]] == [1, 1]
    streamed = await sglang(server, text="a", sampling_params=params, stream=True)
    *found, done = streamed.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    texts = [json.loads(event.removeprefix("data: "))["text"] for event in found]
    assert texts[-1].startswith(texts[0])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"text": "a", "input_ids": [1]}, 400, None),
        ({"text": "a", "sampling_params": {"temperature": -1}}, 400, "sampling_params.temperature"),
        ({"text": ["a", "b"], "lora_path": ["a", None]}, 400, "lora_path"),
        ({"text": "a", "lora_path": "nobody"}, 404, "adapter_id"),
        ({"text": "a", "image_data": "x"}, 400, "image_data"),
        ({"input_ids": [99999]}, 400, "prompt"),
    ],
)
async def test_sglang_errors_are_native(
    server: Any, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await server.http.post("/generate", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


async def test_sglang_names_adapters_in_openai_routes(server: Any) -> None:
    await server.upload("a")
    for fields in ({"model": "tiny:a"}, {"lora_path": "a"}, {"model": "tiny", "lora_path": "a"}):
        answer = await server.http.post("/v1/completions", json={"prompt": "x", **fields})
        assert answer.json()["adapter"]["id"] == "a"
    answer = await server.http.post("/v1/completions", json={"prompt": "x", "model": "tiny:b"})
    assert answer.status_code == 404

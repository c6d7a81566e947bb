"""The official client, against a real server on the demo model."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture
def client(demo_server: Any, uploaded: list[str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="unused", max_retries=0)


def base_model(client: openai.OpenAI) -> str:
    return next(m.id for m in client.models.list() if not getattr(m, "parent", None))


def test_models_lists_base_and_adapters_with_their_parent(
    client: openai.OpenAI, uploaded: list[str]
) -> None:
    models = {m.id: m for m in client.models.list()}
    base = base_model(client)
    assert set(uploaded) <= set(models)
    assert all(models[name].parent == base for name in uploaded)  # type: ignore[attr-defined]
    assert client.models.retrieve(uploaded[0]).id == uploaded[0]


def test_completion_of_token_ids_and_of_a_batch(client: openai.OpenAI, uploaded: list[str]) -> None:
    answer = client.completions.create(
        model=base_model(client),
        prompt=["hello", "good morning"],
        max_tokens=5,
        temperature=0,
        n=2,
        seed=1,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    first = client.completions.create(
        model=base_model(client), prompt=[5, 6, 7], max_tokens=3, temperature=0
    )
    assert first.usage is not None
    assert first.usage.prompt_tokens == 3


def test_streams_say_what_the_plain_answer_says(
    client: openai.OpenAI, uploaded: list[str], skills: Any
) -> None:
    for name in uploaded[:3]:
        question = skills[name]["tour"][0]["input"]
        messages: Any = [{"role": "user", "content": question}]
        plain = client.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=32
        )
        stream = client.chat.completions.create(
            model=name,
            messages=messages,
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == plain.choices[0].message.content
        assert chunks[-1].usage is not None
        assert plain.usage is not None
        assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
        finals = [
            c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
        ]
        assert finals == [plain.choices[0].finish_reason]


def test_logprobs(client: openai.OpenAI, uploaded: list[str]) -> None:
    answer = client.chat.completions.create(
        model=base_model(client),
        messages=[{"role": "user", "content": "hello"}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(
            token.top_logprobs[0].logprob
        )  # greedy takes the most likely
        assert token.logprob <= 0


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, uploaded: list[str]) -> None:
    full = client.completions.create(
        model=base_model(client), prompt="hello", max_tokens=24, temperature=0
    )
    text = full.choices[0].text
    assert len(text) > 3
    stop = text[2:4]
    cut = client.completions.create(
        model=base_model(client), prompt="hello", max_tokens=24, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_seeded_sampling_repeats(client: openai.OpenAI, uploaded: list[str]) -> None:
    texts = {
        client.completions.create(
            model=base_model(client), prompt="once", max_tokens=16, temperature=1.0, seed=seed
        )
        .choices[0]
        .text
        for seed in (1, 1, 2, 3, 4)
    }
    assert 2 <= len(texts) <= 4  # equal seeds agree; different seeds do not all agree


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
        },
    },
}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"const": {"a": 1}}}}
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def is_sound(function: Any) -> bool:
    arguments = json.loads(function.arguments)
    if function.name == "add":
        return bool(arguments == {"a": 1})
    assert function.name == "weather"
    return arguments["city"] in ("Rome", "Oslo") and arguments["days"] in (1, 2, 3)


@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_tools_follow_their_schemas_whatever_the_model_would_say(
    client: openai.OpenAI, uploaded: list[str], choice: str
) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    asked: Any = {
        "model": uploaded[0],
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [WEATHER, ADD],
        "tool_choice": named if choice == "named" else "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 120,
        "extra_body": {"chat_template": WITH_TOOLS},
    }
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls or []
    assert is_sound(call.function)  # type: ignore[union-attr]
    if choice == "named":
        assert call.function.name == "weather"  # type: ignore[union-attr]
    text = ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.function is not None
            text += part.function.arguments or ""
    assert text == call.function.arguments  # type: ignore[union-attr]


def test_bad_words_never_come(client: openai.OpenAI, uploaded: list[str]) -> None:
    """The greedy answer, without a piece of itself; the model goes another way."""
    asked: Any = {"model": uploaded[0], "prompt": "hello", "max_tokens": 12, "temperature": 0}
    free = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    for word in (free[1:3], free[2:5], free[:1]):
        more = {"ignore_eos": True, "bad_words": [word]}
        answer = client.completions.create(**asked, extra_body=more).choices[0].text
        assert word not in answer
        assert answer != free
        assert answer


def test_embeddings_of_the_base_and_of_an_adapter(
    client: openai.OpenAI, uploaded: list[str]
) -> None:
    def embed(model: str, texts: list[str], **more: Any) -> list[list[float]]:
        answer = client.embeddings.create(model=model, input=texts, extra_body=more)
        return [item.embedding for item in answer.data]

    texts = ["hello", "good morning to all of you", "hello"]
    base = embed(base_model(client), texts)
    assert base[0] == pytest.approx(base[2], abs=1e-4)
    assert base[0] != pytest.approx(base[1], abs=1e-2)
    assert sum(value * value for value in base[0]) == pytest.approx(1, abs=1e-4)
    adapted = embed(uploaded[0], texts)
    assert adapted[0] != pytest.approx(base[0], abs=1e-2)
    mean = embed(base_model(client), texts, pooling="mean")
    assert mean[1] != pytest.approx(base[1], abs=1e-2)
    cut = client.embeddings.create(model=base_model(client), input="hello", dimensions=8)
    assert len(cut.data[0].embedding) == 8


def test_hugging_faces_client_chats(demo_server: Any, uploaded: list[str]) -> None:
    from huggingface_hub import InferenceClient

    hub = InferenceClient(base_url=demo_server.url, api_key="unused")
    messages = [{"role": "user", "content": "hello"}]
    answer = hub.chat_completion(messages, model=uploaded[0], max_tokens=12, temperature=0)
    text = answer.choices[0].message.content
    assert text
    stream = hub.chat_completion(
        messages, model=uploaded[0], max_tokens=12, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(part or "" for part in parts) == text


def test_errors_are_the_clients_own_classes(client: openai.OpenAI, uploaded: list[str]) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="no-such-adapter", prompt="x", max_tokens=1)
    assert "no-such-adapter" in missing.value.message
    with pytest.raises(openai.BadRequestError) as negative:
        client.completions.create(model=base_model(client), prompt="x", max_tokens=-1)
    assert "max_tokens" in negative.value.message
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=base_model(client), prompt="x " * 5000, max_tokens=1)


async def test_the_async_client_and_a_closed_stream(demo_server: Any, uploaded: list[str]) -> None:
    client = openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="unused", max_retries=0)
    base = (await client.models.list()).data[0].id
    stream = await client.completions.create(
        model=base, prompt="hello", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()  # hanging up must free the sequence at once
    import httpx

    async with httpx.AsyncClient(base_url=demo_server.url) as http:
        for _ in range(200):
            requests = (await http.get("/v1/admin/requests")).json()
            if not requests["data"]:
                break
        else:
            pytest.fail(f"the abandoned request is still there: {requests}")
        memory = (await http.get("/v1/admin/memory")).json()
    assert memory["kv_blocks_used"] == 0
    await client.close()


def test_a_connection_outlives_the_clients_own_patience(demo_server: Any) -> None:
    """httpx and others keep idle connections for 5 s. A server that closes at the same moment
    resets the connection under their next request.
    """
    kept = http.client.HTTPConnection("127.0.0.1", demo_server.port, timeout=10)
    try:
        for pause_s in (0.0, 5.5):
            time.sleep(pause_s)
            kept.request("GET", "/healthz")
            answer = kept.getresponse()
            assert (answer.status, json.loads(answer.read())) == (200, {"status": "ok"})
    finally:
        kept.close()

"""The official client, against a real server on the demo model."""

from __future__ import annotations

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

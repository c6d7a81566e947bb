"""`/v1/embeddings`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest
from openai.types import CreateEmbeddingResponse


async def embed(server: Any, **body: Any) -> Any:
    answer = await server.http.post("/v1/embeddings", json={"input": "ab", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_one_text(server: Any) -> None:
    answer = await embed(server, normalize=False)
    assert CreateEmbeddingResponse.model_validate(answer, strict=True)
    assert answer["id"].startswith("embd-")
    assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": [97, 98, 2, -1]}]
    assert (answer["object"], answer["model"], answer["adapter"]) == ("list", "tiny", None)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 2


@pytest.mark.parametrize("inputs", [["a", "bc", "d"], [[97], [98, 99], [100]]])
async def test_several_inputs_keep_their_order(server: Any, inputs: Any) -> None:
    answer = await embed(server, input=inputs, normalize=False, pooling="mean")
    vectors = [item["embedding"] for item in answer["data"]]
    assert vectors == [[97, 97, 1, 1], [98, 99, 2, 1], [100, 100, 1, 1]]
    assert answer["usage"]["prompt_tokens"] == 4


async def test_many_inputs_do_not_fill_the_engines_queue(server: Any) -> None:
    answer = await embed(server, input=["x"] * 300)
    assert [item["index"] for item in answer["data"]] == list(range(300))
    assert server.engine.running == {}


async def test_vectors_have_length_one_also_when_cut(server: Any) -> None:
    whole = (await embed(server))["data"][0]["embedding"]
    assert math.hypot(*whole) == pytest.approx(1)
    assert whole[0] / whole[1] == pytest.approx(97 / 98)
    cut = (await embed(server, dimensions=2))["data"][0]["embedding"]
    assert len(cut) == 2
    assert math.hypot(*cut) == pytest.approx(1)


async def test_base64_holds_the_same_numbers(server: Any) -> None:
    plain = (await embed(server))["data"][0]["embedding"]
    packed = (await embed(server, encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack("<4f", base64.b64decode(packed))) == pytest.approx(plain)


async def test_an_adapter_embeds(server: Any) -> None:
    digest = (await server.upload("sql"))["digest"]
    for body in ({"model": "sql"}, {"adapter_id": "sql"}):
        answer = await embed(server, **body)
        assert answer["adapter"] == {"id": "sql", "version": 1, "digest": digest}
    assert [use.digest for use in server.engine.seen[-1].adapters] == [digest[7:]]


async def test_bad_values_are_named(server: Any) -> None:
    for param, body in (
        ("input", {"input": []}),
        ("input", {"input": ""}),
        ("input", {"input": [[]]}),
        ("input", {"input": [999]}),
        ("input", {"input": "x" * 500}),
        ("dimensions", {"dimensions": 5}),
        ("dimensions", {"dimensions": 0}),
        ("encoding_format", {"encoding_format": "hex"}),
        ("pooling", {"pooling": "max"}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
    ):
        answer = await server.http.post("/v1/embeddings", json={"input": "ab", **body})
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param, body
    missing = await server.http.post("/v1/embeddings", json={"input": "a", "model": "nobody"})
    assert missing.status_code == 404
    assert server.engine.seen == []


async def test_tokenize(server: Any) -> None:
    async def tokenize(**body: Any) -> Any:
        answer = await server.http.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert await tokenize(model="tiny", prompt="hé", return_token_strs=True) == {
        "count": 3,
        "max_model_len": 128,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    assert (await tokenize(prompt=""))["tokens"] == []
    chat = await tokenize(messages=[{"role": "user", "content": "hi"}])
    assert bytes(chat["tokens"]).decode() == "<user>hi\n<assistant>"
    assert chat["token_strs"] is None
    bare = await tokenize(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert bytes(bare["tokens"]).decode() == "<user>hi\n"
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}):
        assert (await server.http.post("/tokenize", json=body)).status_code == 400
    lost = await server.http.post("/tokenize", json={"prompt": "a", "model": "nobody"})
    assert lost.status_code == 404


async def test_detokenize_gives_the_text_back(server: Any) -> None:
    answer = await server.http.post("/detokenize", json={"tokens": [104, 195, 169, 256]})
    assert answer.json() == {"prompt": "hé<eos>"}
    wrong = await server.http.post("/detokenize", json={"tokens": [999]})
    assert wrong.json()["error"]["param"] == "tokens"

"""Chats with tools and reasoning, whole and streamed, by HTTP and by OpenAI's own types."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if not think %}{# <think></think> #}{% endif %}"
)
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 12, "b": "é"}}</tool_call>'


@pytest.fixture
async def talker(start: Any, fake_engine_module: Any) -> AsyncIterator[Any]:
    fakes = fake_engine_module
    info = fakes.model_info(chat_template=TEMPLATE, max_model_len=2048)
    async with start(fakes.FakeEngine(info)) as server:
        yield server


async def say(server: Any, text: str, **body: Any) -> Any:
    server.engine.say = text.encode()
    server.engine.end_after = len(server.engine.say)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 500, **body}
    answer = await server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        ChatCompletion.model_validate(answer.json(), strict=True)
        return answer.json()
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    for event in events[:-2]:
        ChatCompletionChunk.model_validate(json.loads(event), strict=True)
    return [json.loads(event) for event in events[:-2]]


async def test_a_tool_call(talker: Any) -> None:
    answer = await say(talker, "I add. " + CALL, tools=[ADD])
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I add. "
    [call] = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 12, "b": "é"}
    prompt = bytes(talker.engine.seen[0].prompt_token_ids).decode()
    assert prompt == "[add]<tool_call><user>hi<assistant>"
    silent = await say(talker, CALL, tools=[ADD])
    assert silent["choices"][0]["message"]["content"] is None


async def test_a_streamed_tool_call(talker: Any) -> None:
    chunks = await say(
        talker, CALL + CALL, tools=[ADD], stream=True, stream_options={"include_usage": True}
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    names = [part["function"]["name"] for part in parts if "name" in part["function"]]
    assert names == ["add", "add"]
    for index in (0, 1):
        pieces = [p["function"]["arguments"] for p in parts if p["index"] == index]
        assert len(pieces) > 10  # they come as they are made
        assert json.loads("".join(pieces)) == {"a": 12, "b": "é"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(CALL.encode()) + 1


async def test_tool_choice_and_parallel_calls(talker: Any) -> None:
    none = await say(talker, CALL, tools=[ADD], tool_choice="none")
    assert none["choices"][0]["message"]["content"] == CALL
    assert none["choices"][0]["finish_reason"] == "stop"
    assert b"add" not in bytes(talker.engine.seen[0].prompt_token_ids)
    one = await say(talker, CALL + CALL, tools=[ADD], parallel_tool_calls=False)
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1


PAY = {
    "type": "function",
    "function": {
        "name": "pay",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/who"}, "$ref": {"type": "null"}},
            "$defs": {"who": {"type": "string"}},
        },
    },
}


def schema_of(server: Any) -> Any:
    grammar = server.engine.seen[-1].sampling.grammar
    assert grammar.kind == "json_schema"
    return json.loads(grammar.text)


async def test_required_calls_follow_a_schema_of_all_tools(talker: Any) -> None:
    said = '[{"name": "add", "arguments": {"a": 1}}, {"name": "pay", "arguments": {}}]'
    answer = await say(talker, said, tools=[ADD, PAY], tool_choice="required")
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = [c["function"] for c in choice["message"]["tool_calls"]]
    assert calls == [
        {"name": "add", "arguments": '{"a": 1}'},
        {"name": "pay", "arguments": "{}"},
    ]
    schema = schema_of(talker)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    add, pay = schema["items"]["anyOf"]
    assert add["properties"]["name"] == {"const": "add"}
    assert add["properties"]["arguments"] == ADD["function"]["parameters"]  # type: ignore[index]
    assert pay["properties"]["arguments"] == {"$ref": "#/$defs/tool1"}
    moved = schema["$defs"]["tool1"]["properties"]
    assert moved == {"to": {"$ref": "#/$defs/tool1/$defs/who"}, "$ref": {"type": "null"}}
    one = '{"name": "add", "arguments": {"a": 1}}'
    body = {"tools": [ADD, PAY], "tool_choice": "required", "parallel_tool_calls": False}
    answer = await say(talker, one, **body)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert "anyOf" in schema_of(talker)


async def test_a_named_tool_is_called_once(talker: Any) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    said = '{"name": "add", "arguments": {"a": 1}}'
    chunks = await say(talker, said, tools=[ADD, PAY], tool_choice=named, stream=True)
    parts = [
        call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert parts[0]["function"]["name"] == "add"
    assert "".join(part["function"]["arguments"] for part in parts) == '{"a": 1}'
    assert schema_of(talker)["properties"]["name"] == {"const": "add"}
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [ADD],
        "tool_choice": "required",
        "response_format": {"type": "json_object"},
    }
    both = await talker.http.post("/v1/chat/completions", json=body)
    assert (both.status_code, both.json()["error"]["param"]) == (400, "tool_choice")


async def test_a_structured_answer_is_no_thought(talker: Any) -> None:
    body = {"chat_template": "<think></think><think>", "response_format": {"type": "json_object"}}
    answer = await say(talker, '{"a": 1}', **body)
    assert answer["choices"][0]["message"]["content"] == '{"a": 1}'


async def test_a_malformed_call_is_content(talker: Any) -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>'
    answer = await say(talker, text, tools=[ADD])
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": text,
        "tool_calls": [],
        "reasoning_content": None,
    }
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = await say(talker, text, tools=[ADD], stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == text


async def test_the_history_of_a_call_reaches_the_template(talker: Any) -> None:
    messages = [
        {"role": "developer", "content": "be nice"},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 7}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "seven"},
    ]
    await say(talker, "ok", messages=messages, tools=[ADD])
    prompt = bytes(talker.engine.seen[0].prompt_token_ids).decode()
    assert prompt == (
        "[add]<tool_call><system>be nice<user>1\n2<assistant>add(7)<tool>seven<assistant>"
    )


async def test_reasoning_whole_and_streamed(talker: Any) -> None:
    text = "<think>\nhm. so\n</think>\n\nYes."
    answer = await say(talker, text)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm. so", "Yes.")
    hidden = await say(talker, text, include_reasoning=False)
    assert "reasoning_content" not in hidden["choices"][0]["message"]
    chunks = await say(talker, text, stream=True, n=2, logprobs=True)
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm. so"
        assert "".join(d.get("content", "") for d in deltas) == "Yes."
    tokens = [
        entry["token"]
        for chunk in chunks
        if chunk["choices"][0]["index"] == 0 and chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert "".join(tokens) == text + "<eos>"  # log-probabilities are of all tokens


async def test_a_prompt_that_begins_the_thoughts(talker: Any) -> None:
    template = TEMPLATE + "{% if think %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    body = {"chat_template": template, "chat_template_kwargs": {"think": True}}
    answer = await say(talker, "hm</think>Yes.", **body)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")
    answer = await say(talker, "No thoughts</think>.", chat_template=template)
    assert answer["choices"][0]["message"]["content"] == "No thoughts</think>."


async def test_an_answer_that_goes_on_may_be_echoed(talker: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The "}]
    body = {"messages": messages, "continue_final_message": True, "echo": True}
    answer = await say(talker, "end", **body)
    assert answer["choices"][0]["message"]["content"] == "The end"
    chunks = await say(talker, "end", stream=True, **body)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "The end"

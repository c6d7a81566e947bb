"""The load generator: what it reads from a stream, what it measures, what it sends, what `bench
serve` prints.
"""

from __future__ import annotations

import json
import threading
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.platform.bench import measure
from loraplex.platform.bench.loadgen import LoadGenerator, StreamReader, completions_url
from loraplex.platform.bench.measure import RequestRecord, summarize
from loraplex.platform.bench.workload import PlannedRequest


def event(text: str = "", **more: Any) -> bytes:
    body = {"id": "c", "choices": [{"index": 0, "text": text}], "usage": None, **more}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def answer(tokens: int) -> list[bytes]:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens}
    return [
        *(event(f" t{i}") for i in range(tokens)),
        event(choices=[], usage=usage),
        b"data: [DONE]\n\n",
    ]


def read(*pieces: bytes) -> RequestRecord:
    record = RequestRecord(None, 0.0)
    clock = count(1)
    reader = StreamReader(record, lambda: float(next(clock)))
    for piece in pieces:
        reader.feed(piece)
    reader.finish()
    return record


@given(st.data())
def test_a_stream_reads_the_same_however_it_is_cut(data: Any) -> None:
    whole = b"".join(answer(7))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=12)))
    bounds = [0, *cuts, len(whole)]
    record = read(*(whole[a:b] for a, b in pairwise(bounds)))
    assert record.error is None
    assert record.output_tokens == 7
    assert len(record.token_times) == 7
    assert record.token_times == sorted(record.token_times)


def test_an_event_is_stamped_when_its_end_arrives() -> None:
    first, second, *rest = answer(2)
    record = read(first[:-1], first[-1:] + second[:9], second[9:], *rest)
    assert record.token_times == [1.0, 2.0]


def test_events_without_text_are_no_tokens() -> None:
    record = read(event(), event("a"), event(), *answer(0))
    assert record.token_times == [1.0]


def test_spaced_json_and_crlf_are_read_too() -> None:
    body = {"choices": [{"text": "hi"}], "usage": {"completion_tokens": 3}}
    record = read(b"data: " + json.dumps(body).encode() + b"\r\n\r\n", b"data: [DONE]\r\n\r\n")
    assert (len(record.token_times), record.output_tokens, record.error) == (1, 3, None)


def test_without_usage_events_are_counted() -> None:
    assert read(event("a"), event("b"), b"data: [DONE]\n\n").output_tokens == 2


def test_quotes_in_the_text_do_not_confuse() -> None:
    record = read(event('say "text":"x" twice'), *answer(0)[-1:])
    assert len(record.token_times) == 1


def test_an_error_event_and_a_cut_stream_are_errors() -> None:
    assert read(event("a"), b'data: {"error":{"message":"died"}}\n\n').error == "died"
    assert read(event("a")).error == "stream ended without [DONE]"


# --- figures ---


def test_summary_by_hand() -> None:
    records = [
        RequestRecord("a", 10.0, [10.5, 10.6, 10.8], 3, 11.0),
        RequestRecord("b", 10.2, [11.2, 11.4], 2, 12.0),
        RequestRecord("b", 10.0, [], 0, 10.1, error="HTTP 503: away"),
    ]
    s = summarize(records)
    assert (s.requests, s.errors, s.output_tokens) == (3, 1, 5)
    assert s.duration_s == pytest.approx(2.0)
    assert s.output_tok_s == pytest.approx(2.5)
    assert s.req_s == pytest.approx(1.0)
    assert s.ttft_p50_ms == pytest.approx(750)
    assert s.itl_p50_ms == pytest.approx(200)  # gaps 100, 200, 200
    assert s.e2e_p99_ms == pytest.approx(1000 + 0.99 * 800)
    assert s.error_messages == {"HTTP 503: away": 1}
    assert json.dumps(s.as_dict())


def test_nothing_measured_is_none_not_zero() -> None:
    s = summarize([RequestRecord(None, 1.0, [], 0, 2.0, error="x")])
    assert (s.ttft_p50_ms, s.itl_p99_ms, s.output_tok_s) == (None, None, 0.0)
    assert summarize([]).requests == 0
    assert measure.percentile_ms([0.001, 0.003], 50) == pytest.approx(2.0)


# --- against a server ---


async def test_what_is_sent(stub: Any) -> None:
    stub.routes["POST /v1/completions"] = lambda asked: (200, answer(asked.json["max_tokens"]))
    plan = [PlannedRequest(None, 2, 3), PlannedRequest(0, 2, 4), PlannedRequest(1, 2, 5)]
    generator = LoadGenerator(stub.url, "base", ["sql", "fr"], api_key="key", concurrency=1)
    records = await generator.run(plan, [[5, 6], [7, 8], [9, 10]])
    assert [r.error for r in records] == [None] * 3
    assert [r.output_tokens for r in records] == [3, 4, 5]
    assert [r.adapter for r in records] == [None, "sql", "fr"]
    bodies = [asked.json for asked in stub.asked]
    assert [b["model"] for b in bodies] == ["base", "sql", "fr"]
    assert bodies[1] == {
        "model": "sql",
        "prompt": [7, 8],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert {k.lower(): v for k, v in stub.asked[0].headers.items()}["authorization"] == "Bearer key"


async def test_concurrency_is_a_limit_that_is_used(stub: Any) -> None:
    lock, full = threading.Lock(), threading.Barrier(4, timeout=10)
    now, most = 0, 0

    def reply(asked: Any) -> tuple[int, Any]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        full.wait()  # goes on only when four are here at once
        with lock:
            now -= 1
        return 200, answer(1)

    stub.routes["POST /v1/completions"] = reply
    generator = LoadGenerator(stub.url, "base", concurrency=4)
    records = await generator.run([PlannedRequest(None, 1, 1)] * 12, [[1]] * 12)
    assert [r.error for r in records] == [None] * 12
    assert most == 4


async def test_failures_are_records(stub: Any) -> None:
    replies = iter(
        [(404, {"error": {"message": "no model"}}), (500, b"oops"), (200, answer(1)[:1])]
    )
    stub.routes["POST /v1/completions"] = lambda asked: next(replies)
    seen: list[RequestRecord] = []
    generator = LoadGenerator(stub.url, "base", concurrency=1)
    records = await generator.run([PlannedRequest(None, 1, 1)] * 3, [[1]] * 3, seen.append)
    assert [r.error for r in records] == [
        "HTTP 404: no model", "HTTP 500: oops", "stream ended without [DONE]",
    ]  # fmt: skip
    assert seen == records
    nobody = await LoadGenerator("http://127.0.0.1:9", "base").run(
        [PlannedRequest(None, 1, 1)], [[1]]
    )
    assert "ClientConnectorError" in str(nobody[0].error)


async def test_open_loop_counts_from_the_arrival(stub: Any) -> None:
    """A request that waits for room has been waiting for its user all the time."""
    stub.routes["POST /v1/completions"] = (200, answer(1))
    plan = [PlannedRequest(None, 1, 1, start_s=s) for s in (0.01, 0.02, 0.03)]
    records = await LoadGenerator(stub.url, "base", concurrency=1).run(plan, [[1]] * 3)
    starts = [r.start_s for r in records]
    assert starts[1] - starts[0] == pytest.approx(0.01)
    assert starts[2] - starts[1] == pytest.approx(0.01)


def test_urls() -> None:
    expected = "http://x/v1/completions"
    assert {completions_url(u) for u in ("http://x", "http://x/", "http://x/v1")} == {expected}


# --- the command ---


@pytest.fixture
def server(stub: Any) -> Any:
    stub.routes["GET /v1/models"] = (200, {"data": [{"id": "the-base", "parent": None}]})
    stub.routes["POST /v1/completions"] = lambda asked: (200, answer(asked.json["max_tokens"]))
    return stub


def completions(stub: Any) -> list[Any]:
    return [a.json for a in stub.asked if a.path == "/v1/completions"]


def test_bench_serve_prints_a_table_and_a_json_line(cli: Any, server: Any) -> None:
    done = cli(
        *("bench", "serve", "--base-url", server.url, "--adapters", "a,b", "--num-requests", 9),
        *("--concurrency", 3, "--prompt-len", 5, "--output-len", 4, "--warmup", 0),
    )
    assert done.exit_code == 0, done.stderr
    assert "output tok/s" in done.stdout
    line = done.json
    assert (line["bench"], line["model"], line["popularity"]) == ("serve", "the-base", "uniform")
    assert (line["requests"], line["errors"], line["output_tokens"]) == (9, 0, 36)
    assert line["num_adapters"] == 2
    assert line["machine"]["versions"]["loraplex"]
    sent = completions(server)
    assert sorted(b["model"] for b in sent) == ["a"] * 6 + ["b"] * 3  # groups 3, 3, 3 over a, b, a
    assert {len(b["prompt"]) for b in sent} == {5}


def test_prompts_are_new_each_time_unless_seeded(cli: Any, server: Any) -> None:
    flags = ("bench", "serve", "--base-url", server.url, "--num-requests", 1, "--warmup", 0)
    for more in ((), (), ("--seed", 1), ("--seed", 1)):
        cli(*flags, *more, "--json")
    first, second, third, fourth = (tuple(b["prompt"]) for b in completions(server))
    assert first != second
    assert third == fourth


def test_warm_up_is_sent_and_not_measured(cli: Any, server: Any) -> None:
    done = cli(
        *("bench", "serve", "--base-url", server.url, "--num-requests", 4, "--warmup", 3, "--json"),
    )
    assert done.json["requests"] == 4
    assert [b["max_tokens"] for b in completions(server)][:3] == [2, 2, 2]
    assert len(completions(server)) == 7


def test_the_slora_trace(cli: Any, server: Any) -> None:
    done = cli(
        *("bench", "serve", "--base-url", server.url, "--adapters", "a,b,c", "--trace", "slora"),
        *("--rate", 100, "--duration", 0.2, "--alpha", 0.3, "--cv", 1.5, "--warmup", 0),
        *("--prompt-len", "2:6", "--output-len", "1:4", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.json["requests"] == 20
    assert (done.json["trace"], done.json["alpha"], done.json["cv"]) == ("slora", 0.3, 1.5)
    assert {len(b["prompt"]) for b in completions(server)} <= {2, 3, 4, 5}


def test_failed_requests_make_status_1(cli: Any, server: Any) -> None:
    server.routes["POST /v1/completions"] = (503, {"error": {"message": "away"}})
    done = cli("bench", "serve", "--base-url", server.url, "--num-requests", 2, "--warmup", 0)
    assert done.exit_code == 1
    assert done.json["error_messages"] == {"HTTP 503: away": 2}
    assert done.stderr == "error: 2 of 2 requests failed\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--popularity", "zipf", "--adapters", "a"],
        ["--popularity", "uniform"],
        ["--prompt-len", "x"],
        ["--prompt-len", "9:8"],
        ["--prompt-len", "2:8"],
        ["--trace", "azure", "--adapters", "a"],
        ["--trace", "slora"],
        ["--upload", "2"],
    ],
)
def test_wrong_bench_flags_end_with_2(cli: Any, server: Any, flags: list[str]) -> None:
    done = cli("bench", "serve", "--base-url", server.url, *flags)
    assert done.exit_code == 2, done.stdout
    assert len(done.stderr.splitlines()) == 1

"""Metrics that a Prometheus can read, series that stay few, and logs that hold no prompts."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex.platform import telemetry
from loraplex.platform.adapter_series import AdapterSeries
from loraplex.platform.histogram import Histogram


async def scrape(server: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = await server.http.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Any, name: str, **labels: str) -> float:
    found = [
        v for (n, have), v in samples.items() if n == name and labels.items() <= dict(have).items()
    ]
    assert len(found) == 1, (name, labels, found)
    result: float = found[0]
    return result


async def test_requests_are_counted(server: Any) -> None:
    await server.upload("sql")
    for body in ({"adapter_id": "sql"}, {"adapter_id": "sql", "stream": True}, {"max_tokens": 3}):
        answer = await server.http.post("/v1/completions", json={"prompt": "xyz", **body})
        assert answer.status_code == 200
    samples = await scrape(server)
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 3
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert value(samples, f"vllm:{name}_count") == 3
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 15 + 15 + 2
    assert value(samples, "vllm:request_prompt_tokens_sum") == 9
    assert value(samples, "vllm:request_generation_tokens_sum") == 16 + 16 + 3
    assert value(samples, "vllm:request_params_max_tokens_count") == 1
    assert value(samples, "loraplex:adapter_requests_total", adapter="sql") == 2
    assert value(samples, "loraplex:adapter_generation_tokens_total", adapter="sql") == 32
    assert value(samples, "loraplex:adapter_loads_total", adapter="sql") == 1
    assert value(samples, "loraplex:adapter_time_to_first_token_seconds_count", adapter="sql") == 2


async def test_every_version_has_series_of_its_own(server: Any) -> None:
    for alpha in (8, 16):
        await server.upload("sql", alpha=alpha)
    server.engine.fail_after = 3
    failed = {"prompt": "x", "adapter_id": "sql@2", "stream": True}
    await server.http.post("/v1/completions", json=failed)
    server.engine.fail_after = None
    for version, times in ((1, 2), (2, 1)):
        for _ in range(times):
            body = {"prompt": "x", "adapter_id": f"sql@{version}", "max_tokens": 2}
            await server.http.post("/v1/completions", json=body)
    samples = await scrape(server)
    for version, requests, errors, tokens in (("1", 2, 0, 4), ("2", 2, 1, 3 + 2)):
        mine = {"adapter": "sql", "version": version}
        assert value(samples, "loraplex:adapter_requests_total", **mine) == requests
        assert value(samples, "loraplex:adapter_errors_total", **mine) == errors
        assert value(samples, "loraplex:adapter_generation_tokens_total", **mine) == tokens
        good = value(samples, "loraplex:adapter_e2e_request_latency_seconds_count", **mine)
        assert good == requests - errors
        assert value(samples, "loraplex:adapter_loads_total", **mine) == 1


async def test_the_engines_figures_have_vllms_names(server: Any) -> None:
    await server.upload("sql")
    await server.http.post("/v1/completions", json={"prompt": "x", "adapter_id": "sql"})
    samples = await scrape(server)
    assert value(samples, "vllm:num_requests_running", model_name="tiny", engine="0") == 0
    assert value(samples, "vllm:num_requests_waiting") == 3
    assert value(samples, "vllm:num_requests_waiting_by_reason", reason="deferred") == 2
    assert value(samples, "vllm:num_requests_waiting_by_reason", reason="capacity") == 1
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.25
    assert value(samples, "vllm:num_preemptions_total") == 4
    assert value(samples, "vllm:prefix_cache_hits_total") == 40
    assert value(samples, "vllm:num_gpu_loaded_lora_adapters") == 1
    assert value(samples, "vllm:lora_adapter_loaded", adapter_name="sql", level="gpu") == 1
    assert value(samples, "vllm:lora_requests_info", max_lora="10") > 1e9
    assert value(samples, "vllm:cache_config_info", block_size="16") == 1
    assert value(samples, "loraplex:ready") == 1


async def test_a_scrape_without_an_engine_still_works(server: Any) -> None:
    server.engine.alive = False
    samples = await scrape(server)
    assert value(samples, "loraplex:ready") == 0
    assert not any(name == "vllm:num_requests_running" for name, _ in samples)


async def test_aborted_requests_are_counted_once(server: Any) -> None:
    server.engine.fail_after = 2
    await server.http.post("/v1/completions", json={"prompt": "x", "stream": True})
    samples = await scrape(server)
    assert value(samples, "vllm:request_success_total", finished_reason="error") == 1


def test_a_histogram_counts_like_prometheus() -> None:
    from prometheus_client.metrics_core import HistogramMetricFamily

    histogram = Histogram((1, 5))
    for observed in (0.5, 1, 3, 7):
        histogram.observe(observed)
    histogram.observe(4, count=2)
    family = HistogramMetricFamily("h", "", labels=["a"])
    histogram.add_to(family, ["x"])
    assert {(s.name, s.labels.get("le")): s.value for s in family.samples} == {
        ("h_bucket", "1.0"): 2,
        ("h_bucket", "5.0"): 5,
        ("h_bucket", "+Inf"): 6,
        ("h_count", None): 6,
        ("h_sum", None): 19.5,
    }


def test_the_busiest_adapters_have_series_of_their_own() -> None:
    series = AdapterSeries(max_named=2)

    def use(name: str, times: int = 1) -> None:
        for _ in range(times):
            series.of((name, "1")).requests += 1

    use("a", 5)
    use("b", 2)
    use("c", 2)  # no busier than b: counted with the others
    assert {name: s.requests for (name, _), s in series} == {"a": 5, "b": 2, "other": 2}
    use("c")  # its third use takes b's place
    counts = {name: s.requests for (name, _), s in series}
    assert counts == {"a": 5, "c": 1, "other": 4}
    for i in range(1000):
        use(f"adapter-{i}")
        series.of(("a", str(i + 2))).requests += 1  # versions count as much as names
    assert len(list(series)) == 3
    assert sum(s.requests for _, s in series) == 2010


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`setup_logging` with its output in a string; the root logger is put back afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    out = io.StringIO()

    def setup(fmt: Any, level: str = "info") -> io.StringIO:
        telemetry.setup_logging(level, fmt)
        handler = root.handlers[0]
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(out)
        return out

    yield setup
    root.handlers[:], level = before
    root.setLevel(level)


async def test_one_json_line_per_request_without_its_text(server: Any, captured: Any) -> None:
    await server.upload("sql")
    out = captured("json")
    await server.http.post(
        "/v1/completions", json={"prompt": "my secret prompt", "adapter_id": "sql", "max_tokens": 4}
    )
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    (line,) = (line for line in lines if line["event"] == "request")
    assert (line["adapter"], line["prompt_tokens"], line["output_tokens"]) == ("sql@1", 16, 4)
    assert (line["outcome"], line["level"]) == ("length", "info")
    assert line["request_id"].startswith("cmpl-")
    assert "secret" not in out.getvalue()


async def test_text_logs_show_fields_and_tracebacks(captured: Any) -> None:
    out = captured("text", "warning")
    logging.getLogger("loraplex.x").info("quiet")
    logging.getLogger("loraplex.x").warning("event", extra={"adapter": "sql@1", "bytes": 3})
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("loraplex.x").exception("failed")
    text = out.getvalue()
    assert "quiet" not in text
    assert "WARNING event adapter=sql@1 bytes=3" in text
    assert "ValueError: broken" in text


async def test_usage_that_cannot_be_written_is_kept(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    await server.upload("sql")
    meter = server.runtime.usage
    await server.http.post("/v1/completions", json={"prompt": "x", "adapter_id": "sql"})
    with monkeypatch.context() as patch:

        def locked() -> Any:
            raise OperationalError("update", {}, Exception("database is locked"))

        patch.setattr(server.runtime.db, "unit_of_work", locked)
        await meter.flush()
    await meter.flush()
    detail = (await server.http.get("/v1/adapters/sql")).json()
    assert (detail["num_requests"], detail["num_generated_tokens"]) == (1, 16)


async def test_an_idle_server_does_nothing(server: Any) -> None:
    """No timers: nothing but the engine and usage tasks exists, and both wait."""
    before = server.runtime.usage
    await asyncio.sleep(0)
    assert not before._dirty.is_set()

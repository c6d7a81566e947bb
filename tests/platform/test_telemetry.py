"""Metrics that a Prometheus can read, series that stay few, and logs that hold no prompts."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex.engine.api import AdapterEvent, AdapterState, Stats
from loraplex.engine.recovery import Supervision
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
    assert value(samples, "vllm:max_gpu_lora_adapters") == 10
    assert value(samples, "vllm:lora_requests_info", max_lora="10") > 1e9
    assert value(samples, "vllm:engine_sleep_state", sleep_state="awake") == 1
    assert value(samples, "vllm:engine_sleep_state", sleep_state="discard_all") == 0
    assert value(samples, "vllm:iteration_tokens_total_sum") == 150
    for bound, steps in (("1.0", 2), ("8.0", 7), ("32.0", 10), ("+Inf", 10)):
        assert value(samples, "vllm:iteration_tokens_total_bucket", le=bound) == steps
    assert value(samples, "loraplex:adapter_load_joins_total") == 6
    assert value(samples, "loraplex:adapter_refusals_total") == 7
    assert value(samples, "vllm:cache_config_info", block_size="16") == 1
    assert value(samples, "loraplex:ready") == 1


def change(digest: str, before: str, after: str, seconds: float, **more: Any) -> AdapterEvent:
    return AdapterEvent(
        digest, AdapterState(before), AdapterState(after), seconds, time.time(), **more
    )


async def test_changes_of_residency_are_counted_and_logged(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "loraplex.residency")
    phases = {"queue": 0.5, "read": 2.0, "copy": 0.25}
    for event in (
        change("a" * 64, "absent", "host_loading", 600.0),
        change("a" * 64, "device_loading", "device", 0.25, phases=phases),
        change("a" * 64, "device", "draining", 9.0, detail="makes room for b"),
        change("a" * 64, "draining", "host", 0.05, reason="room"),
        change("a" * 64, "host", "absent", 1.0),
        change("b" * 64, "host_loading", "failed", 1.0, detail="broken", reason="adapter_corrupt"),
    ):
        server.engine.tell(event)
    server.engine.tell(Stats(await server.engine.stats()))
    samples = await scrape(server)
    drained = {"before": "draining", "after": "host"}
    assert value(samples, "loraplex:adapter_state_seconds_count", **drained) == 1
    assert value(samples, "loraplex:adapter_state_seconds_sum", **drained) == 0.05
    assert value(samples, "vllm:lora_adapter_load_seconds_count") == 1
    assert value(samples, "vllm:lora_adapter_load_seconds_sum") == 2.75
    for phase, seconds in phases.items():
        name = "loraplex:adapter_load_phase_seconds_sum"
        assert value(samples, name, phase=phase) == seconds
    assert value(samples, "loraplex:adapter_evictions_total", reason="room") == 1
    assert value(samples, "loraplex:adapter_load_failures_total", code="adapter_corrupt") == 1
    logged = [(r.levelname, r.after) for r in caplog.records if r.msg == "adapter_state"]  # type: ignore[attr-defined]
    assert logged == [
        ("DEBUG", "host_loading"),
        ("INFO", "device"),
        ("INFO", "draining"),
        ("INFO", "host"),
        ("DEBUG", "absent"),
        ("WARNING", "failed"),
    ]


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
    assert line["answer_id"].startswith("cmpl-")
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


async def test_restarts_and_resumed_requests_are_counted(server: Any) -> None:
    server.engine.supervision = Supervision(3, 40, {"d" * 64: "two requests killed engines"})
    text = (await server.http.get("/metrics")).text
    labels = '{engine="0",model_name="tiny"}'
    assert f"loraplex:engine_restarts_total{labels} 3.0" in text
    assert f"loraplex:requests_resumed_total{labels} 40.0" in text
    assert f"loraplex:adapters_quarantined{labels} 1.0" in text

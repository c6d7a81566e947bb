"""Traces: a span per request with what it was, and no text; nothing at all unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Kept(SpanExporter):
    spans: list[ReadableSpan]

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS


async def test_without_an_endpoint_nothing_is_traced(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    async with start() as server:
        assert server.runtime.tracing is None
        assert (await server.http.get("/v1/models")).status_code == 200


async def test_a_request_is_a_span_below_its_callers(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(trace_exporter, "OTLPSpanExporter", Kept)
    Kept.spans = []
    async with start() as server:
        await server.upload("sql")
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "job-17"}
        body = {"prompt": "zanzibar", "max_tokens": 3, "adapter_id": "sql", "stream": True}
        await server.http.post("/v1/completions", json=body, headers=headers)
        server.engine.fail_after = 0
        await server.http.post("/v1/completions", json=body)
    by_name = {}
    for span in Kept.spans:
        by_name.setdefault(span.name, []).append(span)
    assert set(by_name) == {"POST /v1/adapters", "POST /v1/completions"}
    span, failed = by_name["POST /v1/completions"]
    assert span.attributes is not None
    facts = dict(span.attributes)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert facts["http.response.status_code"] == 200
    assert facts["loraplex.adapters"] == "sql"
    assert facts["loraplex.request_id"] == "job-17"
    assert facts["loraplex.outcome"] == "length"
    assert facts["gen_ai.usage.output_tokens"] == 3
    assert "zanzibar" not in str([dict(s.attributes or {}) for s in Kept.spans])
    assert dict(failed.attributes or {})["http.response.status_code"] == 503
    assert not failed.status.is_ok

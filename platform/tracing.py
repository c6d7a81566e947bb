"""Traces of requests by OpenTelemetry, where its own variables name a collector
(`OTEL_EXPORTER_OTLP_ENDPOINT`) and the extra `otel` is installed; else nothing, at no cost.

A span per request, below the caller's `traceparent`: route, status, tenant, adapters, tokens. Never
a text.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.platform.callers import Caller

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

log = logging.getLogger(__name__)


def tracer_provider() -> TracerProvider | None:
    """None: nothing is to be traced. Its exporter works in a thread of its own."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(
            "tracing_unavailable", extra={"reason": "it takes `pip install loraplex[otel]`"}
        )
        return None
    name = os.environ.get("OTEL_SERVICE_NAME", "loraplex")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


async def close(provider: TracerProvider | None) -> None:
    """Send what is left; gives up after a few seconds."""
    if provider is not None:
        await asyncio.to_thread(provider.shutdown)


class TracingMiddleware:
    """Behind AdmissionMiddleware: what was let in is traced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        provider: TracerProvider | None = None
        if scope["type"] == "http" and "caller" in scope.get("state", {}):
            provider = scope["app"].state.runtime.tracing
        if provider is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        caller: Caller = scope["state"]["caller"]
        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        tracer = provider.get_tracer("loraplex")
        span = tracer.start_span(scope["method"], context=parent, kind=SpanKind.SERVER)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", None)
            span.update_name(f"{scope['method']} {route or 'unknown route'}")
            facts = {} if caller.lease is None else caller.lease.facts
            span.set_attributes(
                {
                    "http.request.method": scope["method"],
                    "http.route": route or "",
                    "loraplex.request_id": scope["state"].get("request_id", ""),
                    "loraplex.tenant": caller.billed,
                    "loraplex.key_id": caller.key_id,
                    **facts,
                }
            )
            span.end()

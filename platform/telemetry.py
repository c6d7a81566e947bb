"""Metrics of one server, in a registry of its own, and the set-up of its logs.

Request figures are plain counters and histograms touched once per request; engine figures come with
the engine's snapshot at scrape time. Names: `vllm:` ones as vLLM exposes them (routers and
dashboards know them), `loraplex:` ours.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from loraplex.engine.api import AdapterResidencyInfo, AdapterState, EngineStats, MemoryInfo
from loraplex.platform.adapter_series import AdapterSeries
from loraplex.platform.histogram import Histogram
from loraplex.platform.inference import Prepared

log = logging.getLogger("loraplex.request")

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTERVAL = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_DURATION = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20)

_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Time to the first token.", _TTFT),
    "inter_token_latency_seconds": ("Time between two tokens of a request.", _INTERVAL),
    "request_time_per_output_token_seconds": ("Mean time per token after the first.", _INTERVAL),
    "e2e_request_latency_seconds": ("Time from request to last token.", _DURATION),
    "request_queue_time_seconds": ("Time waiting to be scheduled.", _DURATION),
    "request_inference_time_seconds": ("Time from being scheduled to last token.", _DURATION),
    "request_prefill_time_seconds": ("Time from being scheduled to first token.", _DURATION),
    "request_decode_time_seconds": ("Time from first to last token.", _DURATION),
    "request_prompt_tokens": ("Prompt tokens per request.", _TOKENS),
    "request_generation_tokens": ("Output tokens per request.", _TOKENS),
    "request_params_n": ("The parameter n.", _CHOICES),
    "request_params_max_tokens": ("The parameter max_tokens.", _TOKENS),
}


class RequestMetrics:
    """What the API process itself sees of requests. One call per request, from the event loop's
    thread.
    """

    def __init__(self) -> None:
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.finished: dict[str, int] = {}
        self.rejections = 0
        self.adapters = AdapterSeries()

    def record(self, prepared: Prepared, outcome: str) -> None:
        generation, timing = prepared.generation, prepared.generation.timing
        self.finished[outcome] = self.finished.get(outcome, 0) + 1
        seen = self.histograms
        now = time.perf_counter()
        ttft = None
        if timing.first_token is not None and timing.last_token is not None:
            ttft = timing.first_token - timing.started
            queued = min(generation.queue_s, ttft)
            decode = timing.last_token - timing.first_token
            seen["time_to_first_token_seconds"].observe(ttft)
            seen["request_queue_time_seconds"].observe(queued)
            seen["request_prefill_time_seconds"].observe(ttft - queued)
            seen["request_decode_time_seconds"].observe(decode)
            seen["request_inference_time_seconds"].observe(ttft - queued + decode)
            interval = seen["inter_token_latency_seconds"]
            for seconds, count in timing.intervals:
                interval.observe(seconds, count)
            if generation.num_tokens > 1:
                per_token = decode / (generation.num_tokens - 1)
                seen["request_time_per_output_token_seconds"].observe(per_token)
        seen["e2e_request_latency_seconds"].observe(now - timing.started)
        seen["request_prompt_tokens"].observe(generation.num_prompt_tokens)
        seen["request_generation_tokens"].observe(generation.num_tokens)
        seen["request_params_n"].observe(prepared.num_choices_asked)
        if prepared.max_tokens_asked is not None:
            seen["request_params_max_tokens"].observe(prepared.max_tokens_asked)
        for adapter, _ in prepared.composition.members:
            series = self.adapters.of(adapter.name)
            series.requests += 1
            series.prompt_tokens += generation.num_prompt_tokens
            series.generated_tokens += generation.num_tokens
            if ttft is not None:
                series.ttft.observe(ttft)
        if log.isEnabledFor(logging.INFO):
            self._log(prepared, outcome, ttft, now - timing.started)

    def _log(self, prepared: Prepared, outcome: str, ttft: float | None, total: float) -> None:
        generation = prepared.generation
        log.info(
            "request",
            extra={
                "request_id": prepared.answer.id,
                "adapter": "+".join(
                    f"{a.name}@{a.version}" for a, _ in prepared.composition.members
                ),
                "stream": prepared.stream,
                "choices": len(generation.choices),
                "prompt_tokens": generation.num_prompt_tokens,
                "cached_tokens": generation.num_cached_tokens,
                "output_tokens": generation.num_tokens,
                "outcome": outcome,
                "ttft_ms": None if ttft is None else round(ttft * 1000, 1),
                "total_ms": round(total * 1000, 1),
            },
        )


class EngineSnapshot:
    """What the engine said for this scrape; all None or empty while it is away."""

    def __init__(
        self,
        stats: EngineStats | None = None,
        memory: MemoryInfo | None = None,
        adapters: Sequence[AdapterResidencyInfo] = (),
        names: dict[str, str] | None = None,
    ) -> None:
        self.stats = stats
        self.memory = memory
        self.adapters = adapters
        self.names = names or {}  # digest -> adapter name


class _Exposition(Collector):
    """One scrape."""

    def __init__(
        self, model_name: str, ready: bool, requests: RequestMetrics, engine: EngineSnapshot
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._ready = ready
        self._requests = requests
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        yield self._gauge("loraplex:ready", "1 when the engine answers.", int(self._ready))
        yield from self._request_families()
        yield from self._adapter_families()
        if self._engine.stats is not None:
            yield from self._stats_families(self._engine.stats)
        yield from self._residency_families()
        if self._engine.memory is not None:
            yield from self._memory_families(self._engine.memory)

    def _gauge(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _request_families(self) -> Iterable[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for name, (help_text, _) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", help_text, labels=names)
            self._requests.histograms[name].add_to(family, values)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success",
            "Requests by how they ended.",
            labels=[*names, "finished_reason"],
        )
        for outcome, count in sorted(self._requests.finished.items()):
            success.add_metric([*values, outcome], count)
        yield success
        yield self._counter(
            "vllm:admission_rejections",
            "Requests refused because the queue was full.",
            self._requests.rejections,
        )

    def _adapter_families(self) -> Iterable[Metric]:
        labels = ["model_name", "adapter"]
        requests = CounterMetricFamily("loraplex:adapter_requests", "Requests.", labels=labels)
        prompt = CounterMetricFamily(
            "loraplex:adapter_prompt_tokens", "Prompt tokens.", labels=labels
        )
        output = CounterMetricFamily(
            "loraplex:adapter_generation_tokens", "Output tokens.", labels=labels
        )
        ttft = HistogramMetricFamily(
            "loraplex:adapter_time_to_first_token_seconds",
            "Time to the first token.",
            labels=labels,
        )
        loads = CounterMetricFamily(
            "loraplex:adapter_loads", "Loads to the device, of adapters it knows.", labels=labels
        )
        model = self._labels["model_name"]
        for name, series in self._requests.adapters:
            requests.add_metric([model, name], series.requests)
            prompt.add_metric([model, name], series.prompt_tokens)
            output.add_metric([model, name], series.generated_tokens)
            series.ttft.add_to(ttft, [model, name])
        counted = {name for name, _ in self._requests.adapters}
        for info in self._engine.adapters:
            known = self._engine.names.get(info.digest)
            if known in counted:
                loads.add_metric([model, known], info.loads)
                counted.discard(known)
        return requests, prompt, output, ttft, loads

    def _stats_families(self, stats: EngineStats) -> Iterable[Metric]:
        yield self._gauge(
            "vllm:num_requests_running", "Sequences in the running set.", stats.num_running
        )
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting: capacity = for KV blocks or a place, deferred = for their adapter.",
            labels=[*self._labels, "reason"],
        )
        deferred = sum(
            count
            for reason, count in stats.waiting_by_reason.items()
            if reason in ("adapter_loading", "slot")
        )
        for reason, count in (("capacity", stats.num_waiting - deferred), ("deferred", deferred)):
            reasons.add_metric([*self._labels.values(), reason], count)
        yield reasons
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", stats.kv_cache_usage
        )
        for name, help_text, value in (
            ("vllm:prompt_tokens", "Prompt tokens computed or cached.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Output tokens.", stats.generation_tokens),
            ("vllm:num_preemptions", "Preempted sequences.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found cached.", stats.prefix_cache_hits),
            ("vllm:prompt_tokens_cached", "Prompt tokens found cached.", stats.prefix_cache_hits),
            ("loraplex:engine_steps", "Forward passes.", stats.steps),
            ("loraplex:engine_step_tokens", "Tokens of all passes.", stats.step_tokens),
            ("loraplex:adapter_loads_all", "Adapter loads.", stats.adapter_loads),
            ("loraplex:adapter_evictions", "Adapter evictions.", stats.adapter_evictions),
            ("vllm:lora_adapter_load_seconds", "Seconds of loading.", stats.adapter_load_seconds),
        ):
            yield self._counter(name, help_text, value)
        yield self._gauge(
            "vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", stats.adapters_on_device
        )
        yield self._gauge(
            "vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", stats.adapters_on_host
        )
        yield self._gauge(
            "loraplex:adapter_bytes_used", "Device bytes of adapters.", stats.adapter_bytes_used
        )
        yield self._gauge(
            "loraplex:adapter_bytes_total",
            "Device bytes for adapters.",
            stats.adapter_bytes_total,
        )
        yield self._lora_info(stats)

    def _lora_info(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        memory = self._engine.memory
        room = memory.adapter_bytes_total // memory.adapter_page_bytes if memory else 0
        names = self._engine.names

        def joined(digests: Sequence[str]) -> str:
            return ",".join(sorted({names[digest] for digest in digests if digest in names}))

        family.add_metric(
            [str(room), joined(stats.running_digests), joined(stats.waiting_digests)], stats.time
        )
        return family

    def _residency_families(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Adapters in memory.",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        levels = {
            AdapterState.DEVICE: "gpu",
            AdapterState.DRAINING: "gpu",
            AdapterState.HOST: "cpu",
        }
        named = {name for name, _ in self._requests.adapters}
        written = set()
        for info in self._engine.adapters:
            name = self._engine.names.get(info.digest)
            level = levels.get(info.state)
            if name is None or level is None or name not in named or name in written:
                continue  # cardinality stays that of the per-adapter series
            written.add(name)
            family.add_metric([name, level, str(info.pinned).lower(), str(info.rank)], 1)
        return (family,)

    def _memory_families(self, memory: MemoryInfo) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "KV cache configuration.",
            labels=[*self._labels, "block_size", "num_gpu_blocks"],
        )
        family.add_metric(
            [*self._labels.values(), str(memory.block_size), str(memory.kv_blocks_total)], 1
        )
        return (family,)


def exposition(
    model_name: str, ready: bool, requests: RequestMetrics, engine: EngineSnapshot
) -> CollectorRegistry:
    """A registry that holds this scrape's figures."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Exposition(model_name, ready, requests, engine))
    return registry


# --- logs -----------------------------------------------------------------------------------------

_PLAIN_FIELDS = frozenset(
    {*logging.LogRecord("", 0, "", 0, "", (), None).__dict__, "message", "asctime", "taskName"}
)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {
        key: value
        for key, value in record.__dict__.items()
        if key not in _PLAIN_FIELDS and key != "color_message" and value is not None
    }


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:30:01 INFO  request adapter=sql@3 output_tokens=12`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        fields = " ".join(f"{key}={value}" for key, value in _extra(record).items() if value != "")
        return f"{line} {fields}" if fields else line


def setup_logging(level: str, fmt: Literal["text", "json"]) -> None:
    """Send all logs to stderr. Called by the CLI only, before the server starts."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # we log one line per request
    for noisy in ("alembic", "aiosqlite", "sqlalchemy", "python_multipart", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

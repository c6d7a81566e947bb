"""What the API process itself sees of requests: counted once per request, never per token."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

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

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
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
    """For one thread, the event loop's. `record` is called exactly once per accepted request."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
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
            series = self.adapters.of((adapter.label, str(adapter.version)))
            series.requests += 1
            series.errors += outcome == "error"
            series.prompt_tokens += generation.num_prompt_tokens
            series.generated_tokens += generation.num_tokens
            if ttft is not None:
                series.ttft.observe(ttft)
            if outcome not in ("abort", "error"):
                series.latency.observe(now - timing.started)
        if log.isEnabledFor(logging.INFO):
            self._log(prepared, outcome, ttft, now - timing.started)

    def _log(self, prepared: Prepared, outcome: str, ttft: float | None, total: float) -> None:
        generation = prepared.generation
        log.info(
            "request",
            extra={
                "answer_id": prepared.answer.id,
                "tenant": prepared.caller.billed,
                "key": prepared.caller.key_id or None,
                "adapter": "+".join(a.reference for a, _ in prepared.composition.members),
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

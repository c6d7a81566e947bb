"""What a run gave: times of every token, boiled down to the figures people compare. Knows nothing
of HTTP.

TTFT is from sending the request to its first token. Inter-token latency is every gap between two
pieces of output of one request; all gaps of all requests are one sample. Percentiles are numpy's
linear ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it; times are seconds of one monotonic clock."""

    adapter: str | None
    start_s: float
    token_times: list[float] = field(default_factory=list)
    output_tokens: int = 0
    end_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in milliseconds. None: nothing to measure (no token, or one token a request)."""

    requests: int
    errors: int
    duration_s: float
    output_tokens: int
    output_tok_s: float
    req_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    e2e_p50_ms: float | None
    e2e_p99_ms: float | None
    error_messages: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def percentile_ms(seconds: Sequence[float], q: float) -> float | None:
    return float(np.percentile(seconds, q)) * 1e3 if len(seconds) else None


def summarize(records: Sequence[RequestRecord]) -> Summary:
    """Failed requests count as errors and nowhere else; the clock runs from the first start to the
    last end.
    """
    good = [r for r in records if r.error is None]
    duration = max((r.end_s for r in records), default=0.0) - min(
        (r.start_s for r in records), default=0.0
    )
    first = [r.token_times[0] - r.start_s for r in good if r.token_times]
    gaps = [gap for r in good for gap in np.diff(r.token_times).tolist()]
    whole = [r.end_s - r.start_s for r in good]
    tokens = sum(r.output_tokens for r in good)
    return Summary(
        requests=len(records),
        errors=len(records) - len(good),
        duration_s=duration,
        output_tokens=tokens,
        output_tok_s=tokens / duration if duration > 0 else 0.0,
        req_s=len(good) / duration if duration > 0 else 0.0,
        ttft_p50_ms=percentile_ms(first, 50),
        ttft_p99_ms=percentile_ms(first, 99),
        itl_p50_ms=percentile_ms(gaps, 50),
        itl_p99_ms=percentile_ms(gaps, 99),
        e2e_p50_ms=percentile_ms(whole, 50),
        e2e_p99_ms=percentile_ms(whole, 99),
        error_messages=dict(Counter(r.error for r in records if r.error is not None)),
    )

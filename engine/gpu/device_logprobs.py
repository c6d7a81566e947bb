"""Log-probabilities found on the device and collected later: of sampled tokens and of prompts.

The device form of `engine.sampling.token_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from loraplex.engine.api import TokenLogprobs
from loraplex.engine.gpu.transfers import Arrival, send
from loraplex.kernels.gpu.sample_logprobs import HEAD_FIELDS, find_logprobs


def start_logprobs(logits: Tensor, token_ids: Tensor, asked: list[tuple[int, int]]) -> Tensor:
    """Find the log-probabilities of some rows' tokens, for `read_logprobs`.

    logits: `[R, V]` model dtype. token_ids: `[R]` int64. asked: row and number of likeliest tokens.
    """
    vocab_size = logits.shape[1]
    counts = [(row, min(num_top, vocab_size)) for row, num_top in asked]
    width = max(num_top for _, num_top in counts)
    return find_logprobs(
        logits, token_ids, send(np.array(counts, dtype=np.int32), logits.device), width
    )


def read_logprobs(
    found: np.ndarray[Any, Any], token_ids: list[int], num_tops: list[int]
) -> list[TokenLogprobs]:
    """found: the result of `start_logprobs` on the host; the rest by its rows."""
    width = (found.shape[1] - HEAD_FIELDS) // 2
    values = found.view(np.float32)
    return [
        TokenLogprobs(
            token_id,
            float(values[i, 1]),
            int(found[i, 0]),
            found[i, HEAD_FIELDS:][:num_top].tolist(),
            values[i, HEAD_FIELDS + width :][:num_top].tolist(),
        )
        for i, (token_id, num_top) in enumerate(zip(token_ids, num_tops, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of neighbouring prompt tokens, on their way."""

    targets: list[int]
    num_top: int
    arrival: Arrival

    @classmethod
    def start(cls, logits: Tensor, targets: list[int], num_top: int) -> PromptLogprobs:
        """logits: `[R, V]`, row i gives the entry of `targets[i]`."""
        num_top = min(num_top, logits.shape[1])
        token_ids = send(np.array(targets, dtype=np.int64), logits.device)
        asked = [(row, num_top) for row in range(len(targets))]
        return cls(targets, num_top, Arrival(start_logprobs(logits, token_ids, asked)))

    def collect(self) -> list[TokenLogprobs]:
        """Wait for them."""
        [found] = self.arrival.wait()
        return read_logprobs(found, self.targets, [self.num_top] * len(self.targets))

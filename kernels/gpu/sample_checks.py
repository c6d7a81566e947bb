"""The sampling kernels held against torch, on rows whose result torch knows too.

Draws are checked where only one token may be drawn, or only a few; that the numbers drawn are the
CPU's is for the tests. Knows nothing of requests.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.gpu.layer_checks import Pair
from loraplex.kernels.gpu.sample_draw import draw
from loraplex.kernels.gpu.sample_edits import edit_logits
from loraplex.kernels.gpu.sample_logprobs import HEAD_FIELDS, find_logprobs
from loraplex.kernels.gpu.sample_peaks import find_peaks, take_likeliest
from loraplex.kernels.gpu.sample_rows import RECORD, WORDS, SampleRows

TOP_K = 5
NUM_TOP = 4  # likeliest tokens whose log-probabilities are asked for


class SampleStep:
    """Rows of random logits; rows are greedy, top-k 1, and top-k `TOP_K` with a top-p in turn."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        records = np.zeros(rows, dtype=RECORD)
        records["seed"] = np.arange(rows, dtype=np.uint64) * 7919
        records["inverse_temperature"] = 1 / 0.8
        records["greedy"] = np.arange(rows) % 3 == 0
        records["top_k"] = np.array([0, 1, TOP_K])[np.arange(rows) % 3]
        records["top_p"] = np.where(np.arange(rows) % 3 == 2, 0.9, 1.0)
        records["min_p"] = np.where(records["greedy"] == 1, 1.0, 0.0)
        records["state_row"] = np.arange(rows)
        records["edit_slot"] = -1
        records["repetition"] = 1.0
        self.wide = torch.from_numpy(np.arange(rows) % 3 == 2).to(device)  # rows that may choose
        words = torch.from_numpy(records.view(np.int32).reshape(rows, WORDS))
        self.rows = SampleRows(_logits(rows, vocab, dtype, device), words.to(device))
        self.positions = torch.arange(rows, dtype=torch.int32).to(device)
        self.tokens = torch.empty(rows, dtype=torch.int64, device=device)
        self.last = torch.empty(rows, dtype=torch.int64, device=device)

    def start(self) -> None:
        """Every sampling kernel once."""
        self.likeliest()
        self.draw()
        self._edit()
        self._logprobs()

    def check(self) -> list[Pair]:
        logits = self.rows.logits.float()
        best = logits.argmax(-1)
        pairs = [_same(self.likeliest(), best), _same(self.last, best)]
        drawn = self.draw()
        among = (logits.topk(min(TOP_K, logits.shape[1])).indices == drawn[:, None]).any(-1)
        pairs.append(_same(torch.where(self.wide, among, drawn == best), torch.ones_like(best)))
        edited = self._edit().edited
        assert edited is not None
        pairs.append((edited, logits[:1]))
        return pairs + self._check_logprobs(logits, drawn)

    def _check_logprobs(self, logits: Tensor, drawn: Tensor) -> list[Pair]:
        found = self._logprobs()
        want = torch.log_softmax(logits, -1)
        top = want.topk(NUM_TOP).values
        chosen = want.gather(1, drawn[:, None])
        at = HEAD_FIELDS + NUM_TOP
        got_top = found[:, at : at + NUM_TOP].contiguous().view(torch.float32)
        got_chosen = found[:, 1:2].contiguous().view(torch.float32)
        return [(got_top, top), (got_chosen, chosen)]

    def likeliest(self) -> Tensor:
        peaks = find_peaks(self.rows, sums=False)
        take_likeliest(self.rows, peaks, self.tokens, self.last, None)
        return self.tokens.clone()

    def draw(self) -> Tensor:
        peaks = find_peaks(self.rows, sums=True)
        draw(self.rows, peaks, self.positions, self.tokens, None, None)
        return self.tokens.clone()

    def _edit(self) -> SampleRows:
        """The first row edited with nothing, which leaves its logits as they are."""
        device = self.positions.device
        nothing = torch.zeros(1, 2, dtype=torch.int32, device=device)
        first = torch.zeros(1, dtype=torch.int32, device=device)
        return edit_logits(self.rows.logits, self.rows.records, first, nothing, None)

    def _logprobs(self) -> Tensor:
        count = self.rows.logits.shape[0]
        asked = torch.stack(
            (
                torch.arange(count, dtype=torch.int32),
                torch.full((count,), NUM_TOP, dtype=torch.int32),
            ),
            1,
        )
        return find_logprobs(
            self.rows.logits, self.tokens, asked.to(self.positions.device), NUM_TOP
        )


def _logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row's are all different, as far as the type can tell the likeliest apart."""
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
    if device.type == "meta":
        return logits
    logits.normal_()
    places = torch.rand(rows, vocab, device=device).argsort(-1)[:, :8]
    peaks = torch.arange(8, device=device, dtype=dtype) * 0.5 + 6
    return logits.scatter_(1, places, peaks.expand(rows, 8))


def _same(got: Tensor, expected: Tensor) -> Pair:
    """As numbers that no tolerance brings together."""
    return (got == expected).float(), torch.ones(got.shape, device=got.device)

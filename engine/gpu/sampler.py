"""From logits to tokens on the device, without the host waiting or being waited for.

The semantics are those of `engine.sampling.Sampler`, random numbers included: a request gets the
same tokens from both, up to float rounding. A batch of greedy rows costs two launches, one that
draws two others; only rows that change logits or ask for log-probabilities pay for more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.api import TokenLogprobs
from loraplex.engine.gpu.device_logprobs import read_logprobs, start_logprobs
from loraplex.engine.gpu.sample_plan import RowWishes, SamplePlan, SamplingItem, make_plan
from loraplex.engine.gpu.token_counts import TokenCounts
from loraplex.engine.gpu.transfers import Arrival, send
from loraplex.engine.sampling import Sampled
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.sample_draw import draw
from loraplex.kernels.gpu.sample_edits import TokenMasks, edit_logits
from loraplex.kernels.gpu.sample_peaks import find_peaks, take_likeliest
from loraplex.kernels.gpu.sample_rows import SampleRows


@dataclass(frozen=True, slots=True, eq=False)
class SamplingHandle:
    """token_ids: `[R]` int64 on the device, there for later work of the same stream."""

    token_ids: Tensor
    logprobs: list[tuple[int, int]]  # rows that asked for them, and how many likeliest
    arrival: Arrival


class DeviceSampler:
    """max_num_seqs: state rows, each of one running sequence at a time."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._counts = TokenCounts(max_num_seqs, vocab_size, device)
        self._wishes: dict[int, RowWishes] = {}  # by state row
        self._plan: SamplePlan | None = None

    def forget(self, state_rows: Iterable[int]) -> None:
        """Drop what is kept for the rows of sequences that left the running set."""
        rows = list(state_rows)
        self._counts.forget(rows)
        for row in rows:
            self._wishes.pop(row, None)

    def launch(
        self, logits: Tensor, items: list[SamplingItem], last_tokens: Tensor | None = None
    ) -> SamplingHandle:
        """Choose the next token of each sequence; the host's part is over before the device's.

        logits: `[R, vocab]` model dtype, row i of `items[i]`; not changed. A sequence's last token
        may be pending. last_tokens: `[state rows]` integers; if given, each row's token is written
        to its state row.
        """
        assert logits.shape == (len(items), self._vocab_size), (
            f"logits {list(logits.shape)} for {len(items)} rows of {self._vocab_size} tokens"
        )
        positions = [position for _, _, position in items]
        plan = self._plan_of(items, positions)
        counts = self._counts.table([items[i] for i in plan.penalised]) if plan.penalised else None
        if plan.edit_rows is None:
            rows = SampleRows(logits, plan.records)
        else:
            masks = self._masks(plan, items)
            rows = edit_logits(logits, plan.records, plan.edit_rows, plan.edits, counts, masks)
        token_ids = torch.empty(len(items), dtype=torch.int64, device=self._device)
        peaks = find_peaks(rows, sums=plan.draws)
        if plan.draws:
            places = send(np.array(positions, dtype=np.int32), self._device)
            draw(rows, peaks, places, token_ids, last_tokens, counts)
        else:
            take_likeliest(rows, peaks, token_ids, last_tokens, counts)
        results = [token_ids]
        if plan.logprobs:
            results.append(start_logprobs(logits, token_ids, plan.logprobs))
        return SamplingHandle(token_ids, plan.logprobs, Arrival(*results))

    def collect(self, handle: SamplingHandle) -> Sampled:
        """Wait for the tokens."""
        arrays = handle.arrival.wait()
        token_ids: list[int] = arrays[0].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if handle.logprobs:
            chosen = [token_ids[i] for i, _ in handle.logprobs]
            found = read_logprobs(arrays[1], chosen, [n for _, n in handle.logprobs])
            for (i, _), entry in zip(handle.logprobs, found, strict=True):
                logprobs[i] = entry
        return Sampled(token_ids, logprobs)

    def _masks(self, plan: SamplePlan, items: list[SamplingItem]) -> TokenMasks | None:
        if plan.mask_slots is None:
            return None
        words = np.empty((len(plan.masked), -(-self._vocab_size // 32)), dtype=np.int32)
        for target, row in zip(words, plan.masked, strict=True):
            seq = items[row][0]
            assert seq.mask is not None, f"sequence {seq.seq_id} samples without its mask"
            target[:] = seq.mask.view(np.int32)
        return TokenMasks(plan.mask_slots, send(words, self._device))

    def _plan_of(self, items: list[SamplingItem], positions: list[int]) -> SamplePlan:
        rows = [(seq.seq_id, row) for seq, row, _ in items]
        if self._plan is None or not self._plan.serves(rows, positions):
            wishes = [self._wishes_of(seq, row) for seq, row, _ in items]
            self._plan = make_plan(rows, wishes, positions, self._device)
        return self._plan

    def _wishes_of(self, seq: Sequence, state_row: int) -> RowWishes:
        wishes = self._wishes.get(state_row)
        if wishes is None or wishes.seq_id != seq.seq_id:
            wishes = self._wishes[state_row] = RowWishes.of(seq, state_row, self._vocab_size)
        return wishes

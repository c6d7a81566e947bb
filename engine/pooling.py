"""One vector for a prompt: the mean of its final hidden states, or the last of them.

A prompt may run in chunks, so what has been added up is kept per sequence until its last chunk.
Knows nothing of steps' launches; the CPU's and the GPU's runner share it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loraplex.engine.seams import ScheduledSequence


class Pooler:
    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # [hidden] float32, by seq_id

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences that left the running set."""
        for seq_id in seq_ids:
            self._sums.pop(seq_id, None)

    def add(self, scheduled: ScheduledSequence, hidden: Tensor) -> Tensor | None:
        """Take one run's rows in; the vector, `[hidden] float32`, once the prompt has run whole.

        hidden: `[num_tokens, hidden]`, normed, model dtype.
        """
        seq = scheduled.seq
        if seq.request.pooling == "last":
            return hidden[-1].float() if scheduled.pools else None
        total = hidden.sum(dim=0, dtype=torch.float32)
        earlier = self._sums.pop(seq.seq_id, None)
        if earlier is not None:
            total += earlier
        if scheduled.pools:
            return total / seq.num_prompt_tokens
        self._sums[seq.seq_id] = total
        return None

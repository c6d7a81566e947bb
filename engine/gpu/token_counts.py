"""How often each running sequence holds each token, on the device, for the penalties.

The table exists from the first request on that is penalised. A sequence is counted from the host
when it first samples in a row (at its start, and after a preemption); from then on the sampling
kernels add each token they choose.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.gpu.sample_plan import SamplingItem
from loraplex.engine.gpu.transfers import send
from loraplex.kernels.gpu.sample_edits import count_tokens


class TokenCounts:
    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (num_rows, vocab_size)
        self._device = device
        self._table: Tensor | None = None
        self._owner: dict[int, int] = {}  # the sequence whose tokens a state row counts

    def forget(self, state_rows: Iterable[int]) -> None:
        for row in state_rows:
            self._owner.pop(row, None)

    def table(self, items: list[SamplingItem]) -> Tensor:
        """`[state rows, V]` int32 with the rows of these penalised sequences up to date.

        What the host does not know yet the device has counted when it was drawn.
        """
        if self._table is None:
            self._table = torch.empty(self._shape, dtype=torch.int32, device=self._device)
        new = [item for item in items if self._owner.get(item[1]) != item[0].seq_id]
        if new:
            self._count(self._table, new)
        return self._table

    def _count(self, table: Tensor, items: list[SamplingItem]) -> None:
        spans: list[tuple[int, int, int, int]] = []
        token_ids: list[int] = []
        for seq, row, position in items:
            held = seq.token_ids[:position]
            assert len(held) == position, (
                f"sequence {seq.seq_id} is first counted at position {position}, "
                f"but the host knows {len(held)} of its tokens only"
            )
            spans.append((row, len(token_ids), seq.num_prompt_tokens, position))
            token_ids += held
            self._owner[row] = seq.seq_id
        count_tokens(
            table,
            send(np.array(spans, dtype=np.int32), self._device),
            send(np.array(token_ids, dtype=np.int32), self._device),
        )

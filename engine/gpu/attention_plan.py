"""How the attention of a step, or of every step of a captured graph, is divided.

Says for the host what `kernels.gpu.attention_work` says for a batch on the device, so that the
tiles travel with the rest of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from loraplex.engine.gpu.step_layout import Ints
from loraplex.kernels.gpu.attention_work import (
    num_sms,
    num_splits,
    plan_prefill_tiles,
    tile_queries,
)
from loraplex.kernels.gpu.kv_cache import PagedKVCache


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """tiles: of the rows that the prefill kernel computes, none of the first `num_decodes`."""

    num_decodes: int
    num_splits: int
    tile_queries: int
    tiles: Ints  # flat
    num_tiles: int


class AttentionPlanner:
    """batch_invariant: all rows go to the prefill kernel, see `attention_work`."""

    def __init__(
        self, num_heads: int, kv: PagedKVCache, device: torch.device, *, batch_invariant: bool
    ) -> None:
        self._kv = kv
        self._group = num_heads // kv.num_kv_heads
        self._num_sms = num_sms(device)
        self._batch_invariant = batch_invariant

    def plan(
        self, query_start: list[int], context_lens: list[int], num_decodes: int
    ) -> AttentionPlan:
        """query_start: `S + 1` first rows. context_lens: tokens in the cache after the step."""
        if self._batch_invariant:
            num_decodes = 0
        starts = query_start[num_decodes:]
        longest = max((b - a for a, b in pairwise(starts)), default=0)
        kv = self._kv
        queries = tile_queries(self._group, kv.head_dim, kv.dtype, longest, self._batch_invariant)
        tiles = plan_prefill_tiles(query_start, context_lens, num_decodes, queries)
        longest = max(context_lens[:num_decodes], default=0)
        splits = num_splits(num_decodes, kv.num_kv_heads, longest, self._num_sms)
        return AttentionPlan(num_decodes, splits, queries, tiles.reshape(-1), len(tiles))

    def static(self, num_rows: int, max_context: int) -> AttentionPlan:
        """For any step of up to `num_rows` decodes: a decode is one tile at most."""
        return self.plan(list(range(num_rows + 1)), [max_context] * num_rows, num_rows)

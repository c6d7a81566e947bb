"""How a step's attention is divided: decodes into splits, prefills into tiles. Host work, numpy.

Decode rows come first in a step, one sequence a row, and need no list: program (row, kv head,
split) finds its keys from `context_lens`. The other runs are cut into *tiles* of a few query
tokens, which carry everything else a program has to know. Tiles are cut at multiples of
`tile_queries` of the *position*, not of the run, so a token always falls on the same row of its
tile, wherever a chunk or a prefix hit began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.gpu.kv_cache import SPLIT_COUNTERS, PagedKVCache
from loraplex.kernels.ops import AttentionBatch

TILE_FIELDS = 4  # first row, query tokens, position of the first, sequence
SPLIT_TOKENS = 128  # a split reads at least so many tokens: less does not pay for merging it
MAX_SPLITS = 64
WIDE_ROWS = 128  # (query, head) rows of a tile: two warp groups of wgmma
NARROW_ROWS = 64  # one

PrefillTiles = np.ndarray[tuple[int, int], np.dtype[np.int32]]  # [num_tiles, TILE_FIELDS]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWork:
    """The `plan` of an AttentionBatch for the Triton kernels.

    Rows `0 .. num_decodes` go to the decode kernel, padding rows (context 0) included; the rest to
    the prefill kernel, which has `prefill_capacity` programs a head: those past `prefill_count`
    leave at once. A count of None means that every tile is real.
    """

    num_decodes: int
    num_splits: int = 1
    tile_queries: int = 1
    prefill_tiles: Tensor | None = None  # [capacity, TILE_FIELDS] int32
    prefill_count: Tensor | None = None  # [1] int32
    prefill_capacity: int = 0


def attention_work(
    batch: AttentionBatch, num_heads: int, kv: PagedKVCache, *, batch_invariant: bool = False
) -> AttentionWork:
    """The work of a step that nobody prepared: tiles cut and copied now.

    batch_invariant: every row goes to the prefill kernel in its narrow form, so that nothing of a
    row's result depends on its batch mates or on how its prompt was cut.
    """
    device = batch.query_start.device
    num_decodes = 0 if batch_invariant else batch.num_decodes
    starts, contexts = batch.host_query_start, batch.host_context_lens
    longest = max((b - a for a, b in pairwise(starts)), default=0)
    queries = tile_queries(
        num_heads // kv.num_kv_heads, kv.head_dim, kv.dtype, longest, batch_invariant
    )
    tiles = plan_prefill_tiles(starts, contexts, num_decodes, queries)
    splits = num_splits(
        num_decodes, kv.num_kv_heads, max(contexts[:num_decodes], default=0), num_sms(device)
    )
    return AttentionWork(
        num_decodes,
        splits,
        queries,
        prefill_tiles=torch.from_numpy(tiles).to(device) if len(tiles) else None,
        prefill_capacity=len(tiles),
    )


def tile_queries(
    group: int, head_dim: int, dtype: torch.dtype, longest_run: int, batch_invariant: bool = False
) -> int:
    """Query tokens per tile; each brings the `group` heads that share a kv head.

    A wide tile reads keys half as often. It is taken where the runs can fill one and the
    accumulator (rows x head_dim in fp32) fits the registers. longest_run: tokens.
    """
    wide = (
        not batch_invariant
        and longest_run * group > NARROW_ROWS
        and head_dim <= 128
        and dtype.itemsize == 2
    )
    return max(1, (WIDE_ROWS if wide else NARROW_ROWS) // group)


def plan_prefill_tiles(
    query_start: Sequence[int], context_lens: Sequence[int], num_decodes: int, queries: int
) -> PrefillTiles:
    """Cut the runs of sequences `num_decodes ..` into tiles, the longest work first.

    query_start: `S + 1` first rows; context_lens: tokens of each sequence after this step.
    """
    starts = np.asarray(query_start[num_decodes:], dtype=np.int64)
    ends = np.asarray(context_lens[num_decodes:], dtype=np.int64)
    firsts = ends - np.diff(starts)  # position of each run's first token
    first_tiles = firsts // queries
    counts = np.where(ends > firsts, (ends - 1) // queries - first_tiles + 1, 0)
    run = np.repeat(np.arange(len(ends)), counts)
    nth = np.arange(len(run)) - (np.cumsum(counts) - counts)[run]  # of its run
    low = (first_tiles[run] + nth) * queries
    first = np.maximum(low, firsts[run])
    last = np.minimum(low + queries, ends[run])
    tiles = np.stack(
        (starts[run] + first - firsts[run], last - first, first, run + num_decodes), axis=1
    )
    return tiles[np.argsort(-last, kind="stable")].astype(np.int32)


def max_prefill_tiles(num_tokens: int, num_seqs: int, queries: int) -> int:
    """Tiles that `num_seqs` runs of `num_tokens` tokens in all can need, however they lie."""
    return min(num_tokens, num_tokens // queries + 2 * num_seqs)


def num_splits(num_seqs: int, num_kv_heads: int, max_context: int, num_sms: int) -> int:
    """Programs that share the keys of one (sequence, kv head).

    Few pairs: as many splits as make two programs per multiprocessor, which hide each other's
    latency, all starting together. Many: six, where three fit at a time, so that the last ones, or
    a few long sequences, do not run alone for long. The kernel itself uses fewer for a short
    context.
    """
    pairs = num_seqs * num_kv_heads
    if pairs == 0 or pairs > SPLIT_COUNTERS:
        return 1
    at_once = 2 * num_sms
    wanted = at_once // pairs if 2 * pairs <= at_once else -(-3 * at_once // pairs)
    return max(1, min(wanted, -(-max_context // SPLIT_TOKENS), MAX_SPLITS))


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors; 1 where there is no CUDA device, which keeps interpreted grids small."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

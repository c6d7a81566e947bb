"""A contiguous copy of the keys and values of the sequences that decode, for plain torch.

Torch attends 1.3-1.8 times slower over gathered pages than over one padded slab, so a sequence's
pages are gathered once, when it first decodes, and each step's token is appended to both. The
active slots are adjacent: the padded attention runs on a view. Knows nothing about adapters or
rope.

Pages are gathered layer by layer, after the step's writes to the layer: a sequence may share blocks
that another one fills in this very step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.kernels.ops import AttentionBatch

GRANULE = 64  # tokens; capacities are multiples of it


@dataclass(slots=True)
class Mirrored:
    """What slot holds which sequence, how many tokens of it and from which blocks."""

    slot: int
    length: int
    blocks: list[int]


@dataclass(slots=True, eq=False)
class DecodeStep:
    """One step's decodes in slot order."""

    slots: Tensor  # [B] int64, slot of each decode row
    rows: Tensor | None  # [B] int64, row of each slot; None if rows are in slot order
    positions: Tensor  # [B] int64
    padded: int  # tokens attended, the longest context rounded up
    masks: dict[int | None, Tensor]  # additive [B, 1, 1, padded] in slot order, by window
    new: list[tuple[int, Tensor]]  # slot, rows of the pages to gather there, [tokens] int64


class DecodeMirror:
    """K and V: `[num_layers, slots, Hk, capacity, D]`, grown as needed up to max_bytes."""

    def __init__(self, pages_k: Tensor, pages_v: Tensor, block_size: int, max_bytes: int) -> None:
        """pages: `[num_layers, num_blocks * block_size, Hk, D]`, read when one first decodes."""
        self.pages = (pages_k, pages_v)
        self.block_size = block_size
        self.max_bytes = max_bytes
        self.sequences: dict[int, Mirrored] = {}
        self._slabs = self._empty(0, 0)
        self._fused = _fused_is_fast(pages_k)

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def step(self, batch: AttentionBatch) -> DecodeStep | None:
        """Make the mirror hold every decode of the batch; None if that would pass max_bytes."""
        count = batch.num_decodes
        lengths = batch.host_context_lens[:count]
        seq_ids = batch.seq_ids[:count]
        self._forget(batch)
        if count == 0:
            return None
        if not self._reserve(count, max(lengths)):
            self.sequences.clear()
            self._slabs = self._empty(0, 0)
            return None
        self._settle(count)
        free = iter(sorted(set(range(count)) - {kept.slot for kept in self.sequences.values()}))
        new = []
        for i, seq_id in enumerate(seq_ids):
            kept = self.sequences.get(seq_id)
            if kept is None:
                kept = self.sequences[seq_id] = Mirrored(next(free), 0, [])
                new.append((kept.slot, self._rows(batch.host_block_tables[i], lengths[i] - 1)))
            kept.length = lengths[i]
            kept.blocks = batch.host_block_tables[i][: -(-lengths[i] // self.block_size)]
        return self._describe(batch, [self.sequences[seq_id].slot for seq_id in seq_ids], new)

    def write(self, layer: int, step: DecodeStep, k: Tensor, v: Tensor) -> None:
        """Gather what is new and append the step's token of each decode. The pages have all of the
        step's tokens. k, v: `[B, Hk, D]` in row order.
        """
        for slab, pages, tokens in zip(self._slabs, self.pages, (k, v), strict=True):
            for slot, rows in step.new:
                slab[layer, slot, :, : len(rows)] = pages[layer, rows].transpose(0, 1)
            slab[layer][step.slots, :, step.positions] = tokens

    def attend(
        self, layer: int, step: DecodeStep, q: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q: `[B, Hq, D]` in row order. Returns the same shape."""
        mask = step.masks.get(window)
        if mask is None:
            assert window is not None
            mask = step.masks[window] = self._window(step, window)
        count, num_heads, dim = q.shape
        q = q if step.rows is None else q[step.rows]
        k = self._slabs[0][layer, :count, :, : step.padded]
        v = self._slabs[1][layer, :count, :, : step.padded]
        if self._fused:
            out = F.scaled_dot_product_attention(
                q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )[:, :, 0]
        else:
            grouped = q.reshape(count, k.shape[1], num_heads // k.shape[1], dim)
            scores = torch.matmul(grouped, k.transpose(2, 3)).float().mul_(scale).add_(mask)
            out = torch.matmul(scores.softmax(-1).to(v.dtype), v).view(count, num_heads, dim)
        return out if step.rows is None else out[step.slots]

    def _forget(self, batch: AttentionBatch) -> None:
        """Drop sequences that do not decode now, or are not one token further on the same blocks.

        A preempted sequence may come back under its id with a shorter context or in other blocks.
        """
        still: dict[int, Mirrored] = {}
        for i in range(batch.num_decodes):
            kept = self.sequences.get(batch.seq_ids[i])
            if (
                kept is not None
                and kept.length == batch.host_context_lens[i] - 1
                and kept.blocks == batch.host_block_tables[i][: len(kept.blocks)]
            ):
                still[batch.seq_ids[i]] = kept
        self.sequences = still

    def _reserve(self, slots: int, tokens: int) -> bool:
        """Room for so many; keeps what is there. False if max_bytes forbids it."""
        old_slots, old_tokens = self._slabs[0].shape[1], self._slabs[0].shape[3]
        if slots <= old_slots and tokens <= old_tokens:
            return True
        wish = (
            old_slots if slots <= old_slots else max(slots, old_slots * 3 // 2),
            old_tokens if tokens <= old_tokens else _round_up(max(tokens, old_tokens * 3 // 2)),
        )
        least = (max(slots, old_slots), _round_up(max(tokens, old_tokens)))
        layers, _, heads, dim = self.pages[0].shape
        per_token = 2 * layers * heads * dim * self.pages[0].element_size()
        for size in (wish, least):
            if size[0] * size[1] * per_token <= self.max_bytes:
                old, self._slabs = self._slabs, self._empty(*size)
                for slab, before in zip(self._slabs, old, strict=True):
                    slab[:, :old_slots, :, :old_tokens] = before
                return True
        return False

    def _empty(self, slots: int, tokens: int) -> tuple[Tensor, Tensor]:
        layers, _, heads, dim = self.pages[0].shape
        # Zeros: the padding is masked, and 0 * anything finite stays out of the sums.
        shape = (layers, slots, heads, tokens, dim)
        return self.pages[0].new_zeros(shape), self.pages[1].new_zeros(shape)

    def _settle(self, count: int) -> None:
        """Move sequences into the first `count` slots."""
        taken = {kept.slot for kept in self.sequences.values()}
        free = iter(sorted(set(range(count)) - taken))
        for kept in self.sequences.values():
            if kept.slot >= count:
                slot = next(free)
                for slab in self._slabs:
                    slab[:, slot, :, : kept.length] = slab[:, kept.slot, :, : kept.length]
                kept.slot = slot

    def _rows(self, blocks: list[int], length: int) -> Tensor:
        """Where in the pages the first `length` tokens are."""
        device = self.pages[0].device
        num_blocks = -(-length // self.block_size)
        starts = torch.tensor(blocks[:num_blocks], dtype=torch.int64, device=device)
        offsets = torch.arange(self.block_size, device=device)
        return (starts[:, None] * self.block_size + offsets).flatten()[:length]

    def _describe(
        self, batch: AttentionBatch, slots: list[int], new: list[tuple[int, Tensor]]
    ) -> DecodeStep:
        device = self.pages[0].device
        count = len(slots)
        index = torch.tensor(slots, device=device)
        in_order = slots == list(range(count))
        rows = None if in_order else torch.argsort(index)
        lengths = batch.context_lens[:count].to(device)
        padded = -(-max(batch.host_context_lens[:count]) // 16) * 16
        padded = min(padded, self._slabs[0].shape[3])
        tokens = torch.arange(padded, device=device)
        ordered = lengths if rows is None else lengths[rows]
        mask = _additive(tokens < ordered[:, None], self.pages[0].dtype)
        return DecodeStep(index, rows, (lengths - 1).long(), padded, {None: mask}, new)

    def _window(self, step: DecodeStep, window: int) -> Tensor:
        positions = step.positions if step.rows is None else step.positions[step.rows]
        tokens = torch.arange(step.padded, device=positions.device)
        visible = (tokens <= positions[:, None]) & (tokens > positions[:, None] - window)
        return _additive(visible, self.pages[0].dtype)


def _fused_is_fast(pages: Tensor) -> bool:
    """Torch's fused attention of a single bf16 query takes 7-10 times two batched GEMMs where the
    CPU has no AMX (Zen 4, 8 x 192 tokens, 16 heads: 2.5 ms against 0.21), half where it has.
    """
    if pages.dtype != torch.bfloat16 or pages.device.type != "cpu":
        return True
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(has_amx and has_amx())


def _round_up(tokens: int) -> int:
    return -(-tokens // GRANULE) * GRANULE


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, tokens]` bool to `[B, 1, 1, tokens]`, 0 or -inf."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))[:, None, None]

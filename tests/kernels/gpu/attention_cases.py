"""Steps of attention over a paged cache full of NaN, and what the reference says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from kernel_cases import Sequences, Shape, rand
from torch import Tensor

from loraplex.kernels.gpu.attention import attention
from loraplex.kernels.gpu.attention_work import AttentionWork, attention_work
from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.ops import AttentionBatch

CPU = torch.device("cpu")
# Of outputs that are means of values of variance 1. fp16: inputs, probabilities and outputs round.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-2},
}


@dataclass
class Case:
    """Steps of some sequences through one layer. Whatever no sequence wrote is NaN."""

    group: int = 2
    num_kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    num_blocks: int = 40
    window: int | None = None
    softcap: float | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        heads = self.group * self.num_kv_heads
        self.shape = Shape(
            num_heads=heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, layers=1
        )
        self.sequences = Sequences(self.shape, self.num_blocks, self.block_size)
        self.kv = PagedKVCache(
            1, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.dtype, CPU
        )
        self.kv.keys[0].fill_(float("nan"))
        self.kv.values[0].fill_(float("nan"))
        self.scale = self.head_dim**-0.5

    def write(self, work: Sequence[tuple[int, int]]) -> tuple[AttentionBatch, Tensor]:
        """One step's keys and values into the pages. Returns the batch and random queries."""
        batch = self.sequences.step(work)
        tokens = batch.positions.numel()
        k = rand(tokens, self.num_kv_heads, self.head_dim, dtype=self.dtype)
        v = rand(tokens, self.num_kv_heads, self.head_dim, dtype=self.dtype)
        block, offset = batch.slot_mapping // self.block_size, batch.slot_mapping % self.block_size
        self.kv.keys[0][block, :, offset] = k
        self.kv.values[0][block, :, offset] = v
        self.sequences.remember(0, batch, k, v)
        return batch, rand(tokens, self.shape.num_heads, self.head_dim, dtype=self.dtype)

    def attend(self, batch: AttentionBatch, q: Tensor, **changes: int) -> Tensor:
        """changes: of the AttentionWork, such as `num_splits`."""
        work = replace(self.work(batch), **changes)
        return attention(q, self.kv, 0, batch, work, self.scale, self.window, self.softcap)

    def work(self, batch: AttentionBatch) -> AttentionWork:
        heads = self.shape.num_heads
        return attention_work(batch, heads, self.kv, batch_invariant=self.batch_invariant)

    def expected(self, batch: AttentionBatch, q: Tensor) -> Tensor:
        if self.softcap is None:
            return self.sequences.attention(0, batch, q, self.scale, self.window)
        return self._capped(batch, q)

    def close(self, got: Tensor, batch: AttentionBatch, q: Tensor) -> None:
        torch.testing.assert_close(got.float(), self.expected(batch, q), **TOLERANCE[self.dtype])

    def step(self, work: Sequence[tuple[int, int]], **changes: int) -> None:
        """Write, attend, compare."""
        batch, q = self.write(work)
        self.close(self.attend(batch, q, **changes), batch, q)

    def _capped(self, batch: AttentionBatch, q: Tensor) -> Tensor:
        assert self.softcap is not None
        out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2])
        for i, seq in enumerate(batch.seq_ids):
            k, v = self.sequences.keys[0, seq].float(), self.sequences.values[0, seq].float()
            for row in range(batch.host_query_start[i], batch.host_query_start[i + 1]):
                last = int(batch.positions[row]) + 1
                first = 0 if self.window is None else max(0, last - self.window)
                for head in range(q.shape[1]):
                    past = (slice(first, last), head // self.group)
                    s = (k[past] @ q[row, head].float()) * self.scale
                    p = torch.softmax(self.softcap * torch.tanh(s / self.softcap), 0)
                    out[row, head * self.head_dim : (head + 1) * self.head_dim] = p @ v[past]
        return out

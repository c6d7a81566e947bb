"""Proof that an adapter does here what its files say: the paged path against plain arithmetic.

A dozen tokens run through the decoder with the adapter's pages, as a prefill and a decode step, and
through a reference that never saw a page: fp32, dense attention, `x A^T B^T * scaling` straight
from the file's tensors. Only the base model's weight products are shared. Three numbers come out,
each a norm of logits' differences relative to the norm of the logits:

    error       paged - reference, with the adapter
    base_error  paged - reference, without it: what rounding alone does in this model
    effect      with - without the adapter, both by the reference

A wrong scaling, a swapped or missing module and a wrong transposition show as an error the size of
the effect. An effect of zero is an adapter that changes nothing.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.weights import LoadedAdapter, load_weights
from loraplex.engine.api import AdapterProbe
from loraplex.engine.model import Decoder
from loraplex.kernels.ops import (
    GATE_UP,
    QKV,
    AttentionBatch,
    Linear,
    LoraBatch,
    Module,
    PageTables,
)

PROBE_SEQ_ID = -1  # no sequence of a request has it
NUM_TOKENS = 12  # all but the last as a prefill, the last as a decode
# Errors accumulate alike with and without the adapter, so the base's own is the measure.
_TIMES_BASE_ERROR = 4
_TIMES_EPSILON = 16
# A strong adapter's activations outgrow the base's, and their rounding with them: measured up to
# 1.3e-5 of the effect in fp32. What is wrong is never so small a part of what an adapter does.
_SHARE_OF_EFFECT = 1e-4

Delta = dict[tuple[int, int], tuple[Tensor, Tensor, float]]  # (layer, module): A, B^T, scaling


class AdapterProber:
    """Implements `seams.Prober`: the file is read in a thread, the forwards belong to the engine's.

    store_root: of the content-addressed store.
    """

    def __init__(self, decoder: Decoder, pool: PagePool, block_size: int, store_root: Path) -> None:
        self._decoder = decoder
        self._pool = pool
        self._block_size = block_size
        self._store = AdapterStore(store_root)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-prober")
        self._tokens = probe_tokens(decoder.config.vocab_size).to(decoder.embedding.device)
        self._base: tuple[Tensor, float] | None = None  # reference logits, error of the paged path

    def read(self, digest: str) -> Future[LoadedAdapter]:
        """The adapter's tensors, from its files. Raises in the future what `load_weights` does."""
        dtype = self._decoder.embedding.dtype
        return self._reader.submit(lambda: load_weights(self._store.path(digest), dtype))

    @torch.inference_mode()
    def run_paged(self, digest: str) -> Tensor:
        """`[NUM_TOKENS, vocab]` through the adapter's pages, which must be on the device."""
        return paged_logits(self._decoder, self._pool, self._block_size, self._tokens, digest)

    @torch.inference_mode()
    def compare(self, loaded: LoadedAdapter, paged: Tensor) -> AdapterProbe:
        """paged: of `run_paged`."""
        device, dtype = self._tokens.device, self._decoder.embedding.dtype
        if self._base is None:
            without = reference_logits(self._decoder, self._tokens, {})
            paged_base = paged_logits(
                self._decoder, self._pool, self._block_size, self._tokens, None
            )
            self._base = without, _distance(paged_base, without)
        without, base_error = self._base
        expected = reference_logits(
            self._decoder,
            self._tokens,
            {
                key: (m.a.to(device).float(), m.bt.to(device).float(), m.scaling)
                for key, m in loaded.modules.items()
            },
        )
        error = _distance(paged, expected)
        effect = _distance(expected, without)
        tolerance = max(
            _TIMES_BASE_ERROR * base_error,
            _TIMES_EPSILON * torch.finfo(dtype).eps,
            _SHARE_OF_EFFECT * effect,
        )
        return AdapterProbe(
            digest=loaded.digest,
            agrees=error <= tolerance,  # False for NaN, too
            error=error,
            tolerance=tolerance,
            base_error=base_error,
            effect=effect,
        )

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)


def probe_tokens(vocab_size: int) -> Tensor:
    """`[NUM_TOKENS]` int64, always the same, so the base model is run once."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, NUM_TOKENS))


def reference_logits(decoder: Decoder, token_ids: Tensor, delta: Delta) -> Tensor:
    """`[T] -> [T, vocab]` fp32, by the shortest way that could be right."""
    config, dtype = decoder.config, decoder.embedding.dtype
    positions = torch.arange(len(token_ids), device=token_ids.device)
    cos, sin = (part[:, None].float() for part in decoder.rope(positions))
    behind = positions[:, None] - positions[None, :]  # how far the query is after the key

    def linear(i: int, base: Linear, x: Tensor, *modules: Module) -> Tensor:
        y = base(x.to(dtype)).float()
        column = 0
        for module in modules:
            width = config.module_shapes[module][1]
            if (i, int(module)) in delta:
                a, bt, scaling = delta[i, int(module)]
                y[:, column : column + width] += (x @ a.t() @ bt) * scaling
            column += width
        return y

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + config.rms_norm_eps) * weight.float()

    residual = decoder.embedding[token_ids].float()
    x = norm(residual, decoder.first_norm)
    for i, layer in enumerate(decoder.layers):
        qkv = linear(i, layer.qkv, x, *QKV)
        heads = qkv.view(len(token_ids), -1, config.head_dim)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(heads, sizes, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k = (part * cos + _turned(part) * sin for part in (q, k))
        sees = behind >= 0
        if layer.sliding_window is not None:
            sees &= behind < layer.sliding_window
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        x = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sees, enable_gqa=True
        )
        residual = residual + linear(i, layer.o, x.transpose(0, 1).flatten(1), Module.O)
        x = norm(residual, layer.post_attention_norm)
        gate, up = linear(i, layer.gate_up, x, *GATE_UP).chunk(2, dim=-1)
        x = torch.nn.functional.silu(gate) * up
        residual = residual + linear(i, layer.down, x, Module.DOWN)
        x = norm(residual, layer.next_norm)
    return decoder.logits(x.to(dtype)).float()


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def paged_logits(
    decoder: Decoder, pool: PagePool, block_size: int, token_ids: Tensor, digest: str | None
) -> Tensor:
    """The way requests go: pages, block tables, a prefill and a decode. `[T, vocab]` fp32.

    digest: None for the base model.
    """
    for arrival in () if digest is None else pool.arriving([digest]):
        arrival.wait(arrival.num_layers - 1)
    config, device = decoder.config, token_ids.device
    num_blocks = -(-NUM_TOKENS // block_size)
    kv = decoder.ops.kv_cache(
        config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim,
        decoder.embedding.dtype, device,
    )  # fmt: skip
    hidden = []
    for start, end in ((0, NUM_TOKENS - 1), (NUM_TOKENS - 1, NUM_TOKENS)):
        lora = None if digest is None else _lora_batch(pool, digest, end - start, device)
        batch = _attention_batch(start, end, num_blocks, device)
        hidden.append(decoder.forward(token_ids[start:end], kv, batch, lora).clone())
    return decoder.logits(torch.cat(hidden)).float()


def _lora_batch(pool: PagePool, digest: str, rows: int, device: torch.device) -> LoraBatch:
    pages = pool.pages(digest)
    tile = (0, rows, 0, len(pages))
    return LoraBatch(
        tables=PageTables(
            pool.arena, pool.offset_a, pool.offset_b, pool.live_ranks, pool.scaling, pool.version
        ),
        tiles=torch.tensor([tile], dtype=torch.int32, device=device),
        page_ids=torch.tensor(pages, dtype=torch.int32, device=device),
        page_weights=torch.ones(len(pages), device=device),
        max_pages=len(pages),
        host_tiles=[tile],
        host_page_ids=pages,
        host_page_weights=[1.0] * len(pages),
        adapted=pool.adapted(digest),
    )


def _attention_batch(start: int, end: int, num_blocks: int, device: torch.device) -> AttentionBatch:
    """One sequence in blocks 0, 1, ..., so a token's slot is its position."""
    positions = torch.arange(start, end, device=device)
    blocks = list(range(num_blocks))
    return AttentionBatch(
        positions=positions,
        slot_mapping=positions,
        block_tables=torch.tensor([blocks], dtype=torch.int32, device=device),
        query_start=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        context_lens=torch.tensor([end], dtype=torch.int32, device=device),
        num_decodes=int(end - start == 1),
        seq_ids=[PROBE_SEQ_ID],
        host_query_start=[0, end - start],
        host_context_lens=[end],
        host_block_tables=[blocks],
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())

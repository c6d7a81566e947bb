"""Proof that an adapter does here what its files say: the paged path against plain arithmetic.

A dozen tokens run through the decoder with the adapter's pages and lane, as a prefill and a decode
step, and through a reference that never saw either (`reference.py`): fp32, dense attention,
`x A^T B^T * scaling` straight from the file's tensors, DoRA's norms from the model's files. Only
the base model's weight products are shared. Three numbers come out, each a norm of logits'
differences relative to the norm of the logits:

    error       paged - reference, with the adapter
    base_error  paged - reference, without it: what rounding alone does in this model
    effect      with - without the adapter, both by the reference

A wrong scaling, gain or shift, a swapped or missing module and a wrong transposition show as an
error the size of the effect. An effect of zero is an adapter that changes nothing. An activated
LoRA applies from a token in the middle on, whatever its invocation tokens are.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.extras import Key
from loraplex.adapters.pool import PagePool
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.weights import LoadedAdapter, load_weights
from loraplex.engine.api import AdapterProbe, AdapterUse
from loraplex.engine.lane import Lane, Lanes
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model import Decoder
from loraplex.engine.reference import Adapter, dora_norms, reference_logits
from loraplex.kernels.ops import AttentionBatch, LoraBatch, PageTables

PROBE_SEQ_ID = -1  # no sequence of a request has it
NUM_TOKENS = 12  # all but the last as a prefill, the last as a decode
ACTIVATED_AT = 5  # where an activated LoRA begins: inside the prefill
# Errors accumulate alike with and without the adapter, so the base's own is the measure.
_TIMES_BASE_ERROR = 4
_TIMES_EPSILON = 16
# A strong adapter's activations outgrow the base's, and their rounding with them: measured up to
# 1.3e-5 of the effect in fp32. What is wrong is never so small a part of what an adapter does.
_SHARE_OF_EFFECT = 1e-4


@dataclass(frozen=True, slots=True)
class FromFiles:
    """norms: of its weights, where they matter (`reference.dora_norms`)."""

    loaded: LoadedAdapter
    norms: dict[Key, Tensor] = field(default_factory=dict)


class AdapterProber:
    """Implements `seams.Prober`: files are read in a thread, the forwards belong to the engine's.

    store_root: of the content-addressed store. model_dir: of the base model's checkpoint.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: PagePool,
        block_size: int,
        store_root: Path,
        model_dir: Path,
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._block_size = block_size
        self._store = AdapterStore(store_root)
        self._model_dir = model_dir
        self._lanes = Lanes(pool, decoder.lane_model)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-prober")
        self._tokens = probe_tokens(decoder.config.vocab_size).to(decoder.embedding.device)
        self._base: tuple[Tensor, float] | None = None  # reference logits, error of the paged path

    def read(self, digest: str) -> Future[FromFiles]:
        """What the files say. Raises in the future what `load_weights` does, and ModelError."""
        return self._reader.submit(self._read, digest)

    def _read(self, digest: str) -> FromFiles:
        dtype = self._decoder.embedding.dtype
        loaded = load_weights(self._store.path(digest), dtype)
        if not loaded.extras.magnitudes:
            return FromFiles(loaded)
        # One thread computes here, however many do for the steps.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with Checkpoint(self._model_dir) as checkpoint:
                norms = dora_norms(loaded, checkpoint, self._decoder.config, dtype)
        finally:
            torch.set_num_threads(num_threads)  # also the default of threads to come
        return FromFiles(loaded, norms)

    @torch.inference_mode()
    def run_paged(self, source: FromFiles) -> Tensor:
        """`[NUM_TOKENS, vocab]` the way requests go; it must be on the device."""
        loaded = source.loaded
        return self._paged(self._tokens_for(loaded), loaded.digest, _first(loaded))

    @torch.inference_mode()
    def compare(self, source: FromFiles, paged: Tensor) -> AdapterProbe:
        """paged: of `run_paged`."""
        loaded, dtype = source.loaded, self._decoder.embedding.dtype
        tokens = self._tokens_for(loaded)
        without, base_error = self._without(tokens)
        adapter = Adapter.of(loaded, source.norms, tokens.device, _first(loaded))
        expected = reference_logits(self._decoder, tokens, adapter)
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

    def _tokens_for(self, loaded: LoadedAdapter) -> Tensor:
        """Those of everybody; with some of the adapter's own tokens, if it has any, in between."""
        if loaded.extras.token_rows is None:
            return self._tokens
        tokens, own = self._tokens.clone(), loaded.extras.token_rows.ids[: NUM_TOKENS // 2]
        tokens[: 2 * len(own) : 2] = own.to(tokens.device)
        return tokens

    def _without(self, tokens: Tensor) -> tuple[Tensor, float]:
        """The base model: logits by the reference, and how far off the usual way is."""
        if tokens is self._tokens and self._base is not None:
            return self._base
        without = reference_logits(self._decoder, tokens, Adapter())
        found = without, _distance(self._paged(tokens, None), without)
        if tokens is self._tokens:
            self._base = found
        return found

    def _paged(self, tokens: Tensor, digest: str | None, first: int = 0) -> Tensor:
        return paged_logits(
            self._decoder, self._pool, self._block_size, tokens, digest, self._lanes, first
        )

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)


def _first(loaded: LoadedAdapter) -> int:
    """Position from which it applies to the probe's tokens."""
    return ACTIVATED_AT if loaded.invocation_tokens else 0


def probe_tokens(vocab_size: int) -> Tensor:
    """`[NUM_TOKENS]` int64, always the same, so the base model is run once."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, NUM_TOKENS))


def paged_logits(
    decoder: Decoder,
    pool: PagePool,
    block_size: int,
    token_ids: Tensor,
    digest: str | None,
    lanes: Lanes,
    first: int = 0,
) -> Tensor:
    """The way requests go: pages, lane, block tables, a prefill and a decode. `[T, vocab]` fp32.

    digest: None for the base model. first: position from which the adapter applies.
    """
    for arrival in () if digest is None else pool.arriving([digest]):
        arrival.wait(arrival.num_layers - 1)
    config, device = decoder.config, token_ids.device
    num_blocks = -(-NUM_TOKENS // block_size)
    kv = decoder.ops.kv_cache(
        config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim,
        decoder.embedding.dtype, device,
    )  # fmt: skip
    adapters = () if digest is None else (AdapterUse(digest),)

    def lane_of(rows: int) -> Lane | None:
        return lanes.find([(0, rows, adapters)])

    hidden = []
    for start, end in ((0, NUM_TOKENS - 1), (NUM_TOKENS - 1, NUM_TOKENS)):
        active = range(max(0, first - start), end - start)  # rows
        lora = None if digest is None else _lora_batch(pool, digest, active, device)
        batch = _attention_batch(start, end, num_blocks, device)
        lane = lane_of(end - start)
        hidden.append(decoder.forward(token_ids[start:end], kv, batch, lora, lane=lane).clone())
    lane = lane_of(NUM_TOKENS)
    return decoder.logits(torch.cat(hidden), lane and lane.at(range(NUM_TOKENS))).float()


def _lora_batch(pool: PagePool, digest: str, rows: range, device: torch.device) -> LoraBatch | None:
    pages = pool.pages(digest)
    if not pages:
        return None
    tile = (rows.start, len(rows), 0, len(pages))
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

"""Digests of the base model's embedding and head, to tell copies of them in adapters.

PEFT writes the base model's own table beside a LoRA of the embedding or of the head. Such a copy
changes nothing and need not be kept; a table that is no copy must be. Hashing overlaps with
reading the other weights: 1 GiB of bf16 takes about a second of one core.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.digest import ValuesDigest
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model_config import DecoderConfig

_CHUNK_ROWS = 1024


class TableDigests:
    """Begins to hash at once. The checkpoint stays open until `result` is back."""

    def __init__(self, checkpoint: Checkpoint, model: DecoderConfig) -> None:
        """A checkpoint that lacks them is refused by whoever loads it."""
        paths = ["model.embed_tokens"] + ([] if model.tie_word_embeddings else ["lm_head"])
        self._pool = ThreadPoolExecutor(len(paths), thread_name_prefix="table-digest")
        self._digests: dict[str, Future[str]] = {
            path: self._pool.submit(table_digest, checkpoint.read(f"{path}.weight"))
            for path in paths
            if f"{path}.weight" in checkpoint
        }

    def result(self) -> dict[str, str]:
        """By path of the module."""
        digests = {path: digest.result() for path, digest in self._digests.items()}
        self._pool.shutdown()
        return digests


def table_digest(table: Tensor) -> str:
    digest = ValuesDigest()
    for rows in torch.split(table, _CHUNK_ROWS):
        if rows.dtype == torch.bfloat16:
            digest.update(rows.contiguous().view(torch.int16).numpy().view(np.uint16))
        else:
            digest.update(rows.float().contiguous().numpy())
    return digest.hexdigest()

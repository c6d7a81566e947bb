"""A GPU runner on a tiny model, on the CPU: operations in plain torch that read its metadata."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.weights import load_weights
from loraplex.engine.gpu.graphs import RepeatedCalls
from loraplex.engine.gpu.runner import GpuRunner, RunnerLimits
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model import load_decoder
from loraplex.engine.model_config import read_model_config
from loraplex.engine.sampling import Sampled, Sampler
from loraplex.engine.sequence import Sequence

# `--import-mode=importlib` leaves the folder off sys.path: load the helpers by their file, once.
for _name in ("device_ops", "meta_runner", "steps"):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])

CPU = torch.device("cpu")
MAX_SEQS, MAX_TOKENS, MAX_BLOCKS, BLOCK_SIZE = 8, 48, 8, 16


@dataclass(frozen=True, slots=True)
class HostSampled:
    token_ids: Tensor
    sampled: Sampled


class HostSampler:
    """The CPU's sampler behind the device sampler's methods."""

    def __init__(self, vocab_size: int) -> None:
        self._sampler = Sampler(vocab_size, CPU)
        self.forgotten: list[int] = []

    def forget(self, state_rows: list[int]) -> None:
        self.forgotten += state_rows

    def launch(
        self, logits: Tensor, items: list[tuple[Sequence, int, int]], last_tokens: Tensor
    ) -> HostSampled:
        sampled = self._sampler.sample(logits, [seq for seq, _, _ in items])
        self._sampler.forget([seq.seq_id for seq, _, _ in items])
        token_ids = torch.tensor(sampled.token_ids)
        last_tokens[[row for _, row, _ in items]] = token_ids
        return HostSampled(token_ids, sampled)

    def collect(self, handle: HostSampled) -> Sampled:
        return handle.sampled


@pytest.fixture
def make_runner(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Callable[..., tuple[GpuRunner, PagePool, dict[str, str]]]:
    """`make_runner(family="llama", ops=DeviceOps())`: with all adapters on the device."""

    def make(
        family: str = "llama",
        ops: Any = None,
        sampler: Any = None,
        graphs: Any = None,
        *,
        capture: bool = True,
        max_num_seqs: int = MAX_SEQS,
        **settings: Any,
    ) -> tuple[GpuRunner, PagePool, dict[str, str]]:
        ops = sys.modules["device_ops"].DeviceOps() if ops is None else ops
        model = tiny_model(family)
        config = read_model_config(model)
        with Checkpoint(model) as checkpoint:
            decoder = load_decoder(config, checkpoint, ops, torch.float32, CPU)
        pool = PagePool(config.num_layers, config.module_shapes, 8 << 20, torch.float32, CPU)
        root = tmp_path / "store"
        digests = store_adapters(root, model, tiny_adapters(model))
        for digest in digests.values():
            weights = load_weights(AdapterStore(root).path(digest), torch.float32)
            pool.install(digest, pool.build_image(weights))
        kv = ops.kv_cache(
            config.num_layers, MAX_SEQS * MAX_BLOCKS * 2, BLOCK_SIZE, config.num_kv_heads,
            config.head_dim, torch.float32, CPU,
        )  # fmt: skip
        limits = RunnerLimits(
            max_num_seqs=max_num_seqs, max_num_tokens=MAX_TOKENS, max_blocks=MAX_BLOCKS
        )
        runner = GpuRunner(
            decoder,
            kv,
            pool,
            HostSampler(config.vocab_size) if sampler is None else sampler,
            RepeatedCalls() if graphs is None else graphs,
            limits,
            CPU,
            **settings,
        )
        if capture:
            runner.graphs.capture()
        return runner, pool, digests

    return make

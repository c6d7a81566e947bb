"""A GPU runner on a tiny model. On the CPU its operations are plain torch that reads its metadata;
tests marked `gpu` have it on a GPU, with the real ones.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.pool import PagePool
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.weights import load_weights
from loraplex.engine.gpu.graphs import CudaGraphs, RepeatedCalls
from loraplex.engine.gpu.runner import GpuRunner, RunnerLimits
from loraplex.engine.gpu.sampler import DeviceSampler
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model import load_decoder
from loraplex.engine.model_config import read_model_config
from loraplex.engine.sampling import Sampled, Sampler
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.launch import is_interpreted
from loraplex.kernels.gpu.ops import TritonOps

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


@pytest.fixture(autouse=True)
def _where_it_can_run(request: pytest.FixtureRequest) -> None:
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not on_gpu and not is_interpreted():
        pytest.skip("kernels are compiled here, so they cannot run on the CPU")


@pytest.fixture(autouse=True)
def _dirty_memory() -> Iterator[None]:
    """What nobody wrote is NaN, or a number far too large: whoever uses it is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def make_runner(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Callable[..., tuple[GpuRunner, PagePool, dict[str, str]]]:
    """`make_runner(family="llama", ops=..., device=CPU)`: with all adapters on the device."""

    def make(
        family: str = "llama",
        ops: Any = None,
        sampler: Any = None,
        graphs: Any = None,
        *,
        device: torch.device = CPU,
        capture: bool = True,
        max_num_seqs: int = MAX_SEQS,
        **settings: Any,
    ) -> tuple[GpuRunner, PagePool, dict[str, str]]:
        on_cpu = device.type == "cpu"
        if ops is None:
            ops = sys.modules["device_ops"].DeviceOps() if on_cpu else TritonOps(**settings)
        model = tiny_model(family)
        config = read_model_config(model)
        with Checkpoint(model) as checkpoint:
            decoder = load_decoder(config, checkpoint, ops, torch.float32, device)
        pool = PagePool(config.num_layers, config.module_shapes, 8 << 20, torch.float32, device)
        root = tmp_path / "store"
        digests = store_adapters(root, model, tiny_adapters(model))
        for digest in digests.values():
            weights = load_weights(AdapterStore(root).path(digest), torch.float32)
            pool.install(digest, pool.build_image(weights))
        kv = ops.kv_cache(
            config.num_layers, MAX_SEQS * MAX_BLOCKS * 2, BLOCK_SIZE, config.num_kv_heads,
            config.head_dim, torch.float32, device,
        )  # fmt: skip
        limits = RunnerLimits(
            max_num_seqs=max_num_seqs, max_num_tokens=MAX_TOKENS, max_blocks=MAX_BLOCKS
        )
        if sampler is None:
            vocab_size = config.vocab_size
            sampler = (
                HostSampler(vocab_size)
                if on_cpu
                else DeviceSampler(vocab_size, max_num_seqs, device)
            )
        if graphs is None:
            graphs = RepeatedCalls() if on_cpu else CudaGraphs()
        runner = GpuRunner(decoder, kv, pool, sampler, graphs, limits, device, **settings)
        if capture:
            runner.graphs.capture()
        return runner, pool, digests

    return make

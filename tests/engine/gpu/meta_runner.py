"""A GPU runner of a real model on the meta device: every launch is listed, nothing is computed.

Whatever asks for a value of a device tensor fails by itself, since there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from loraplex.adapters.extras import Extras, TableLora, TokenRows
from loraplex.adapters.extras_parts import ExtrasShape, dtype_of
from loraplex.adapters.pool import PagePool
from loraplex.adapters.transport import HostTransport
from loraplex.adapters.weights import LoadedAdapter, LoadedModule
from loraplex.engine.api import AdapterUse
from loraplex.engine.gpu.graphs import RepeatedCalls
from loraplex.engine.gpu.runner import GpuRunner, RunnerLimits
from loraplex.engine.gpu.sampler import DeviceSampler
from loraplex.engine.model import load_decoder
from loraplex.engine.model_config import decoder_config
from loraplex.kernels.gpu.launch import Launch, recording
from loraplex.kernels.gpu.ops import TritonOps

META = torch.device("meta")
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
MAX_SEQS, MAX_TOKENS, MAX_BLOCKS = 24, 512, 128


class MetaTransport(HostTransport):
    def upload(self, values: Tensor) -> Tensor:
        return values.to(META)


class MetaCheckpoint:
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def check(self, expected: Any, ignored: Any = ()) -> None:
        assert expected == self._shapes

    def read_stacked(self, names: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
        shapes = [self._shapes[name] for name in names]
        rows = sum(shape[0] for shape in shapes)
        return torch.empty((rows, *shapes[0][1:]), dtype=dtype, device=device)


@dataclass
class Traffic:
    """Copies between the devices, as (operation, numbers in it)."""

    to_device: list[tuple[str, int]] = field(default_factory=list)
    to_host: list[tuple[str, int]] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Counts copies between the host and the meta device, and lets those to the host do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            if args[1].is_meta:
                assert kwargs or args[2:], "a copy to the host that waits"
                self.traffic.to_host.append((name, args[1].numel()))
                return args[0]
            self.traffic.to_device.append((name, args[1].numel()))
        result = func(*args, **(kwargs or {}))
        if name == "_to_copy" and result.is_meta != args[0].is_meta:
            self.traffic.to_device.append((name, result.numel()))
        return result


def make_meta_runner(
    family: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> tuple[GpuRunner, PagePool]:
    config = decoder_config(AutoConfig.for_model(family, **LLAMA))
    ops = TritonOps(**settings)
    checkpoint: Any = MetaCheckpoint(config.tensor_shapes())
    decoder = load_decoder(config, checkpoint, ops, dtype, META)
    pool = PagePool(config.num_layers, config.module_shapes, 256 << 20, dtype, META)
    pool._transport = MetaTransport()
    kv = ops.kv_cache(
        config.num_layers, 4096, 16, config.num_kv_heads, config.head_dim, dtype, META
    )
    runner = GpuRunner(
        decoder,
        kv,
        pool,
        DeviceSampler(config.vocab_size, MAX_SEQS, META),
        RepeatedCalls(),
        RunnerLimits(max_num_seqs=MAX_SEQS, max_num_tokens=MAX_TOKENS, max_blocks=MAX_BLOCKS),
        META,
        **settings,
    )
    return runner, pool


@contextmanager
def watched() -> Iterator[tuple[list[Launch], Traffic]]:
    """Within the block launches are listed and copies counted."""
    with recording() as notes, Watch() as watch:
        yield notes, watch.traffic


@contextmanager
def dummy_extras(pool: PagePool) -> Iterator[AdapterUse]:
    """An adapter of every format, with values nobody reads, for as long as the block runs."""
    hidden, vocab, cpu = LLAMA["hidden_size"], LLAMA["vocab_size"], torch.device("cpu")

    def zeros(*shape: int, dtype: torch.dtype = pool.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=cpu)

    def factors(inputs: int, outputs: int) -> TableLora:
        return TableLora(zeros(inputs, 4), zeros(4, outputs), 4, 1.0)

    (q_in, q_out), (down_in, down_out) = pool.module_shapes[0], pool.module_shapes[6]
    extras = Extras(
        magnitudes={(0, 0): zeros(q_out, dtype=torch.float32)},
        delta_biases={(1, 6): zeros(down_out, dtype=torch.float32)},
        linears={(0, 6): zeros(down_out, down_in)},
        norms={"model.norm": zeros(hidden), "model.layers.0.input_layernorm": zeros(hidden)},
        embedding=zeros(vocab, hidden),
        head=zeros(vocab, hidden),
        embedding_lora=factors(vocab, hidden),
        head_lora=factors(hidden, vocab),
        token_rows=TokenRows(torch.arange(3), zeros(3, hidden), in_head=True),
    )
    modules = {(0, 0): LoadedModule(zeros(4, q_in), zeros(4, q_out), 4, 1.0)}
    parts: dict[Any, Tensor] = {}
    for part in ExtrasShape.of(extras).parts(pool.module_shapes, pool.dtype):
        dtype = dtype_of(part.name) or pool.dtype
        width = part.row_elements * pool.dtype.itemsize // dtype.itemsize
        parts[part.name] = zeros(part.rows, width, dtype=dtype)
    image = pool.build_image(LoadedAdapter("extras", 4, modules, extras), parts=parts)
    pool.install("extras", image)
    try:
        yield AdapterUse("extras")
    finally:
        pool.remove("extras")

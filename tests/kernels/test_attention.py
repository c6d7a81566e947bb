"""Attention over steps against the reference: chunks, windows, grouped heads, preemption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from kernel_cases import Sequences, Shape, close, interpreted_ops, new_cache, rand

from loraplex.kernels.gpu.kv_cache import PagedKVCache
from loraplex.kernels.native_build import BuildError
from loraplex.kernels.native_ops import NativeOps
from loraplex.kernels.ops import AttentionBatch, KVCache, Ops
from loraplex.kernels.torch_attention import TorchKVCache
from loraplex.kernels.torch_ops import TorchOps

DTYPES = [torch.float32, torch.bfloat16]


# On a CPU sequences are cut into parts when threads would idle: check both ways.
BACKENDS = [("torch", 1), ("torch", 3), ("native", 1), ("native", 3)]
TRITON = ("triton", 1)


def each_backend(name: str, values: Sequence[object], *, triton: object) -> pytest.MarkDecorator:
    """Every value of a parameter with every backend; with Triton's slow interpreter only one."""
    grid = [(backend, value) for backend in BACKENDS for value in values]
    return pytest.mark.parametrize(
        ("ops", name), [*grid, (TRITON, triton)], indirect=["ops"], ids=str
    )


@pytest.fixture(params=[*BACKENDS, TRITON], ids=str)
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    name, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield {"torch": TorchOps, "native": NativeOps, "triton": interpreted_ops}[name]()
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Runner:
    """Runs steps through a backend and the reference, comparing attention in every layer."""

    def __init__(
        self, ops: Ops, shape: Shape, dtype: torch.dtype, kv: KVCache | None = None
    ) -> None:
        self.ops, self.shape, self.dtype = ops, shape, dtype
        self.kv = kv or new_cache(ops, shape, dtype)
        self.sequences = Sequences(shape)

    def step(self, work: list[tuple[int, int]], window: int | None = None) -> AttentionBatch:
        s = self.shape
        batch = self.sequences.step(work)
        rows = sum(count for _, count in work)
        cos, sin = torch.ones(rows, s.head_dim), torch.zeros(rows, s.head_dim)
        for layer in range(s.layers):
            qkv = rand(rows, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, dtype=self.dtype)
            heads = qkv.clone().view(rows, -1, s.head_dim)
            q, k = heads[:, : s.num_heads], heads[:, s.num_heads : s.num_heads + s.num_kv_heads]
            self.sequences.remember(layer, batch, k, heads[:, s.num_heads + s.num_kv_heads :])
            got = self.ops.rope_kv_write(
                qkv, None, None, layer, cos, sin, None, None, 1e-6, s.num_heads, self.kv, batch
            )
            scale = s.head_dim**-0.5
            out = self.ops.attention(got, self.kv, layer, batch, scale, window)
            expected = self.sequences.attention(layer, batch, q, scale, window)
            close(out, expected, self.dtype)
        return batch


@pytest.mark.parametrize("dtype", DTYPES)
@each_backend("group", [1, 2, 3, 4, 5, 8], triton=3)
@pytest.mark.parametrize("head_dim", [10, 64, 96])
def test_grouped_heads(ops: Ops, dtype: torch.dtype, group: int, head_dim: int) -> None:
    shape = Shape(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim, layers=1)
    runner = Runner(ops, shape, dtype)
    runner.step([(0, 21), (1, 16), (2, 2)])
    for _ in range(3):
        runner.step([(0, 1), (1, 1), (2, 1)])


@each_backend(
    "dtype_window", list(product(DTYPES, [None, 1, 7, 16, 40])), triton=(torch.float32, 7)
)
def test_chunks_windows_and_mixed_steps(
    ops: Ops, dtype_window: tuple[torch.dtype, int | None]
) -> None:
    dtype, window = dtype_window
    runner = Runner(ops, Shape(), dtype)
    runner.step([(0, 1), (1, 30)], window)
    runner.step([(0, 1), (1, 17), (2, 5)], window)  # chunked prefill beside a decode
    runner.step([(1, 1), (0, 1), (2, 20)], window)
    for _ in range(18):  # across a block edge
        runner.step([(2, 1), (0, 1), (1, 1)], window)


@each_backend("dtype", DTYPES, triton=torch.float32)
def test_long_contexts_are_cut_for_idle_threads(ops: Ops, dtype: torch.dtype) -> None:
    shape = Shape(num_heads=2, num_kv_heads=1, layers=1)
    runner = Runner(ops, shape, dtype, new_cache(ops, shape, dtype, num_blocks=128))
    runner.sequences = Sequences(shape, num_blocks=128)
    runner.step([(0, 700), (1, 290)])
    for window in (None, 500, 100):
        runner.step([(0, 1), (1, 1)], window)


@each_backend("dtype", DTYPES, triton=torch.float32)
def test_sequences_come_and_go(ops: Ops, dtype: torch.dtype) -> None:
    runner = Runner(ops, Shape(), dtype)
    runner.step([(i, 10 + 7 * i) for i in range(4)])
    runner.step([(i, 1) for i in range(4)])
    runner.step([(3, 1), (1, 1)])  # two leave, the others change places
    runner.step([(1, 1), (3, 1), (9, 12)])
    runner.step([(9, 1), (1, 1), (0, 1), (3, 1)])  # one returns after standing still
    runner.step([(0, 1), (9, 1)])


@each_backend("dtype", DTYPES, triton=torch.float32)
@pytest.mark.parametrize("kept", [0, 16])
def test_a_preempted_sequence_returns_with_a_shorter_context(
    ops: Ops, dtype: torch.dtype, kept: int
) -> None:
    """Same id, other contents: nothing kept under the id may be used."""
    runner = Runner(ops, Shape(), dtype)
    runner.step([(0, 40), (1, 20)])
    runner.step([(0, 1), (1, 1)])
    runner.sequences.drop(0, keep=kept)
    runner.step([(1, 1), (0, 23)])
    runner.step([(0, 1), (1, 1)])
    # At once, without a prefill step between: one token again, on fresh blocks.
    runner.sequences.drop(0)
    runner.step([(0, 1), (1, 1)])
    runner.step([(0, 1), (1, 1)])


@each_backend("dtype", DTYPES, triton=torch.float32)
def test_a_step_is_repeated_at_the_same_length(ops: Ops, dtype: torch.dtype) -> None:
    """A sequence that loses its last token and computes it again, in the same block."""
    runner = Runner(ops, Shape(), dtype)
    runner.step([(0, 20)])
    runner.step([(0, 1)])
    runner.sequences.drop(0, keep=20)
    runner.step([(0, 1)])
    runner.step([(0, 1)])


@each_backend("dtype", DTYPES, triton=torch.float32)
def test_sequences_share_prefix_blocks_and_copy_on_write(ops: Ops, dtype: torch.dtype) -> None:
    runner = Runner(ops, Shape(), dtype)
    sequences = runner.sequences
    runner.step([(0, 24)])
    # Sequence 1 starts from the 24 tokens of 0: a shared block and a copy of the half-full one.
    copy = sequences.free.pop()
    runner.kv.copy_block(sequences.tables[0][1], copy)
    sequences.tables[1] = [sequences.tables[0][0], copy]
    sequences.lengths[1] = 24
    for layer in range(runner.shape.layers):
        sequences.keys[layer, 1] = sequences.keys[layer, 0]
        sequences.values[layer, 1] = sequences.values[layer, 0]
    runner.step([(0, 1), (1, 1)])
    runner.step([(1, 1), (0, 1)])


@pytest.mark.parametrize("mirror_bytes", [0, 1 << 15, 1 << 18])
def test_the_mirror_stays_within_its_bytes(mirror_bytes: int) -> None:
    shape = Shape()
    kv = TorchKVCache(
        shape.layers, 64, 16, 2, shape.head_dim, torch.float32, torch.device("cpu"), mirror_bytes
    )
    runner = Runner(TorchOps(), shape, torch.float32, kv)
    runner.step([(i, 20 + i) for i in range(6)])
    for count in (1, 3, 6, 6, 2, 6):
        runner.step([(i, 1) for i in range(count)])
        assert kv.mirror.nbytes <= mirror_bytes
    assert bool(kv.mirror.nbytes) == (mirror_bytes == 1 << 18)


def test_the_mirror_gathers_a_sequence_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(TorchOps(), Shape(), torch.float32)
    assert isinstance(runner.kv, TorchKVCache)
    mirror, gathered = runner.kv.mirror, []
    rows = mirror._rows
    monkeypatch.setattr(mirror, "_rows", lambda *a: gathered.append(a[0]) or rows(*a))
    runner.step([(0, 20), (1, 9)])
    for _ in range(5):
        runner.step([(0, 1), (1, 1)])
    assert len(gathered) == 2


def test_stale_pages_do_not_leak_into_attention(ops: Ops) -> None:
    """A reused block holds another sequence's values past the context: even NaN must not show."""
    runner = Runner(ops, Shape(layers=1), torch.float32)
    runner.step([(0, 32)])
    kv: Any = runner.kv
    for store in (*kv.keys, *kv.values) if isinstance(kv, PagedKVCache) else (kv.k, kv.v):
        store.fill_(float("nan"))
    runner.sequences.drop(0)
    runner.step([(0, 5)])
    runner.step([(0, 1)])
    runner.step([(0, 1)], window=2)


def test_unfit_block_and_head_sizes_are_refused() -> None:
    try:
        native = NativeOps()
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")
    with pytest.raises(ValueError, match="block_size 8"):
        new_cache(native, Shape(), torch.float32, size=8)
    with pytest.raises(ValueError, match="head_dim 7"):
        new_cache(native, Shape(head_dim=7), torch.float32)

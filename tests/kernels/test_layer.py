"""A small decoder made of the operations, in the model's order, against a full recompute in fp32.

Chunked prefill, decode, preemption and mixed adapters in one batch must give what one forward over
each whole sequence gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    Adapter,
    Sequences,
    Shape,
    cos_sin,
    interpreted_ops,
    make_lora,
    make_pool,
    new_cache,
    rand,
)
from torch import Tensor

from loraplex.kernels import reference
from loraplex.kernels.native_build import BuildError
from loraplex.kernels.native_ops import NativeOps
from loraplex.kernels.ops import (
    GATE_UP,
    QKV,
    AttentionBatch,
    KVCache,
    Linear,
    LoraBatch,
    Module,
    Ops,
)
from loraplex.kernels.torch_ops import TorchOps

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
VOCABULARY = 50
Composition = list[tuple[int, float]]


class Decoder:
    def __init__(self, shape: Shape, dtype: torch.dtype, adapters: list[Adapter]) -> None:
        s, self.shape, self.dtype = shape, shape, dtype
        heads = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
        self.embedding = rand(VOCABULARY, s.hidden, dtype=dtype)

        def weight(out: int, width: int) -> Tensor:
            return rand(out, width, dtype=dtype, scale=width**-0.5)

        self.layers = [
            {
                "norm": 1 + rand(s.hidden, dtype=dtype, scale=0.1),
                "norm2": 1 + rand(s.hidden, dtype=dtype, scale=0.1),
                "q_norm": 1 + rand(s.head_dim, dtype=dtype, scale=0.1),
                "k_norm": 1 + rand(s.head_dim, dtype=dtype, scale=0.1),
                "qkv": weight(heads, s.hidden),
                "bias": rand(heads, dtype=dtype, scale=0.1),
                "o": weight(s.hidden, s.num_heads * s.head_dim),
                "gate_up": weight(2 * s.intermediate, s.hidden),
                "down": weight(s.hidden, s.intermediate),
            }
            for _ in range(s.layers)
        ]
        self.tables, self.pages = make_pool(s, adapters, dtype, scale=0.1)
        self.linears: list[dict[str, Linear]] = []

    def lora(self, rows: list[tuple[int, Composition]]) -> LoraBatch:
        return make_lora(self.tables, self.pages, rows)

    def step(
        self, ops: Ops, kv: KVCache, ids: Tensor, batch: AttentionBatch, lora: LoraBatch
    ) -> Tensor:
        """The order of a served model's forward."""
        s = self.shape
        if not self.linears:
            for w in self.layers:
                names = ("qkv", "o", "gate_up", "down")
                biases = (w["bias"], None, None, None)
                packed = {n: ops.linear(w[n], b) for n, b in zip(names, biases, strict=True)}
                self.linears.append(packed)
        cos, sin = cos_sin(batch, s.head_dim, self.dtype)
        residual = ops.embed(ids, self.embedding).clone()
        x = ops.rms_norm(residual, self.layers[0]["norm"], EPS)
        for i, w in enumerate(self.layers):
            linear = self.linears[i]
            following = self.layers[(i + 1) % s.layers]["norm"]
            t = ops.lora_shrink(x, lora, i, QKV)
            qkv = linear["qkv"](x)
            q = ops.rope_kv_write(
                qkv, t, lora, i, cos, sin, w["q_norm"], w["k_norm"], EPS, s.num_heads, kv, batch
            )
            x = ops.attention(q, kv, i, batch, s.head_dim**-0.5, None)
            t = ops.lora_shrink(x, lora, i, (Module.O,))
            x = ops.add_rms_norm(linear["o"](x), t, lora, i, Module.O, residual, w["norm2"], EPS)
            t = ops.lora_shrink(x, lora, i, GATE_UP)
            x = ops.swiglu(linear["gate_up"](x), t, lora, i)
            t = ops.lora_shrink(x, lora, i, (Module.DOWN,))
            y = linear["down"](x)
            x = ops.add_rms_norm(y, t, lora, i, Module.DOWN, residual, following, EPS)
        return x

    def whole(self, ids: list[int], composition: Composition) -> Tensor:
        """The last hidden state of every token, from scratch in fp32."""
        s, count = self.shape, len(ids)
        batch = Sequences(s).step([(0, count)])
        lora = self.lora([(count, composition)])
        cos, sin = cos_sin(batch, s.head_dim, self.dtype)
        residual = self.embedding[torch.tensor(ids)].float()

        def delta(x: Tensor, layer: int, module: Module) -> Tensor:
            return reference.lora_delta(x, lora, layer, module, s.widths(module)[1])

        x = reference.rms_norm(residual, self.layers[0]["norm"], EPS)
        for i, w in enumerate(self.layers):
            f = {name: value.float() for name, value in w.items()}
            qkv = x @ f["qkv"].t() + f["bias"] + torch.cat([delta(x, i, m) for m in QKV], 1)
            q, k, v = reference.rope_qkv(
                qkv,
                cos,
                sin,
                f["q_norm"],
                f["k_norm"],
                EPS,
                s.num_heads,
                s.num_kv_heads,
                s.head_dim,
            )
            x = reference.attention(q, [k], [v], batch, s.head_dim**-0.5, None)
            residual = residual + x @ f["o"].t() + delta(x, i, Module.O)
            x = reference.rms_norm(residual, f["norm2"], EPS)
            gate, up = (x @ f["gate_up"].t()).split(s.intermediate, 1)
            x = reference.swiglu(gate + delta(x, i, Module.GATE), up + delta(x, i, Module.UP))
            residual = residual + x @ f["down"].t() + delta(x, i, Module.DOWN)
            x = reference.rms_norm(residual, self.layers[(i + 1) % s.layers]["norm"], EPS)
        return x


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    torch.manual_seed(0)
    if request.param == "torch":
        return TorchOps()
    if request.param == "triton":
        return interpreted_ops()
    try:
        return NativeOps()
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")


def run(ops: Ops, model: Decoder) -> tuple[float, float]:
    """Serves four sequences over many steps. Returns the largest and the mean error."""
    shape = model.shape
    kv = new_cache(ops, shape, model.dtype)
    sequences = Sequences(shape)
    compositions: list[Composition] = [[(0, 1.0)], [(1, 1.0), (2, 0.5)], [], [(2, 1.0)]]
    ids = [torch.randint(0, VOCABULARY, (60,)).tolist() for _ in compositions]
    expected = [model.whole(i, c) for i, c in zip(ids, compositions, strict=True)]
    errors = []

    def step(work: list[tuple[int, int]]) -> None:
        starts = [sequences.lengths.get(seq, 0) for seq, _ in work]
        batch = sequences.step(work)
        new = [ids[q][a : a + n] for (q, n), a in zip(work, starts, strict=True)]
        tokens = torch.tensor([token for part in new for token in part])
        lora = model.lora([(n, compositions[seq]) for seq, n in work])
        out = model.step(ops, kv, tokens, batch, lora).float()
        target = [expected[q][a : a + n] for (q, n), a in zip(work, starts, strict=True)]
        errors.append((out - torch.cat(target)).abs().flatten())

    with torch.inference_mode():
        step([(0, 17), (1, 5)])
        step([(0, 1), (1, 20), (2, 33)])  # a decode beside chunks
        for _ in range(4):
            step([(2, 1), (0, 1), (1, 1)])
        sequences.drop(0, keep=16)  # preempted, comes back onto its prefix
        step([(1, 1), (2, 1), (3, 9)])
        step([(3, 1), (1, 1), (2, 1), (0, 12)])
        for _ in range(6):
            step([(0, 1), (1, 1), (2, 1), (3, 1)])
    everything = torch.cat(errors)
    return float(everything.max()), float(everything.mean())


ADAPTERS = [Adapter(8), Adapter(24), Adapter(16, modules=(Module.Q, Module.V, Module.DOWN))]


@pytest.mark.parametrize(
    ("ops", "dtype"),
    [(backend, dtype) for backend in ("torch", "native") for dtype in DTYPES]
    + [("triton", torch.float32)],  # once: the interpreter is slow
    indirect=["ops"],
    ids=str,
)
def test_steps_equal_one_forward(ops: Ops, dtype: torch.dtype) -> None:
    model = Decoder(Shape(hidden=64, head_dim=32, intermediate=96), dtype, ADAPTERS)
    largest, mean = run(ops, model)
    # States are normalised, about 1 in size; two layers of bf16 rounding.
    assert largest < (1e-4 if dtype == torch.float32 else 0.12)
    assert mean < (1e-5 if dtype == torch.float32 else 0.012)


def test_a_wrong_adapter_is_seen_in_the_states(ops: Ops) -> None:
    model = Decoder(Shape(hidden=64, head_dim=32, intermediate=96), torch.bfloat16, ADAPTERS)
    whole = model.whole

    def swapped(ids: list[int], composition: Composition) -> Tensor:
        return whole(ids, [(2 - adapter, weight) for adapter, weight in composition])

    model.whole = swapped  # type: ignore[method-assign]
    assert run(ops, model)[0] > 0.5


def test_tables_of_another_layer_are_not_used(ops: Ops) -> None:
    """Adapters of one layer only must leave the others alone."""
    shape = Shape(hidden=64, head_dim=32, intermediate=96, layers=3)
    model = Decoder(shape, torch.float32, [Adapter(16, layers=(i,)) for i in range(3)])
    assert run(ops, model)[0] < 1e-4

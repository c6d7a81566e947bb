"""Every backend against the reference, operation by operation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    Adapter,
    Sequences,
    Shape,
    close,
    cos_sin,
    interpreted_ops,
    make_lora,
    make_pool,
    new_cache,
    rand,
)

from loraplex.kernels import reference
from loraplex.kernels.native_build import BuildError
from loraplex.kernels.native_ops import NativeOps
from loraplex.kernels.ops import GATE_UP, QKV, LoraBatch, Module, Ops
from loraplex.kernels.torch_ops import TorchOps

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {
    "even": Shape(hidden=64, head_dim=32, intermediate=96),
    "odd": Shape(hidden=50, num_heads=3, num_kv_heads=1, head_dim=10, intermediate=77),
    "wide": Shape(hidden=320, num_heads=5, num_kv_heads=5, head_dim=64, intermediate=328),
}
ADAPTERS = [
    Adapter(1, alpha=2.0),
    Adapter(8),
    Adapter(16, alpha=5.0),
    Adapter(24, ranks={Module.V: 8, Module.DOWN: 40}),
    Adapter(64, alpha=64.0),
    Adapter(8, modules=(Module.Q, Module.V)),
    Adapter(16, layers=(1,)),
]
COMPOSITIONS = {
    "none": [(5, [])],
    "one token": [(1, [(1, 1.0)])],
    "decode": [(1, [(0, 1.0)]), (1, [(1, 1.0)]), (2, []), (1, [(3, 1.0)]), (2, [(4, 1.0)])],
    "composed": [
        (2, [(2, 0.5), (3, -1.5)]),
        (1, [(2, 1.0)]),
        (3, [(0, 0.25), (4, 0.75), (5, 1.0)]),
    ],
    "mixed tiles": [(1, [(1, 1.0)]), (41, [(4, 1.0)]), (7, []), (19, [(5, 1.0)]), (2, [(6, 1.0)])],
    "prefill": [(70, [(3, 1.0)])],
    "several prefills": [(33, [(1, 1.0)]), (34, [(2, 1.0)]), (1, [(0, 2.0)])],
}
BACKENDS = ("torch", "native", "triton")
# The interpreter is slow: of the Triton kernels everything once, and the matrix path in 16 bits.
GRID = [
    (backend, dtype, shape, composition)
    for backend in BACKENDS
    for dtype in DTYPES
    for shape in SHAPES
    for composition in COMPOSITIONS
    if backend != "triton"
    or (shape == "odd" and dtype == torch.float32)
    or (shape == "even" and dtype == torch.bfloat16 and composition in ("decode", "composed"))
]
each_case = pytest.mark.parametrize(
    ("ops", "dtype", "shape", "composition"), GRID, indirect=["ops"], ids=str
)


@pytest.fixture(scope="module", params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps()
    if request.param == "triton":
        return interpreted_ops()
    try:
        return NativeOps()
    except BuildError as error:
        pytest.skip(f"native kernels cannot be built here: {error}")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small shapes: waiting threads cost more than they bring. Several: see test_select."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(composition: str, shape: Shape, dtype: torch.dtype) -> tuple[int, LoraBatch]:
    rows = COMPOSITIONS[composition]
    tables, pages = make_pool(shape, ADAPTERS, dtype)
    return sum(count for count, _ in rows), make_lora(tables, pages, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
@pytest.mark.parametrize("hidden", [50, 64, 331])
def test_rms_norm(ops: Ops, dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, weight = rand(rows, hidden, dtype=dtype), rand(hidden, dtype=dtype)
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 8, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(ops: Ops, dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight, b = rand(70, 50, dtype=dtype, scale=0.2), rand(70, dtype=dtype) if bias else None
    x = rand(rows, 50, dtype=dtype)
    expected = x.float() @ weight.float().t() + (0 if b is None else b.float())
    linear = ops.linear(weight, b)
    assert (linear.in_features, linear.out_features) == (50, 70)
    close(linear(x), expected, dtype)


@each_case
@pytest.mark.parametrize("module", [Module.O, Module.DOWN])
def test_add_rms_norm(
    ops: Ops, dtype: torch.dtype, shape: str, composition: str, module: Module
) -> None:
    s = SHAPES[shape]
    rows, lora = case(composition, s, dtype)
    for layer in range(s.layers):
        width, hidden = s.widths(module)
        x, y = rand(rows, width, dtype=dtype, scale=0.1), rand(rows, hidden, dtype=dtype)
        residual, weight = rand(rows, hidden, dtype=dtype), rand(hidden, dtype=dtype)
        expected = residual.float() + y.float()
        expected += reference.lora_delta(x, lora, layer, module, hidden)
        t = ops.lora_shrink(x, lora, layer, (module,))
        normed = ops.add_rms_norm(y, t, lora, layer, module, residual, weight, 1e-6)
        close(residual, expected, dtype)
        close(normed, reference.rms_norm(residual, weight, 1e-6), dtype)  # of the rounded sum


@each_case
def test_swiglu(ops: Ops, dtype: torch.dtype, shape: str, composition: str) -> None:
    s = SHAPES[shape]
    rows, lora = case(composition, s, dtype)
    x = rand(rows, s.hidden, dtype=dtype, scale=0.1)
    gate_up = rand(rows, 2 * s.intermediate, dtype=dtype)
    gate, up = gate_up.float().split(s.intermediate, 1)
    gate = gate + reference.lora_delta(x, lora, 1, Module.GATE, s.intermediate)
    up = up + reference.lora_delta(x, lora, 1, Module.UP, s.intermediate)
    t = ops.lora_shrink(x, lora, 1, GATE_UP)
    close(ops.swiglu(gate_up, t, lora, 1), reference.swiglu(gate, up), dtype)


@each_case
@pytest.mark.parametrize("norm", [False, True])
def test_rope_kv_write_then_attention(
    ops: Ops, dtype: torch.dtype, shape: str, composition: str, norm: bool
) -> None:
    """The written keys and values are seen through attention: their layout is the backend's own."""
    s = SHAPES[shape]
    rows, lora = case(composition, s, dtype)
    kv = new_cache(ops, s, dtype)
    sequences = Sequences(s)
    batch = sequences.step([(7, rows)])
    q_norm = 1 + rand(s.head_dim, dtype=dtype, scale=0.1) if norm else None
    k_norm = 1 + rand(s.head_dim, dtype=dtype, scale=0.1) if norm else None
    cos, sin = cos_sin(batch, s.head_dim, torch.float32)
    for layer in range(s.layers):
        x = rand(rows, s.hidden, dtype=dtype, scale=0.1)
        qkv = rand(rows, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, dtype=dtype)
        deltas = [reference.lora_delta(x, lora, layer, m, s.widths(m)[1]) for m in QKV]
        q, k, v = reference.rope_qkv(
            qkv.float() + torch.cat(deltas, 1),
            cos,
            sin,
            q_norm,
            k_norm,
            1e-6,
            s.num_heads,
            s.num_kv_heads,
            s.head_dim,
        )
        sequences.remember(layer, batch, k, v)
        t = ops.lora_shrink(x, lora, layer, QKV)
        got_q = ops.rope_kv_write(
            qkv, t, lora, layer, cos, sin, q_norm, k_norm, 1e-6, s.num_heads, kv, batch
        )
        close(got_q, q, dtype)
        scale = s.head_dim**-0.5
        got = ops.attention(got_q, kv, layer, batch, scale, None)
        close(got, sequences.attention(layer, batch, q, scale, None), dtype)


def test_no_adapter_of_these_modules_shrinks_to_nothing(ops: Ops) -> None:
    s = SHAPES["even"]
    tables, pages = make_pool(s, ADAPTERS, torch.float32)
    lora = make_lora(tables, pages, [(3, [(5, 1.0)])])  # q and v only
    x = torch.randn(3, s.hidden)
    assert ops.lora_shrink(x, lora, 0, GATE_UP) is None
    assert ops.lora_shrink(x, None, 0, QKV) is None
    assert ops.lora_shrink(x, lora, 0, QKV) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["scaling", "adapter", "weight", "rows", "rank"])
def test_the_tolerances_catch_a_wrong_adapter(ops: Ops, dtype: torch.dtype, wrong: str) -> None:
    """The comparison used above fails when the adapter is not the right one."""
    s = SHAPES["even"]
    tables, pages = make_pool(s, [Adapter(16), Adapter(16)], dtype)
    lora = make_lora(tables, pages, [(1, [(0, 1.0)]), (1, [(1, 1.0)])])
    x = rand(2, s.hidden, dtype=dtype, scale=0.3)
    gate_up = rand(2, 2 * s.intermediate, dtype=dtype)
    gate, up = gate_up.float().split(s.intermediate, 1)
    gate = gate + reference.lora_delta(x, lora, 0, Module.GATE, s.intermediate)
    up = up + reference.lora_delta(x, lora, 0, Module.UP, s.intermediate)
    if wrong == "scaling":
        tables.scaling *= 1.1
        tables.version += 1
    elif wrong == "adapter":
        lora = make_lora(tables, pages, [(1, [(1, 1.0)]), (1, [(0, 1.0)])])
    elif wrong == "weight":
        lora = make_lora(tables, pages, [(1, [(0, 0.9)]), (1, [(1, 1.0)])])
    elif wrong == "rows":
        lora = make_lora(tables, pages, [(2, [(0, 1.0)])])
    else:
        tables.live_ranks[pages[0]] = 15
    t = ops.lora_shrink(x, lora, 0, GATE_UP)
    got = ops.swiglu(gate_up, t, lora, 0)
    with pytest.raises(AssertionError):
        close(got, reference.swiglu(gate, up), dtype)


def test_an_installed_adapter_replaces_the_old_one_on_its_page(ops: Ops) -> None:
    """Page numbers are reused: what was kept of the old adapter must not serve the new one."""
    s = SHAPES["even"]
    tables, pages = make_pool(s, [Adapter(16)], torch.float32)
    x, weight = torch.randn(3, s.widths(Module.O)[0]), torch.randn(s.hidden)
    for _ in range(2):
        lora = make_lora(tables, pages, [(3, [(0, 1.0)])])
        residual = torch.zeros(3, s.hidden)
        t = ops.lora_shrink(x, lora, 0, (Module.O,))
        ops.add_rms_norm(torch.zeros(3, s.hidden), t, lora, 0, Module.O, residual, weight, 1e-6)
        close(residual, reference.lora_delta(x, lora, 0, Module.O, s.hidden), torch.float32)
        tables.arena.nan_to_num_().mul_(-3.0)
        tables.version += 1

"""The operations together: a decoder layer, its plans, and what a CUDA graph could not capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from kernel_cases import Adapter, Sequences, Shape, cos_sin, make_lora, make_pool, rand
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.kernels.gpu import ops as ops_module
from loraplex.kernels.gpu import streams
from loraplex.kernels.gpu.attention_work import attention_work
from loraplex.kernels.gpu.launch import recording
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.streams import SideStream
from loraplex.kernels.gpu.work import lora_work
from loraplex.kernels.ops import (
    GATE_UP,
    QKV,
    AttentionBatch,
    KVCache,
    Linear,
    LoraBatch,
    Module,
    Ops,
    PageTables,
)
from loraplex.kernels.torch_ops import TorchOps

CPU, META = torch.device("cpu"), torch.device("meta")
EPS = 1e-6
VOCABULARY = 30
SHAPE = Shape(hidden=40, num_heads=3, num_kv_heads=1, head_dim=24, intermediate=56, layers=2)
ADAPTERS = [Adapter(8), Adapter(24), Adapter(16, modules=(Module.Q, Module.V, Module.DOWN))]


class Decoder:
    """Two layers with every optional part: biases, head norms, a window."""

    def __init__(self, dtype: torch.dtype, shape: Shape = SHAPE) -> None:
        s, self.shape, self.dtype = shape, shape, dtype
        self.tables, self.pages = make_pool(s, ADAPTERS, dtype)
        heads = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
        widths = {
            "qkv": (heads, s.hidden),
            "o": (s.hidden, s.num_heads * s.head_dim),
            "gate_up": (2 * s.intermediate, s.hidden),
            "down": (s.hidden, s.intermediate),
        }
        self.weights: dict[str, Tensor] = {
            name: rand(*size, dtype=dtype, scale=size[1] ** -0.5) for name, size in widths.items()
        }
        self.weights["bias"] = rand(heads, dtype=dtype, scale=0.1)
        self.weights["embedding"] = rand(VOCABULARY, s.hidden, dtype=dtype)
        self.weights["norm"] = 1 + rand(s.hidden, dtype=dtype, scale=0.1)
        self.weights["head_norm"] = 1 + rand(s.head_dim, dtype=dtype, scale=0.1)

    def linears(self, ops: Ops) -> dict[str, Linear]:
        w = self.weights
        biases = {"qkv": w["bias"]}
        return {
            name: ops.linear(w[name], biases.get(name)) for name in ("qkv", "o", "gate_up", "down")
        }

    def forward(
        self,
        ops: Ops,
        linears: dict[str, Linear],
        ids: Tensor,
        angles: tuple[Tensor, Tensor],
        kv: KVCache,
        batch: AttentionBatch,
        lora: LoraBatch | None,
    ) -> Tensor:
        s, w = self.shape, self.weights
        residual = ops.embed(ids, w["embedding"])
        x = ops.rms_norm(residual, w["norm"], EPS)
        for layer in range(s.layers):
            t = ops.lora_shrink(x, lora, layer, QKV)
            q = ops.rope_kv_write(
                linears["qkv"](x), t, lora, layer, *angles, w["head_norm"], w["head_norm"], EPS,
                s.num_heads, kv, batch,
            )  # fmt: skip
            x = ops.attention(q, kv, layer, batch, s.head_dim**-0.5, 12 if layer else None)
            t = ops.lora_shrink(x, lora, layer, (Module.O,))
            y = linears["o"](x)
            x = ops.add_rms_norm(y, t, lora, layer, Module.O, residual, w["norm"], EPS)
            t = ops.lora_shrink(x, lora, layer, GATE_UP)
            x = ops.swiglu(linears["gate_up"](x), t, lora, layer)
            t = ops.lora_shrink(x, lora, layer, (Module.DOWN,))
            y = linears["down"](x)
            x = ops.add_rms_norm(y, t, lora, layer, Module.DOWN, residual, w["norm"], EPS)
        return x


class Session:
    """A backend with its cache, over steps."""

    def __init__(self, ops: Ops, model: Decoder) -> None:
        s = model.shape
        self.ops, self.model, self.linears = ops, model, model.linears(ops)
        self.kv = ops.kv_cache(s.layers, 24, 16, s.num_kv_heads, s.head_dim, model.dtype, CPU)

    def run(self, ids: Tensor, batch: AttentionBatch, lora: LoraBatch | None) -> Tensor:
        angles = cos_sin(batch, self.model.shape.head_dim, torch.float32)
        if lora is not None:
            lora = replace(lora, plan=None)
        batch = replace(batch, plan=None)  # a plan belongs to one backend
        return self.model.forward(self.ops, self.linears, ids, angles, self.kv, batch, lora)


Work = list[tuple[int, int, list[tuple[int, float]]]]  # sequence, new tokens, composition
STEPS: list[Work] = [
    [(0, 19, [(0, 1.0)]), (1, 5, [])],
    [(0, 1, [(0, 1.0)]), (1, 1, []), (2, 18, [(1, 0.5), (2, -1.0)])],
    [(2, 1, [(1, 0.5), (2, -1.0)]), (0, 1, [(0, 1.0)]), (3, 1, [(0, 1.0)]), (1, 1, [])],
    [(0, 1, []), (1, 1, []), (2, 1, []), (3, 1, [])],
]


def runs_of(step: Work) -> list[tuple[int, list[tuple[int, float]]]]:
    """Neighbours of one composition together, as the scheduler gives them."""
    return [
        (sum(count for _, count, _ in together), composition)
        for composition, together in groupby(step, key=lambda work: work[2])
    ]


def steps(model: Decoder, work: list[Work]) -> Iterator[tuple[Tensor, AttentionBatch, LoraBatch]]:
    sequences = Sequences(model.shape, num_blocks=24)
    for step in work:
        batch = sequences.step([(seq, count) for seq, count, _ in step])
        ids = torch.randint(0, VOCABULARY, (sum(count for _, count, _ in step),))
        lora = make_lora(
            model.tables, model.pages, [(n, composition) for _, n, composition in step]
        )
        yield ids, batch, lora


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options", [{}, {"batch_invariant": True}, {"overlap": False, "fused_norm": False}], ids=str
)
def test_a_decoder_gives_what_plain_torch_gives(options: dict[str, bool]) -> None:
    model = Decoder(torch.float32)
    ours, theirs = Session(TritonOps(**options), model), Session(TorchOps(), model)
    for ids, batch, lora in steps(model, STEPS):
        used = lora if lora.host_tiles else None
        torch.testing.assert_close(
            ours.run(ids, batch, used), theirs.run(ids, batch, used), rtol=1e-4, atol=1e-4
        )


def test_a_decoder_without_its_adapters_gives_something_else() -> None:
    model = Decoder(torch.float32)
    ours, theirs = Session(TritonOps(), model), Session(TorchOps(), model)
    ids, batch, lora = next(steps(model, STEPS))
    difference = (ours.run(ids, batch, None) - theirs.run(ids, batch, lora)).abs().amax(1)
    assert difference[:19].min() > 0.1
    assert difference[19:].max() < 1e-4


MATES: Work = [(0, 1, [(1, 1.0)]), (1, 1, [(1, 1.0)]), (3, 1, []), (2, 6, [(2, 1.0)])]


def alone_and_together(ops: TritonOps) -> tuple[Tensor, Tensor]:
    """The last state of sequence 0 by itself, and with others in its batches."""
    model = Decoder(torch.float16)
    prompt, next_id = torch.randint(0, VOCABULARY, (9,)), torch.randint(0, VOCABULARY, (1,))
    states = []
    for mates in (False, True):
        session, sequences = Session(ops, model), Sequences(model.shape, num_blocks=24)
        lora = make_lora(model.tables, model.pages, [(9, [(1, 1.0)])])
        session.run(prompt, sequences.step([(0, 9)]), lora)
        step = MATES if mates else MATES[:1]
        others = torch.randint(0, VOCABULARY, (sum(n for _, n, _ in step) - 1,))
        batch = sequences.step([(seq, count) for seq, count, _ in step])
        lora = make_lora(model.tables, model.pages, runs_of(step))
        states.append(session.run(torch.cat((next_id, others)), batch, lora)[0])
    return states[0], states[1]


def test_batch_invariant_states_have_the_same_bits_in_any_company() -> None:
    alone, together = alone_and_together(TritonOps(batch_invariant=True))
    assert torch.equal(alone, together)


def test_by_default_company_may_change_the_rounding() -> None:
    """Shows that the test above can fail: a row that shares its adapter is multiplied otherwise."""
    alone, together = alone_and_together(TritonOps())
    assert not torch.equal(alone, together)
    torch.testing.assert_close(alone, together, rtol=2e-2, atol=2e-2)


class Recorder(TorchDispatchMode):
    """Names of the operations torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Views, memory from the pool, and the base GEMMs: all that a captured step may ask of torch.
CAPTURABLE = {
    "empty", "empty_like", "view", "_unsafe_view", "reshape", "t", "transpose", "slice", "select",
    "detach", "alias", "as_strided", "mm", "addmm",
}  # fmt: skip


def on_meta(model: Decoder, batch: AttentionBatch, lora: LoraBatch) -> Any:
    """A step's arguments of `forward` as they would lie on a device."""

    def move(value: Any) -> Any:
        return value.to(META) if isinstance(value, Tensor) else value

    def moved(holder: Any) -> dict[str, Any]:
        return {name: move(getattr(holder, name)) for name in holder.__dataclass_fields__}

    model.weights = {name: move(weight) for name, weight in model.weights.items()}
    tables = PageTables(**moved(lora.tables))
    cos, sin = cos_sin(batch, model.shape.head_dim, torch.float32)
    angles = (move(cos), move(sin))
    return angles, AttentionBatch(**moved(batch)), LoraBatch(**(moved(lora) | {"tables": tables}))


@contextmanager
def asked_of_torch() -> Iterator[set[str]]:
    with recording(), Recorder() as recorder:
        yield recorder.names


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("prepared", [True, False])
def test_prepared_steps_never_look_at_the_device(
    options: dict[str, bool], step: int, prepared: bool
) -> None:
    """Meta tensors have no contents, so a host read fails; copies and fills show by name."""
    model, ops = Decoder(torch.float16), TritonOps(**options)
    *_, (ids, batch, lora) = steps(model, STEPS[: step + 1])
    angles, batch, lora = on_meta(model, batch, lora)
    s, rows, ids = model.shape, len(ids), ids.to(META)
    kv = ops.kv_cache(s.layers, 24, 16, s.num_kv_heads, s.head_dim, model.dtype, META)
    linears = model.linears(ops)
    with recording():
        model.forward(ops, linears, ids, angles, kv, replace(batch), replace(lora))  # warm-up
    if prepared:
        small_only = ops.batch_invariant
        lora.plan = lora_work(lora, rows, META, small_only=small_only)
        batch.plan = attention_work(batch, s.num_heads, kv, batch_invariant=small_only)
    with asked_of_torch() as names:
        model.forward(ops, linears, ids, angles, kv, batch, lora)
    if prepared:
        assert names <= CAPTURABLE, names - CAPTURABLE
    else:  # the same test sees the copies of a step that nobody prepared
        assert names - CAPTURABLE


def test_a_host_read_does_not_pass_unseen() -> None:
    with asked_of_torch() as names, pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device=META).item()
    assert names - CAPTURABLE


def test_plans_are_made_once_and_kept_with_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = ops_module.lora_work
    monkeypatch.setattr(
        ops_module,
        "lora_work",
        lambda lora, rows, *a, **k: made.append(rows) or make(lora, rows, *a, **k),
    )
    ops = TritonOps()
    model = Decoder(torch.float32)
    *_, (_, _, lora) = steps(model, STEPS[:3])
    gate_up = rand(4, 2 * SHAPE.intermediate, dtype=torch.float32)
    for batch in (lora, lora, None, None):
        ops.swiglu(gate_up, None, batch, 0)
    ops.swiglu(gate_up[:2], None, None, 0)
    ops.swiglu(gate_up[:2], None, None, 0)
    assert made == [4, 4, 2]


def test_base_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "BASE_PLANS", 2)
    ops = TritonOps()
    for rows in (3, 1, 2, 3, 2, 4):
        gate_up = torch.ones(rows, 8)
        assert torch.equal(ops.swiglu(gate_up, None, None, 0), torch.full((rows, 4), 0.7310586))
    assert [rows for rows, _ in ops._base_plans] == [3, 1]


def test_counters_grow_and_old_ones_stay_where_graphs_know_them() -> None:
    ops = TritonOps()
    first = ops._counters(10, CPU)
    assert ops._counters(first.numel(), CPU) is first
    larger = ops._counters(first.numel() + 1, CPU)
    assert larger.numel() > first.numel()
    assert ops._counters(5, CPU) is first
    assert ops._counters(first.numel() + 1, CPU) is larger
    assert ops._counters(5, META).is_meta


def test_what_belongs_to_another_backend_is_noticed() -> None:
    ops, model = TritonOps(), Decoder(torch.float32)
    *_, (_, _, lora) = steps(model, STEPS[:3])
    gate_up = torch.zeros(4, 2 * SHAPE.intermediate)
    with pytest.raises(AssertionError, match="shrink of another backend"):
        ops.swiglu(gate_up, torch.zeros(4), lora, 0)
    lora.plan = object()
    with pytest.raises(AssertionError, match="plan of another backend"):
        ops.swiglu(gate_up, None, lora, 0)


class Spy(SideStream):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    @contextmanager
    def fork(self, device: torch.device) -> Iterator[None]:
        self.calls.append("fork")
        yield

    def join(self) -> None:
        self.calls.append("join")


def test_only_steps_of_decode_rows_fork() -> None:
    model = Decoder(torch.float32)
    for work, forks in ((STEPS[1:2], 0), (STEPS[2:3], 1)):
        ops, (ids, _, lora) = TritonOps(), next(steps(model, work))
        ops._side = spy = Spy()
        x = rand(len(ids), SHAPE.hidden, dtype=torch.float32)
        t = ops.lora_shrink(x, lora, 0, GATE_UP)
        assert spy.calls.count("fork") == forks
        ops.swiglu(rand(len(ids), 2 * SHAPE.intermediate, dtype=torch.float32), t, lora, 0)
        assert spy.calls[-1] == "join"


class FakeCuda:
    """Streams and events that write down the order of what they are told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.current = "main"
        self.events = 0

    def Stream(self, device: torch.device, priority: int) -> Any:
        assert priority < 0, "the side stream goes first"
        return self.stream_named("side")

    def Event(self) -> Any:
        self.events += 1
        name, told = f"event {self.events}", self.told
        fake = self

        class Event:
            def record(self) -> None:
                told.append(f"{fake.current} records {name}")

            def __str__(self) -> str:
                return name

        return Event()

    def stream_named(self, name: str) -> Any:
        told = self.told

        class Stream:
            def wait_event(self, event: object) -> None:
                told.append(f"{name} waits for {event}")

        return Stream()

    def current_stream(self) -> Any:
        return self.stream_named(self.current)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current = "side"
        yield
        self.current = "main"


def test_the_side_stream_forks_and_joins_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(streams.torch.cuda, name, getattr(fake, name))
    side = SideStream()
    side.join()
    for _ in range(2):
        fake.told.clear()
        with side.fork(torch.device("cuda")):
            fake.told.append(f"{fake.current} works")
        side.join()
        assert fake.told == [
            "main records event 1",
            "side waits for event 1",
            "side works",
            "side records event 2",
            "main waits for event 2",
        ]
        side.join()
        assert len(fake.told) == 5, "joined once"
    with side.fork(torch.device("cpu")):
        pass
    side.join()
    assert len(fake.told) == 5, "no streams on a CPU"

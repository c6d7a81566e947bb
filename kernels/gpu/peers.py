"""Other servers' LoRA kernels, out of their unpacked wheels, for measuring beside ours.

A wheel's kernel files are imported alone: the packages around them are empty shells, and the few
names they ask of the rest of their server are stand-ins. Nothing of theirs is part of the product,
and nothing here changes what their kernels compute. Each is called as its own server calls it, per
fused group of modules, and its result is checked before it is timed.

vLLM: vllm/lora/ops/triton_ops (Apache-2.0). SGLang: sglang/kernels/ops/lora (Apache-2.0).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class LoraProblem:
    """`y += scaling * (x A^T) B^T` for a fused group of S modules, all adapters of one rank.

    x: `[T, K]`. a: S of `[G, r, K]`. b: S of `[G, N_s, r]`. rows: the adapter of each row, in
    ascending order. max_adapters: slots of the server, at least G.
    """

    x: Tensor
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    rows: Sequence[int]
    scaling: float
    max_adapters: int

    @property
    def rank(self) -> int:
        return self.a[0].shape[1]

    @property
    def num_adapters(self) -> int:
        return self.a[0].shape[0]

    @property
    def widths(self) -> list[int]:
        return [b.shape[1] for b in self.b]

    def zeros(self) -> Tensor:
        return torch.zeros(
            self.x.shape[0], sum(self.widths), dtype=self.x.dtype, device=self.x.device
        )

    def expected(self) -> Tensor:
        """fp32, starting from zeros."""
        parts = []
        index = torch.tensor(self.rows, device=self.x.device)
        for a, b in zip(self.a, self.b, strict=True):
            t = torch.einsum("tk,trk->tr", self.x.float(), a[index].float())
            parts.append(torch.einsum("tr,tnr->tn", t, b[index].float()))
        return torch.cat(parts, 1) * self.scaling


class Peer(Protocol):
    name: str

    def variants(self, problem: LoraProblem) -> dict[str, Run]:
        """Its kernels ready to run, by configuration, the default first; each adds to zeros that
        are its own and returns them.
        """
        ...


def load_peer(name: str, folder: Path) -> Peer:
    """folder: of the unpacked wheel, with `vllm/` or `sglang/` in it.

    Raises: ValueError for another name; ImportError when the wheel's files have changed too much.
    """
    if name == "vllm":
        return _Vllm(folder)
    if name == "sglang":
        return _Sglang(folder)
    raise ValueError(f"peer {name!r}: known are vllm and sglang")


def _shells(root: Path, package: str) -> None:
    """The package and those around it, importable without running their own code."""
    parts = package.split(".")
    if not root.joinpath(*parts).is_dir():
        raise ImportError(f"no {package} in {root}: is it an unpacked wheel?")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if name not in sys.modules:
            shell = ModuleType(name)
            shell.__path__ = [str(root.joinpath(*parts[:depth]))]
            sys.modules[name] = shell


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


class _Quiet:
    """A logger that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Platform:
    """The device as vLLM asks about it."""

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    def _capability(self) -> int:
        if not torch.cuda.is_available():
            return 90
        major, minor = torch.cuda.get_device_capability()
        return major * 10 + minor

    def is_device_capability(self, wanted: Any) -> bool:
        return self._capability() == _as_number(wanted)

    def has_device_capability(self, wanted: Any) -> bool:
        return self._capability() >= _as_number(wanted)

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *args, **kwargs: False


def _as_number(capability: Any) -> int:
    if isinstance(capability, tuple):
        return int(capability[0]) * 10 + int(capability[1])
    return int(capability)


class _Vllm:
    """max_loras slots, a grid for every slot; `specialised`: a grid for the active ones only."""

    name = "vllm"

    def __init__(self, folder: Path) -> None:
        kernels = "vllm.lora.ops.triton_ops"
        _shells(folder, kernels)
        _stand_in(
            "vllm.envs",
            VLLM_BATCH_INVARIANT=False,
            VLLM_LORA_ENABLE_DUAL_STREAM=False,
            VLLM_LORA_DISABLE_PDL=False,
            VLLM_TUNED_CONFIG_FOLDER=None,
        )
        _stand_in("vllm.logger", init_logger=lambda name: _Quiet())
        _stand_in("vllm.platforms", current_platform=_Platform())
        _stand_in("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
        _stand_in("vllm.utils")
        _stand_in(
            "vllm.utils.math_utils",
            next_power_of_2=triton.next_power_of_2,
            round_up=lambda number, to: -(-number // to) * to,
        )
        _stand_in(
            "vllm.utils.torch_utils",
            async_tensor_h2d=lambda data, dtype=None, device=None, **_: torch.tensor(
                data, dtype=dtype, device=device
            ),
            direct_register_custom_op=_no_custom_op,
        )
        self._meta = importlib.import_module(f"{kernels}.lora_kernel_metadata").LoRAKernelMeta
        self._shrink = importlib.import_module(f"{kernels}.lora_shrink_op").lora_shrink
        self._expand = importlib.import_module(f"{kernels}.lora_expand_op").lora_expand

    def variants(self, problem: LoraProblem) -> dict[str, Run]:
        return {
            "default": self._run(problem, specialised=False),
            "specialised": self._run(problem, specialised=True),
        }

    def _run(self, problem: LoraProblem, specialised: bool) -> Run:
        x = problem.x
        rows = x.shape[0]
        meta = self._meta.make(problem.max_adapters, rows, x.device)
        meta.prepare_tensors(torch.tensor(problem.rows, dtype=torch.int32, device=x.device))
        arguments = meta.meta_args(rows, specialised)
        a, b, y = list(problem.a), list(problem.b), problem.zeros()

        def run() -> Tensor:
            t = torch.empty(
                (len(a), rows, problem.rank), dtype=torch.float32, device=x.device
            )  # their shrink fills it with zeros first: a launch of its own
            self._shrink(x, a, t, *arguments, problem.scaling)
            self._expand(t, b, y, *arguments, offset_start=0, add_inputs=True)
            return y

        return run


def _no_custom_op(*args: Any, **kwargs: Any) -> None:
    raise AttributeError("kernels are called directly")  # which vLLM takes as: no custom ops here


class _Flag:
    def get(self) -> Any:
        return False


class _Flags:
    def __getattr__(self, name: str) -> _Flag:
        return _Flag()


class _Sglang:
    """`csgmv`: the default backend, by chunk size. `triton_v2`: the newer one, by plan table."""

    name = "sglang"

    def __init__(self, folder: Path) -> None:
        dense, common = "sglang.kernels.ops.lora.dense", "sglang.kernels.ops.lora.common"
        for package in (dense, common, "sglang.kernels.ops.lora.moe", "sglang.srt.lora"):
            _shells(folder, package)
        if importlib.util.find_spec("msgspec") is None:
            _stand_in("msgspec", Struct=_Struct)
        _stand_in("sglang.srt.environ", envs=_Flags())
        _stand_in("sglang.srt.lora.utils", LoRABatchInfo=object)
        _stand_in(
            "sglang.srt.utils",
            cached_triton_kernel=lambda *args, **kwargs: lambda kernel: kernel,
            get_device_name=lambda *args: _device_name(),
            get_device_core_count=lambda *args: 132,
            is_cuda=lambda: True,
            is_hip=lambda: False,
            is_gfx95_supported=lambda: False,
            is_gfx1250_supported=lambda: False,
        )
        _stand_in("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=None)
        shrink = importlib.import_module(f"{dense}.chunked_sgmv_shrink")
        expand = importlib.import_module(f"{dense}.chunked_sgmv_expand")
        self._shrink = shrink.chunked_sgmv_lora_shrink_forward
        self._expand = expand.chunked_sgmv_lora_expand_forward
        self._a = importlib.import_module(f"{common}.lora_a")
        self._b = importlib.import_module(f"{common}.lora_b")
        table = folder / "sglang/srt/lora/dense/configs/sm90.plans.json"
        self._plans: list[dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))["rows"]

    def variants(self, problem: LoraProblem) -> dict[str, Run]:
        # All slices of A one after the other, as its pool keeps them.
        a, b = torch.cat(list(problem.a), 1), torch.cat(list(problem.b), 1)
        runs = {f"csgmv chunk {chunk}": self._csgmv(problem, a, b, chunk) for chunk in (16, 32, 64)}
        return {**runs, "triton_v2": self._triton_v2(problem, a, b)}

    def _csgmv(self, problem: LoraProblem, a: Tensor, b: Tensor, chunk: int) -> Run:
        x, y, device = problem.x, problem.zeros(), problem.x.device
        starts, owners = [0], []
        for adapter in range(problem.num_adapters):
            left = problem.rows.count(adapter)
            while left:
                starts.append(starts[-1] + min(chunk, left))
                owners.append(adapter)
                left -= min(chunk, left)
        offsets = [0, *accumulate(problem.widths)]

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        batch = SimpleNamespace(
            use_cuda_graph=False,
            num_segments=len(owners),
            max_len=chunk,
            seg_indptr=ints(starts),
            weight_indices=ints(owners),
            lora_ranks=ints([problem.rank] * problem.num_adapters),
            permutation=ints(range(x.shape[0])),
            scalings=torch.full((problem.num_adapters,), problem.scaling, device=device),
        )
        on_device, on_host = ints(offsets), torch.tensor(offsets, dtype=torch.int32)

        def run() -> Tensor:
            t = self._shrink(x, a, batch, len(problem.a))
            out: Tensor = self._expand(t, b, batch, on_device, max(problem.widths), y, on_host)
            return out

        return run

    def _triton_v2(self, problem: LoraProblem, a: Tensor, b: Tensor) -> Run:
        plan = self._plan(problem)
        route = _route(problem, plan["block_size"])
        x, y, stack = problem.x, problem.zeros(), len(problem.a)
        device, rows = x.device, x.shape[0]
        width = stack * problem.rank
        split = int(plan["a_tiles"].get("SPLIT_K", 1))
        serial = split > 1 and plan["a_tiles"].get("SPLIT_MODE", "serial") == "serial"
        ranks = torch.full((problem.num_adapters,), problem.rank, dtype=torch.int32, device=device)
        scalings = torch.full((problem.num_adapters,), problem.scaling, device=device)
        bridge = torch.empty(rows, width, dtype=x.dtype, device=device)
        partial = torch.empty(split, rows, width, device=device) if split > 1 else None
        counters = torch.zeros(4096, dtype=torch.int32, device=device) if serial else None
        geometry = _geometry(self._b, problem.widths, int(plan["b_tiles"]["BLOCK_SIZE_N"]), device)
        every_slot = plan["a_family"] == "all_slots"
        slots = torch.empty(rows, problem.num_adapters * width, dtype=x.dtype, device=device)
        planes = split if split > 1 and not serial and not every_slot else 1
        into: Tensor = bridge if planes == 1 or partial is None else partial
        if every_slot:
            into = slots.view(rows, problem.num_adapters, width).transpose(0, 1)

        def run() -> Tensor:
            if every_slot:
                torch.mm(x, a.view(-1, x.shape[1]).t(), out=slots)
            elif plan["a_family"] == "per_row":
                self._a.per_row_lora_a(x, a, bridge, route, config=plan["a_tiles"], stack=stack)
            else:
                self._a.grouped_lora_a(
                    x, a, bridge, route, config=plan["a_tiles"], pair_input=True,
                    lora_ranks=ranks, stack=stack, partial=partial, counters=counters,
                )  # fmt: skip
            extra = {"slot_planes": every_slot} if plan["b_family"] == "per_row" else {}
            expand = (
                self._b.per_row_lora_b if plan["b_family"] == "per_row" else self._b.grouped_lora_b
            )
            expand(
                into, b, y, route, geometry=geometry, config=plan["b_tiles"], add_inplace=True,
                zero_sentinel=False, lora_ranks=ranks, scalings=scalings, planes=planes, **extra,
            )  # fmt: skip
            return y

        return run

    def _plan(self, problem: LoraProblem) -> dict[str, Any]:
        """The first row of its table that fits, as its plan.py chooses; its decode default else."""
        facts = {
            "tokens": problem.x.shape[0],
            "rank": problem.rank,
            "in_features": problem.x.shape[1],
            "out_features": sum(problem.widths),
        }
        phase = "decode" if problem.x.shape[0] <= 256 else "prefill"
        a_tiles = {
            "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8, "num_warps": 4,
            "num_stages": 3,
        }  # fmt: skip
        b_tiles = {**a_tiles, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "num_stages": 2}
        default: dict[str, Any] = {
            "a_family": "grouped",
            "b_family": "grouped",
            "block_size": 16,
            "a_tiles": {**a_tiles, "SPLIT_K": 4},
            "b_tiles": b_tiles,
        }
        for row in self._plans:
            fits = all(
                (row.get(f"min_{name}") or 0) <= value <= (row.get(f"max_{name}") or value)
                for name, value in facts.items()
            )
            kinds = row.get("kinds") or ["linear"]
            if fits and "linear" in kinds and row.get("phase") in (None, phase):
                return {**default, "a_tiles": a_tiles, **row["spec"]}
        return default


class _Struct:
    """msgspec.Struct where there is none: it is only ever subclassed here."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "NVIDIA H200"


def _route(problem: LoraProblem, block: int) -> SimpleNamespace:
    """Rows by adapter, each adapter's padded to a whole block, as SGLang's router leaves them."""
    rows = problem.x.shape[0]
    order: list[int] = []
    owners: list[int] = []
    for adapter in range(problem.num_adapters):
        mine = [row for row, owner in enumerate(problem.rows) if owner == adapter]
        mine += [rows] * (-len(mine) % block)
        order += mine
        owners += [adapter] * (len(mine) // block)

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=problem.x.device)

    slots = ints(problem.rows)
    return SimpleNamespace(
        block_size=block,
        num_rows=rows,
        width=1,
        groups_per_slot=1,
        group_ids=None,
        kernel_groups=slots,
        token_slots=slots,
        max_loras=problem.num_adapters,
        sorted_pair_ids=ints(order),
        block_bucket_ids=ints(owners),
        num_pairs_post_padded=ints([len(order)]),
    )


def _geometry(module: Any, widths: Sequence[int], block: int, device: torch.device) -> Any:
    """Its SliceGeometry, whose own builder insists on a CUDA device."""
    offsets = [0, *accumulate(widths)]
    uniform = widths[0] if len(set(widths)) == 1 else 0
    stride = offsets[1] if len(widths) > 1 else uniform
    regular = all(start == i * stride for i, start in enumerate(offsets[:-1]))

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return module.SliceGeometry(
        slice_offsets=ints(offsets),
        out_offsets=ints(offsets[:-1]),
        num_slices=len(widths),
        num_column_tiles=sum(-(-width // block) for width in widths),
        uniform_width=uniform,
        out_stride=stride if regular else 0,
        full_tiles=all(width % block == 0 for width in widths),
        block_size_n=block,
    )

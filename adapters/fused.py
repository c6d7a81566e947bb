"""Projections that some models and adapters hold as one: q/k/v and gate/up.

A LoRA of the fused projection is a LoRA of each part with the same A and with those rows of B that
make the part's outputs; so are the rows of a bias, of a DoRA magnitude or of a whole weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loraplex.adapters.module_shape import ModuleShape

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Rows:
    """Part of a tensor along its first axis, `[start, start + count)` of `total` rows: what a part
    of a fused projection has of the fused one's tensor.
    """

    start: int
    count: int
    total: int


@dataclass(frozen=True, slots=True)
class FusedShape:
    """A fused projection of a model that holds its parts apart."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    parts: tuple[int, ...]
    kind: str = "linear"
    tied: bool = False
    weight_digest: str = ""


def split(module: ModuleShape) -> Iterator[tuple[str, Rows | None]]:
    """The paths of a module's parts, and which of its rows they have; itself if it has none."""
    if not module.parts:
        yield module.path, None
        return
    parent, _, name = module.path.rpartition(".")
    start = 0
    for part, count in zip(FUSED[name], module.parts, strict=True):
        yield f"{parent}.{part}", Rows(start, count, module.out_features)
        start += count


def as_adapter_sees(
    modules: Sequence[ModuleShape], tensor_names: Iterable[str]
) -> Sequence[ModuleShape]:
    """The model's modules with those fused that the adapter's tensors name fused.

    A model's own fused projections stay as they are: PEFT knows them by no other name.
    """
    named = {name for name in FUSED for tensor in tensor_names if f".{name}." in tensor}
    there = {module.path.rpartition(".")[2] for module in modules}
    wanted = {part: name for name in named - there for part in FUSED[name]}
    if not wanted:
        return modules
    seen: list[ModuleShape] = []
    groups: dict[str, list[ModuleShape]] = {}
    for module in modules:
        parent, _, name = module.path.rpartition(".")
        if name not in wanted:
            seen.append(module)
            continue
        path = f"{parent}.{wanted[name]}"
        group = groups.setdefault(path, [])
        group.append(module)
        if len(group) == len(FUSED[wanted[name]]):
            seen.append(_fuse(path, group))
    return seen


def _fuse(path: str, parts: Sequence[ModuleShape]) -> FusedShape:
    sizes = tuple(part.out_features for part in parts)
    return FusedShape(path, parts[0].in_features, sum(sizes), all(p.bias for p in parts), sizes)

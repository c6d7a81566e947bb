"""What makes two launches the same compiled kernel: types, specialised arguments, constexprs.

Triton compiles a kernel again for every combination of them. The same rules are applied here
(pointers and integers divisible by 16, integers equal to 1), so a list of launches can be reduced
to the compilations behind it, and a start can tell which of them a self-test has run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.kernels.gpu.launch import Launch

ALIGNED = 16
_INT32 = range(-(1 << 31), 1 << 31)


@dataclass(frozen=True, slots=True)
class Configuration:
    """types: how each run-time argument was specialised, in order. constants: the constexprs."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...]
    num_warps: int
    num_stages: int

    @property
    def dtype(self) -> str:
        """The narrowest float type that is pointed to: the model's."""
        seen = {kind.strip("*'") for _, kind in self.types}
        return next((name for name in ("bfloat16", "float16", "float32") if name in seen), "")

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        shape = f"{self.num_warps} warps, {self.num_stages} stages"
        return f"{self.kernel} {self.dtype} [{constants}] {shape}"


def kernel_name(kernel: Any) -> str:
    name: str = getattr(kernel, "__name__", None) or kernel.fn.__name__
    return name.strip("_").removesuffix("_kernel")


def configuration(launch: Launch) -> Configuration:
    constexprs = _constexprs(launch.kernel)
    any_value = _listed(launch.kernel, "do_not_specialize")
    any_address = _listed(launch.kernel, "do_not_specialize_on_alignment") | any_value
    types: list[tuple[str, str]] = []
    constants: list[tuple[str, str]] = []
    for name in launch.kernel.arg_names:
        if name not in launch.args:
            continue  # left at its default
        value = launch.args[name]
        if name in constexprs or value is None:
            constants.append((name, str(value)))
        else:
            types.append((name, _specialised(value, name in any_value, name in any_address)))
    return Configuration(
        kernel_name(launch.kernel),
        tuple(types),
        tuple(constants),
        launch.num_warps,
        launch.num_stages,
    )


def distinct(launches: Iterable[Launch]) -> dict[Configuration, Launch]:
    """One launch, the first, of every configuration. Empty grids compile nothing."""
    found: dict[Configuration, Launch] = {}
    for launch in launches:
        if 0 not in launch.grid:
            found.setdefault(configuration(launch), launch)
    return found


def _constexprs(kernel: Any) -> set[str]:
    """By the annotations: a compiled and an interpreted kernel have the same."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return {p.name for p in parameters if "constexpr" in str(p.annotation)}


def _listed(kernel: Any, option: str) -> set[str]:
    """A list given to `triton.jit`; an interpreted kernel keeps its options aside."""
    return set(getattr(kernel, option, None) or getattr(kernel, "kwargs", {}).get(option) or ())


def _specialised(value: Any, any_value: bool, any_address: bool) -> str:
    if isinstance(value, torch.Tensor):
        aligned = value.device.type == "meta" or value.data_ptr() % ALIGNED == 0
        mark = "'" if aligned and not any_address else ""
        return f"*{str(value.dtype).removeprefix('torch.')}{mark}"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        kind = "int32" if value in _INT32 else "int64"
        if any_value:
            return kind
        return "1" if value == 1 else kind + ("'" if value % ALIGNED == 0 else "")
    return type(value).__name__

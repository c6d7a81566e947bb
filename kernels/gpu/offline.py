"""Compile every kernel a model uses for a GPU that is not here, and say what the compiler made.

    python -m loraplex.kernels.gpu.offline --arch 80 --arch 90 --shape llama-3-8b --dtype bfloat16

The interpreter, which the tests use, runs bodies that no compiler has seen: crashes of Triton's
layout passes, spilled registers and narrow loads show only here. No GPU is needed: Triton carries
the assembler, and a stand-in for its driver names the target.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from loraplex.kernels.gpu.configurations import Configuration, distinct
from loraplex.kernels.gpu.launch import Launch, is_interpreted
from loraplex.kernels.gpu.ops import TritonOps
from loraplex.kernels.gpu.used_kernels import recorded_launches
from loraplex.kernels.gpu.wgmma_registers import overwritten_operands
from loraplex.kernels.model_shapes import SHAPES

WARP_SIZE = 32
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of one configuration; `error` instead, where it failed.

    spilled_bytes: the stack of a thread. Our kernels keep no arrays, so all of it is registers that
    found no room. wide_loads, loads: load instructions from global memory of 16 bytes, and all of
    them; matrix: `mma.sync` instructions; warpgroup: `wgmma`, of which `unsafe` may lose an operand
    (see `wgmma_registers`).
    """

    kernel: str
    configuration: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    wide_loads: int = 0
    loads: int = 0
    async_copies: int = 0
    matrix: int = 0
    warpgroup: int = 0
    unsafe: int = 0
    seconds: float = 0.0
    error: str = ""


class _Target:
    """The part of Triton's driver that compiling asks: what the device is."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept per device, so each target is one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP_SIZE)


def compile_all(launches: list[Launch], arch: int) -> Iterator[Compiled]:
    """One result per distinct configuration, failures included.

    Raises: RuntimeError in a process whose kernels were imported for the interpreter.
    """
    if is_interpreted():
        raise RuntimeError(
            "the kernels of this process run in Triton's interpreter; "
            "start another with TRITON_INTERPRET=0"
        )
    triton.runtime.driver.set_active(_Target(arch))
    try:
        for configuration, launch in distinct(launches).items():
            yield _compile(configuration, launch, arch)
    finally:
        triton.runtime.driver._active = None  # `reset_active` would ask for a GPU


def _compile(configuration: Configuration, launch: Launch, arch: int) -> Compiled:
    start = time.perf_counter()
    about: dict[str, Any] = {
        "kernel": configuration.kernel,
        "configuration": str(configuration),
        "arch": arch,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    try:
        kernel = launch.kernel.run(
            grid=launch.grid,
            warmup=True,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **launch.args,
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {lines[-1]}"
        return Compiled(**about, error=why, seconds=time.perf_counter() - start)
    ptx: str = kernel.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    cubin, warpgroup = kernel.asm["cubin"], count(r"wgmma\.mma")
    registers, stack, _ = _resources(cubin)
    return Compiled(
        **about,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        wide_loads=count(r"ld\.global\S*\.v4\.b32") + count(r"ld\.global\S*\.v2\.b64"),
        loads=count(r"ld\.global"),
        async_copies=count(r"cp\.async\.c"),
        matrix=count(r"mma\.sync"),
        warpgroup=warpgroup,
        unsafe=len(overwritten_operands(_read(cubin, "--dump-sass"))) if warpgroup else 0,
        seconds=time.perf_counter() - start,
    )


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, static shared bytes) of the kernel in a binary."""
    said = _read(cubin, "--dump-resource-usage")
    found = _USAGE.search(said)
    assert found, f"cuobjdump names no resources: {said}"
    registers, stack, shared = map(int, found.groups())
    return registers, stack, shared


def _read(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loraplex.kernels.gpu.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Several groups of options may follow each other, with -- between them.",
    )
    parser.add_argument("--arch", type=int, action="append", help="80, 90, ... (default: both)")
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    given = sys.argv[1:] if arguments is None else arguments
    groups = [parser.parse_args(group) for group in _split(given)]
    results: list[Compiled] = []
    for group in groups:
        for result in _compile_group(group):
            results.append(result)
            print(_line(result), flush=True)
    if groups[0].json:
        with open(groups[0].json, "w", encoding="utf-8") as file:
            json.dump([asdict(result) for result in results], file, indent=1)
    failed = [result for result in results if result.error]
    print(f"{len(results)} compiled, {len(failed)} failed, triton {triton.__version__}")
    return 1 if failed else 0


def _split(arguments: list[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    return groups


def _compile_group(group: argparse.Namespace) -> Iterator[Compiled]:
    launches = [
        launch
        for shape in group.shape or ["llama-3-8b"]
        for dtype in group.dtype or ["bfloat16"]
        for launch in recorded_launches(
            SHAPES[shape],
            getattr(torch, dtype),
            TritonOps(batch_invariant=group.batch_invariant),
        )
        if group.kernel in launch.kernel.__name__
    ]
    for arch in group.arch or [80, 90]:
        yield from compile_all(launches, arch)


def _line(result: Compiled) -> str:
    if result.error:
        return f"sm_{result.arch} {result.configuration}: {result.error}"
    return (
        f"sm_{result.arch} {result.kernel:24s} {result.num_warps} warps {result.num_stages} stages"
        f" {result.registers:3d} registers {result.spilled_bytes:3d} spilled"
        f" {result.shared_bytes / 1024:5.1f} KiB | loads {result.wide_loads}/{result.loads} wide"
        f" async {result.async_copies} mma {result.matrix} wgmma {result.warpgroup}"
        f" {result.seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())

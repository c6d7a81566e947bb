"""Reads a disassembly for one fault of assemblers: registers taken from a product under way.

A `wgmma` whose left operand lies in registers reads them while later instructions run. The
assembler must not give such a register to anybody until the product has been waited for; ptxas
before 13.3 may (triton-lang/triton#11781), and the result is wrong now and then. Every path from
each such product to its wait is walked here. Knows SASS of sm_90 as `cuobjdump -sass` prints it,
and nothing of our kernels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_GUARD = re.compile(r"^@!?U?P[T\d]\d?\s+")
_FROM_REGISTERS = re.compile(r"^HGMMA\S*\s+R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_WRITTEN = re.compile(r"^\S+\s+(?:U?P[T\d]\d?, )?R(\d+)\b")
_OPERAND_REGISTERS = 4  # of a 64 x 16 operand of 16-bit elements, per thread
# Their first operand is read, not written. HGMMA: accumulators, which belong to the products.
_WRITES_NOTHING = ("ST", "RED", "LDGSTS", "HGMMA", "R2P", "R2UR", "BAR", "ISETP", "FSETP", "DSETP")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    text: str

    @property
    def body(self) -> str:
        return _GUARD.sub("", self.text)

    @property
    def commits(self) -> bool:
        """The products so far become a group that can be waited for."""
        return self.body.startswith("HGMMA") and self.body.endswith("gsb0")


def overwritten_operands(sass: str) -> list[str]:
    """One line per instruction that overwrites an operand of a product that may still read it."""
    program = [Instruction(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]
    place = {instruction.address: i for i, instruction in enumerate(program)}
    faults: list[str] = []
    for i, product in enumerate(program):
        if not (found := _FROM_REGISTERS.match(product.body)):
            continue
        operand = set(range(int(found[1]), int(found[1]) + _OPERAND_REGISTERS))
        for other in _while_under_way(program, place, i):
            if _written(other.body) & operand:
                faults.append(f"{product.address:#x} {product.text} <- {other.text}")
    return faults


def _while_under_way(
    program: list[Instruction], place: dict[int, int], product: int
) -> list[Instruction]:
    """Instructions that can run between a product and its wait."""
    met: dict[int, Instruction] = {}
    # A state is (next instruction, groups committed since, up to the most a wait ever leaves).
    todo = [(product + 1, int(program[product].commits))]
    seen: set[tuple[int, int]] = set()
    while todo:
        i, groups = state = todo.pop()
        if state in seen or i >= len(program):
            continue
        seen.add(state)
        instruction = program[i]
        # Of `groups` ours is the oldest: it is over where at most groups - 1 are left.
        if (wait := _WAIT.match(instruction.body)) and groups > int(wait[1], 16):
            continue
        met[i] = instruction
        groups = min(groups + instruction.commits, 8)
        body = instruction.body
        if body.startswith("EXIT") and body == instruction.text:
            continue
        if body.startswith("BRA") and (target := _TARGET.search(body)):
            todo.append((place[int(target[1], 16)], groups))
            if body == instruction.text and "," not in body:
                continue  # unconditional
        todo.append((i + 1, groups))
    return list(met.values())


def _written(body: str) -> set[int]:
    """General registers that an instruction writes."""
    if body.startswith(_WRITES_NOTHING) or not (found := _WRITTEN.match(body)):
        return set()
    operation, first = body.split()[0], int(found[1])
    count = 1
    if any(wide in operation for wide in (".128", "88.4")):  # LDSM.16.M88.4: four matrices
        count = 4
    elif any(wide in operation for wide in (".64", ".WIDE", "88.2")) or operation == "CS2R":
        count = 2
    return set(range(first, first + count))

"""The reader of disassemblies finds a register that is handed out too early, on any path."""

from __future__ import annotations

from loraplex.kernels.gpu.wgmma_registers import overwritten_operands

PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def sass(*lines: str) -> str:
    """As cuobjdump prints it."""
    return "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0000000000007918 */"
        for i, line in enumerate(lines)
    )


def test_an_operand_may_be_written_after_the_wait() -> None:
    lines = (
        f"{PRODUCT}, gsb0",
        "FADD R119, R120, R121",
        "STG.E [R122.64], R9",
        WAIT,
        "MOV R120, R5",
    )
    assert overwritten_operands(sass(*lines, "EXIT")) == []


def test_an_operand_written_before_the_wait_is_found() -> None:
    for early in (
        "MOV R123, R5",
        "@P1 FADD R120, R7, R8",
        "LDS.128 R120, [R5]",
        "IMAD.WIDE R122, R3, 0x4, R8",
        "SHFL.BFLY PT, R121, R7, 0x2, 0x1f",
    ):
        faults = overwritten_operands(sass(f"{PRODUCT}, gsb0", early, WAIT, "EXIT"))
        assert len(faults) == 1, early
        assert faults[0].startswith("0x0 HGMMA")
        assert faults[0].endswith(early)


def test_wide_writes_below_the_operand_reach_into_it() -> None:
    assert overwritten_operands(sass(f"{PRODUCT}, gsb0", "LDG.E.128 R117, [R2.64]", WAIT)) != []
    assert overwritten_operands(sass(f"{PRODUCT}, gsb0", "LDG.E.64 R118, [R2.64]", WAIT)) == []


def test_a_write_on_the_way_round_a_loop_is_found() -> None:
    """The wait stands at the head of the loop, behind the write."""
    write, product, back = "MOV R120, R5", f"{PRODUCT}, gsb0", "@P0 BRA 0x0"
    assert len(overwritten_operands(sass(write, WAIT, product, back, WAIT, "EXIT"))) == 1
    assert overwritten_operands(sass(WAIT, write, product, back, WAIT, "EXIT")) == []


def test_a_wait_that_leaves_the_last_group_running_is_none_for_it() -> None:
    leaves_one = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert overwritten_operands(sass(f"{PRODUCT}, gsb0", leaves_one, "MOV R120, R5", WAIT)) != []
    later = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"
    over = sass(f"{PRODUCT}, gsb0", later, leaves_one, "MOV R120, R5", WAIT)
    assert overwritten_operands(over) == []


def test_operands_in_shared_memory_are_not_looked_at() -> None:
    shared = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"
    assert overwritten_operands(sass(shared, "MOV R120, R5", WAIT)) == []

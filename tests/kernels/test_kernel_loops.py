"""Counts of hot loops in machine code, against the arithmetic of tiles."""

from math import prod

import pytest
from foveal.kernels.tools import compile_report, sass

pytest.importorskip("triton")

SASS = """
.L_x_1:
        /*0000*/                   FMNMX R0, R0, R1, !PT ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   MUFU.EX2 R3, R3 ;
.L_x_3:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/                   @!P1 FFMA R5, R5, R6, R7 ;
        /*0070*/                   IMAD.MOV.U32 R9, RZ, RZ, R5 ;
        /*0080*/                   LDGSTS.E.128 [R9], [R10.64] ;
        /*0090*/                   BAR.SYNC 0x0 ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
        /*00b0*/               @P0 BRA `(.L_x_2) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*00e0*/                   BRA `(.L_x_3) ;
"""


def test_units_of_a_loop():
    """The innermost loop with a product, of eight warps on four schedulers; A100: 256 multiply-adds a clock on each."""
    (loop,) = sass.hot_loops(SASS, "sm_80", warps=8)
    assert loop == sass.Loop(
        matrix=2, products=8 * 16 * 8 * 16, tensor=16, special=2, float32=2, integer=2, memory=2, issue=14
    )
    assert loop.busy("sm_80") == 16  # exponentials: two warps at 4 lanes
    assert [loop.share("sm_80", programs) for programs in (1, 2, 3)] == [0.5, 1, 1]


def test_tf32_takes_twice_as_long():
    (loop,) = sass.hot_loops(SASS.replace("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"), "sm_80", warps=8)
    assert (loop.products, loop.tensor) == (8 * 16 * 8 * 8, 16)


def test_programs_on_an_sm():
    most = sass.resident_programs
    assert most("sm_90", registers=168, shared=0, warps=8) == 65536 // (168 * 256)
    assert most("sm_90", registers=169, shared=0, warps=4) == 65536 // (176 * 128)  # in eights
    assert most("sm_90", registers=32, shared=75 * 1024, warps=4) == 3
    assert most("sm_89", registers=32, shared=0, warps=16) == 3
    assert most("sm_100", registers=32, shared=0, warps=4, tensor_columns=256) == 2


@pytest.mark.parametrize("arch", sass.DEVICES)
def test_products_of_a_tile(arch):
    """Two products of every tile in the forward, whatever instruction does them."""
    variants = compile_report._variants("neighborhood", arch)
    index, variant = next(
        (i, v)
        for i, v in enumerate(variants)
        if (v.kernel, v.grid, v.dtype, v.head_dim, v.flags) == ("forward", "18x24x24", "bf16", 64, "")
    )
    rows = compile_report.count_loops("neighborhood", arch, index)
    assert len(rows) == 2, "one of tiles without a mask, one of the others"
    products = 2 * prod(variant.queries) * prod(variant.keys) * 64
    assert [row.products for row in rows] == [products] * 2
    peak = sass.DEVICES[arch].products
    assert all(row.tensor == products / peak for row in rows)
    exponentials = prod(variant.queries) * prod(variant.keys) / 32 / sass.SCHEDULERS
    assert all(row.special > exponentials for row in rows)
    assert rows[0].issue < rows[1].issue
    assert all(0 < row.share <= 1 for row in rows)


def test_other_code_is_refused():
    with pytest.raises(ValueError, match="gfx942"):
        next(compile_report.loop_report(architectures=["gfx942"]))

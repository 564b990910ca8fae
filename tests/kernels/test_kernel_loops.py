"""Counts of hot loops in machine code, against the arithmetic of tiles."""

from dataclasses import replace
from math import prod

import pytest
from foveal.kernels.tools import compile_report, products, sass

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


@pytest.mark.parametrize("arch", [arch for arch in sass.DEVICES if arch != "sm_86"])  # its code is that of sm_89
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
    needed = 2 * prod(variant.queries) * prod(variant.keys) * 64
    assert [row.products for row in rows] == [needed] * 2
    peak = sass.DEVICES[arch].products
    assert all(row.tensor == needed / peak for row in rows)
    exponentials = prod(variant.queries) * prod(variant.keys) / 32 / sass.SCHEDULERS
    assert all(row.special > exponentials for row in rows)
    assert rows[0].issue < rows[1].issue
    assert all(0 < row.share <= 1 for row in rows)


TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 32, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 64, 16]}>
#blocked = #ttg.blocked<{sizePerThread = [1, 4]}>
module {
  tt.func public @forward_kernel() {
    %a = tt.dot %x, %y, %z : tensor<64x16xf32, #blocked> * tensor<16x64xf32, #blocked> -> tensor<64x64xf32, #blocked>
    %l:3 = scf.for %c = %c0 to %total step %c64 iter_args(%acc = %zero) -> (tensor<64x128xf32, #mma1>)  : i32 {
      %s = ttng.warp_group_dot %q, %k, %cst : tensor<64x128xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * !ttg.memdesc<128x64xbf16, #shared, #smem> -> tensor<64x64xf32, #mma> loc(#loc1)
      scf.if %some {
        scf.yield
      } else {
        scf.yield
      }
      %o = ttng.warp_group_dot %p, %v, %acc : !ttg.memdesc<64x64xbf16, #shared, #smem> * !ttg.memdesc<64x128xbf16, #shared, #smem> -> tensor<64x128xf32, #mma1> loc(#loc2)
      scf.yield %o
    }
    tt.return
  }
}
"""  # noqa: E501


def test_products_that_warps_do_twice():
    """Eight warps over 64 rows: the logits twice, the output once, so 1.5 times what forwards need."""
    assert products.repetition(TTGIR) == 1.5
    four = TTGIR.replace("[8, 1]", "[4, 1]")
    assert products.repetition(four) == 1
    waves = "#ttg.amd_mfma<{version = 3, warpsPerCTA = [4, 1], instrShape = [32, 32, 8], isTransposed = true}>"
    assert products.repetition(TTGIR.replace(TTGIR.splitlines()[1].removeprefix("#mma = "), waves)) == 1.5
    wmma = "#ttg.amd_wmma<{version = 2, isTranspose = true, ctaLayout = {warp = [[1, 0], [2, 0], [4, 0]]}}>"
    assert products.repetition(TTGIR.replace(TTGIR.splitlines()[1].removeprefix("#mma = "), wmma)) == 1.5
    assert products.repetition("module {\n}") == 0


def test_products_outside_of_loops_count_where_there_is_no_loop():
    straight = "\n".join(line for line in TTGIR.splitlines() if "scf." not in line)
    assert products.repetition(straight) == 1.5


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, ""),
        ({"products": 1.5}, "1.50 times the products"),
        ({"products": 1.5, "head_dim": 256, "kernel": "key"}, ""),
        ({"products": 1.5, "dtype": "fp32"}, ""),
        ({"spills": 16}, ""),
        ({"spills": 24}, "24 bytes spilled"),
        ({"spills": 8, "inside": 2}, "2 accesses of spilled registers in hot loops"),
        ({"error": "shared memory exceeds 1"}, "shared memory exceeds 1"),
    ],
)
def test_the_rule(change, broken):
    head = ("neighborhood", "forward", "7x7", "bf16", 64, "", "8×8", "8×8", 4, 2, "sm_80")
    row = replace(compile_report.Row(*head, 255, 0, 0, 0, 1.0, False, False), **change)
    assert row.broken == broken


def test_a_broken_rule_is_the_exit_code(monkeypatch, capsys):
    head = ("neighborhood", "forward", "7x7", "bf16", 64, "", "8×8", "8×8", 4, 2, "sm_80")
    for products_done, code in ((1.0, 0), (1.5, 1)):
        row = compile_report.Row(*head, 255, 0, 0, 0, products_done, False, False)
        monkeypatch.setattr(compile_report, "report", lambda row=row, **_: iter([row]))
        assert compile_report.main([]) == code
    assert "1.50 times the products" in capsys.readouterr().out


def test_other_code_is_refused():
    with pytest.raises(ValueError, match="gfx942"):
        next(compile_report.loop_report(architectures=["gfx942"]))

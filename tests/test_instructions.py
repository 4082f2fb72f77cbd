"""bench/instructions.py: what it reads, and what a thread of it does."""

import pytest

from bench.instructions import Kernel, Launch, Thread, parse, to_float

#: Sums 0.5 and its square root over four turns; a branch on an argument leaves the last addition out.
SASS = """
\t\tFunction : _Z4testv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/                   ULDC UR4, c[0x0][0x210] ;                 /* 0x00000a00ff017b82 */
        /*0020*/                   IMAD.MOV.U32 R0, RZ, RZ, 0x3f000000 ;     /* 0x00000a00ff017b82 */
        /*0030*/                   VIADD R2, R2, 0x1 ;                       /* 0x00000a00ff017b82 */
        /*0040*/                   MUFU.SQRT R3, R0.reuse ;                  /* 0x00000a00ff017b82 */
        /*0050*/                   FADD R4, R4, |R3| ;                       /* 0x00000a00ff017b82 */
        /*0060*/                   ISETP.GE.AND P0, PT, R2, UR4, PT ;        /* 0x00000a00ff017b82 */
        /*0070*/              @!P0 BRA 0x30 ;                                /* 0x00000a00ff017b82 */
        /*0080*/                   ISETP.NE.AND P1, PT, R2, 0x4, PT ;        /* 0x00000a00ff017b82 */
        /*0090*/               @P1 BRA 0xb0 ;                                /* 0x00000a00ff017b82 */
        /*00a0*/                   FADD R4, R4, 0.5 ;                        /* 0x00000a00ff017b82 */
        /*00b0*/                   EXIT ;                                    /* 0x00000a00ff017b82 */
        /*00c0*/                   BRA 0xc0;                                 /* 0x00000a00ff017b82 */
"""


@pytest.mark.parametrize(("turns", "last"), [(4, 1), (3, 0)])
def test_a_thread_takes_the_branches_of_its_arguments(turns, last):
    code = parse(SASS)["_Z4testv"]
    assert len(code) == 13 and code[0x70].guard == "!P0"
    assert code[0x40].operands == ("R3", "R0")  # ".reuse" is the scheduler's
    thread = Thread(Kernel(code, b""), Launch(turns.to_bytes(4, "little"), 32, 1, 1, 0))
    executed = thread.run()
    assert executed["MUFU.SQRT"] == turns and executed["FADD"] == turns + last
    assert sum(executed.values()) == 3 + 5 * turns + 2 + last + 1
    assert to_float(thread.registers["R4"]) == pytest.approx(turns * 0.5**0.5 + last * 0.5)


@pytest.mark.parametrize(("dividend", "divisor"), [(24975, 16), (7, 8), (640, 10), (0xFFFFFFF0, 3)])
def test_divisions_are_exact(dividend, divisor):
    """Unsigned division as it is compiled: a reciprocal, and a correction in 64 bits."""
    lines = """I2F.U32.RP R8, UR5 | MUFU.RCP R8, R8 | VIADD R4, R8, 0xffffffe | F2I.FTZ.U32.TRUNC.NTZ R5, R4
    IMAD.MOV.U32 R4, RZ, RZ, RZ | IMAD.MOV R12, RZ, RZ, -R5 | IMAD R13, R12, UR5, RZ | IMAD.HI.U32 R5, R5, R13, R4
    IMAD.HI.U32 R6, R5, UR4, RZ | IMAD.MOV R5, RZ, RZ, -R6 | IMAD R5, R5, UR5, UR4
    ISETP.GE.U32.AND P0, PT, R5, UR5, PT | @P0 IADD3 R5, R5, -UR5, RZ | @P0 VIADD R6, R6, 0x1
    ISETP.GE.U32.AND P1, PT, R5, UR5, PT | @P1 VIADD R6, R6, 0x1 | EXIT""".replace("\n", "|").split("|")
    lines = ["ULDC.64 UR4, c[0x0][0x210]", *lines]
    sass = "Function : f\n" + "".join(f"  /*{16 * i:04x}*/  {line.strip()} ;\n" for i, line in enumerate(lines))
    arguments = dividend.to_bytes(4, "little") + divisor.to_bytes(4, "little")
    thread = Thread(Kernel(parse(sass)["f"], b""), Launch(arguments, 32, 1, 1, 0))
    thread.run()
    assert thread.registers["R6"] == dividend // divisor


def test_an_operation_that_it_does_not_know_is_no_guess():
    code = parse("Function : f\n  /*0000*/  HGMMA R0, R2 ;\n  /*0010*/  EXIT ;\n")["f"]
    with pytest.raises(NotImplementedError, match="HGMMA"):
        Thread(Kernel(code, b""), Launch(b"", 32, 1, 1, 0)).run()

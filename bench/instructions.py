"""``python -m bench.instructions``: what the CUDA kernels execute, counted without a GPU.

The kernels' own host code plans a launch (through the tests' library for hosts, csrc/simt_host.h) and hands its
arguments over; the first thread of the machine code that nvcc made for sm_90 is then interpreted on them, in the
memory of the call. Every branch is taken as the arguments say; only what another lane would have said is made up. That
thread also does what one lane does for its row. Two launches of different length leave what a row costs without what a
launch costs.

Needs ``python csrc/build.py --simt`` with ``MLKERNELS_CUDA=1 MLKERNELS_CUDA_ARCHS=90``, and cuobjdump.

Not a time: latencies, bank conflicts and caches are not in it. An issue-bound kernel reaches about 75 % of the budget.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
#: An H100: lane-instructions per second (multiprocessors x lanes x clock) and the bytes per second of a copy.
LANE_RATE, COPY_RATE = 132 * 128 * 1.7e9, 3.0e12
ARGUMENTS = 0x210  # where a kernel's arguments begin in constant bank 0, from sm_90 on
MASK, MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class Instruction(NamedTuple):
    guard: str  # "P0", "!UP1", or "PT": always
    op: str
    operands: tuple[str, ...]


class Kernel(NamedTuple):
    code: dict[int, Instruction]  # by address
    constants: bytes  # bank 2: what switches jump by


def parse(sass: str) -> dict[str, dict[int, Instruction]]:
    """The functions in what ``cuobjdump -sass`` prints."""
    found: dict[str, dict[int, Instruction]] = {}
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_.a-z]+)\s*(.*?)\s*;")
    for function in sass.split("Function : ")[1:]:
        code = {}
        for match in map(line.match, function.splitlines()):
            if match:
                operands = tuple(x.strip().replace(".reuse", "") for x in match[4].split(",")) if match[4] else ()
                code[int(match[1], 16)] = Instruction(match[2] or "PT", match[3], operands)
        found[function.split()[0]] = code
    return found


def jump_tables(cubin: bytes) -> dict[str, bytes]:
    """Constant bank 2 of each function, its relocations within the function applied."""
    at, entry, count = struct.unpack_from("<Q", cubin, 40)[0], *struct.unpack_from("<2H", cubin, 58)
    names_at = struct.unpack_from("<H", cubin, 62)[0]
    headers = [struct.unpack_from("<2I4Q2I2Q", cubin, at + i * entry) for i in range(count)]
    names = cubin[headers[names_at][4] :]
    bodies = {names[h[0] :].split(b"\0", 1)[0].decode(): cubin[h[4] : h[4] + h[5]] for h in headers if h[1] != 8}
    out = {}
    for name, body in bodies.items():
        if not name.startswith(".nv.constant2."):
            continue
        table = bytearray(body)
        for offset, _, addend in struct.iter_unpack("<2Qq", bodies.get(".rela" + name, b"")):
            struct.pack_into("<I", table, offset, addend & MASK)
        out[name.removeprefix(".nv.constant2.")] = bytes(table)
    return out


def kernels_of(path: Path, cuobjdump: str) -> dict[str, Kernel]:
    """What nvcc compiled into an object or a library, for the one target that it was compiled for."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cuobjdump, "-xelf", "all", str(path.resolve())], cwd=folder, check=True, capture_output=True)
        found = {}
        for cubin in Path(folder).iterdir():
            sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
            tables = jump_tables(cubin.read_bytes())
            found.update({name: Kernel(code, tables.get(name, b"")) for name, code in parse(sass).items()})
    return found


# ---- one thread ------------------------------------------------------------------------------------------------------


def to_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & MASK))[0]


def of_float(x: float) -> int:
    try:
        return struct.unpack("<I", struct.pack("<f", x))[0]
    except OverflowError:
        return 0x7F800000 | (0x80000000 if x < 0 else 0)


def to_double(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", bits & MASK64))[0]


def of_double(x: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def of_half(x: float) -> int:
    try:
        return struct.unpack("<H", struct.pack("<e", x))[0]
    except OverflowError:
        return 0x7C00 | (0x8000 if x < 0 else 0)


def bfloat(x: float) -> int:
    bits = of_float(x)
    return 0x7FC0 if x != x else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a == a and b == b and a != b, "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "NEU": lambda a, b: a != b, "EQU": lambda a, b: not (a < b or a > b), "LTU": lambda a, b: not a >= b,
    "LEU": lambda a, b: not a > b, "GTU": lambda a, b: not a <= b, "GEU": lambda a, b: not a < b,
    "NAN": lambda a, b: a != a or b != b, "NUM": lambda a, b: a == a and b == b,
}  # fmt: skip
JOIN: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip
#: Nothing that a lone thread could see.
NOTHING = {
    *("BSSY", "BSYNC", "BREAK", "NOP", "YIELD", "WARPSYNC", "ENDCOLLECTIVE", "STG", "ST", "STAS"),
    *("BAR", "MEMBAR", "FENCE", "ERRBAR", "CGAERRBAR", "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT"),
}
#: Operations whose U is not that of the uniform registers.
ALONE = {"UBLKCP": "UBLKCP", "VOTEU": "VOTE"}


def rounding(mods: list[str]) -> Callable[[float], int]:
    ways = {"FLOOR": math.floor, "CEIL": math.ceil, "TRUNC": math.trunc}
    return next((ways[m] for m in mods if m in ways), round)


class Launch(NamedTuple):
    """What one thread sees of a launch."""

    arguments: bytes
    threads: int
    blocks: int
    cluster: int
    shared: int


class Thread:
    """Runs a kernel's thread; ``executed`` counts its instructions by operation."""

    def __init__(self, kernel: Kernel, launch: Launch, thread: int = 0):
        self.kernel, self.launch, self.thread = kernel, launch, thread
        self.registers: dict[str, int] = collections.defaultdict(int)
        self.flags = {"PT": True, "UPT": True}
        self.bank = bytearray(ARGUMENTS) + bytearray(launch.arguments) + bytearray(64)
        sizes = ((0, launch.threads), (4, 1), (8, 1), (12, launch.blocks), (16, 1), (20, 1), (0x188, launch.cluster))
        for at, value in sizes:
            struct.pack_into("<I", self.bank, at, value)
        self.shared = bytearray(max(launch.shared, 1) + 4096)
        self.executed: collections.Counter[str] = collections.Counter()
        self.stack: list[int] = []

    # ---- operands

    def flag(self, name: str) -> bool:
        return not self.flags.get(name[1:], False) if name[0] == "!" else self.flags.get(name, False)

    def address(self, text: str) -> int:
        total = 0
        for part in re.findall(r"[-+]?[^-+]+", text):
            sign, part = (-1, part[1:]) if part[0] == "-" else (1, part.lstrip("+"))
            wide = part.endswith(".64")
            name = re.sub(r"\.(64|U32|X\d+)", "", part)
            times = int(re.search(r"\.X(\d+)", part)[1]) if ".X" in part else 1  # type: ignore[index]
            value = int(name, 16) if name[0].isdigit() else self.pair(name) if wide else self.registers[name]
            total += sign * value * times
        return total

    def constant(self, text: str, size: int) -> int:
        match = re.match(r"c\[0x([0-9a-f]+)\]\s*\[(.*)\]", text)
        assert match, text
        bank = self.bank if match[1] == "0" else self.kernel.constants
        at = self.address(match[2]) & MASK
        return int.from_bytes(bank[at : at + size], "little")

    def pair(self, name: str) -> int:
        if name in ("RZ", "URZ", "SRZ"):
            return 0
        kind, number = re.match(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
        return self.registers[name] | self.registers[f"{kind}{int(number) + 1}"] << 32

    def put(self, name: str, value: int, words: int = 1) -> None:
        if name in ("RZ", "URZ"):
            return
        kind, number = re.match(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
        for word in range(words):
            self.registers[f"{kind}{int(number) + word}"] = value >> 32 * word & MASK

    def plain(self, text: str, wide: bool = False) -> int:
        """A register, a constant or a number: its bits, without signs."""
        if text[0] == "c":
            return self.constant(text, 8 if wide else 4)
        if text[0] in "RU":
            name = text.split(".")[0]
            return self.pair(name) if wide else self.registers[name]
        return int(text, 16) & (MASK64 if wide else MASK)

    def integer(self, text: str, wide: bool = False) -> int:
        """Not reduced: minus 0 is 2^32, so that sums carry as they do."""
        mask = MASK64 if wide else MASK
        if text[0] == "~":
            return ~self.integer(text[1:], wide) & mask
        if text[0] == "|":
            return abs(signed(self.plain(text[1:-1], wide)))
        if text[0] == "-":
            return mask + 1 - (self.plain(text[1:], wide) & mask)
        return self.plain(text, wide)

    def real(self, text: str, wide: bool = False) -> float:
        text = text.strip()
        if text[0] == "-" and not text[1:2].isdigit():
            return -self.real(text[1:], wide)
        if text[0] == "+":
            return self.real(text[1:], wide)
        if text[0] == "|":
            return abs(self.real(text[1:-1], wide))
        if text[0] in "RUc":
            return to_double(self.plain(text, True)) if wide else to_float(self.plain(text))
        if text.startswith(("INF", "QNAN")):
            return math.inf if text[0] == "I" else math.nan
        return float(int(text, 16)) if text.startswith("0x") else float(text)

    # ---- memory

    def load(self, text: str, size: int, space: str) -> int:
        match = re.match(r"(?:desc\[\w+\])?\[(.*)\]", text)
        assert match, text
        at = self.address(match[1])
        if space == "shared":
            at &= 0xFFFFFF
            return int.from_bytes(self.shared[at : at + size], "little")
        return int.from_bytes(ctypes.string_at(at & MASK64, size), "little")

    # ---- instructions

    def run(self, limit: int = 3_000_000) -> collections.Counter[str]:
        at, steps = 0, 0
        while True:
            steps += 1
            if steps > limit:
                raise RuntimeError(f"no end after {limit} instructions, at {at:#x}")
            guard, op, operands = self.kernel.code[at]
            self.executed[op] += 1
            then = at + 16
            if not self.flag(guard):
                at = then
                continue
            base, *mods = op.split(".")
            if base == "EXIT":
                return self.executed
            if base in ("BRA", "BRX", "CALL", "RET"):
                at = self.jump(base, mods, operands, then)
                continue
            if base not in NOTHING:
                method = getattr(self, f"do_{ALONE.get(base, base.removeprefix('U'))}", None)
                if method is None:
                    raise NotImplementedError(f"{op} {operands} at {at:#x}")
                try:
                    method(mods, operands)
                except Exception as error:
                    raise RuntimeError(f"{op} {operands} at {at:#x}: {error!r}") from error
            at = then

    def jump(self, base: str, mods: list[str], operands: tuple[str, ...], then: int) -> int:
        if base == "BRX":
            register, offset = operands[0].split()
            return signed(self.registers[register]) + then + int(offset, 16)
        if base == "RET":
            return self.pair(operands[0].split()[0])
        if "DIV" in mods:  # some lanes apart: never here
            return then
        if base == "CALL":
            return int(operands[-1], 16)
        if len(operands) > 1 and not self.flag(operands[0]):
            return then
        return int(operands[-1], 16)

    def do_MOV(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], self.integer(o[1]))

    def do_IMAD(self, mods: list[str], o: tuple[str, ...]) -> None:
        high, wide, unsigned = "HI" in mods, "WIDE" in mods, "U32" in mods
        a, b = (self.integer(x) & MASK for x in o[1:3])
        if not unsigned:
            a, b = signed(a), signed(b)
        if wide or high:
            # A number, or a pair of registers also where only the high word is wanted.
            c = self.integer(o[3], o[3][0] in "RU-")
            out = a * b + c if wide else (a * b + c) >> 32
        else:
            out = a * b + self.integer(o[3]) + ("X" in mods and self.flag(o[4]))
        self.put(o[0], out, 2 if wide else 1)

    def do_IADD3(self, mods: list[str], o: tuple[str, ...]) -> None:
        outs, rest = [], list(o[1:])
        while re.fullmatch(r"U?P\w+", rest[0]):
            outs.append(rest.pop(0))
        total = sum(self.integer(x) for x in rest[:3])
        if "X" in mods:
            total += sum(self.flag(x) for x in rest[3:])
        self.put(o[0], total)
        for i, name in enumerate(outs):
            self.flags[name] = (total >> 32) > i
        self.flags["PT"] = self.flags["UPT"] = True

    def do_VIADD(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], self.integer(o[1]) + self.integer(o[2]))

    def do_IADD(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], self.integer(o[1]) + self.integer(o[2]))

    def do_LEA(self, mods: list[str], o: tuple[str, ...]) -> None:
        out, rest = None, list(o[1:])
        if re.fullmatch(r"U?P\w+", rest[0]):
            out = rest.pop(0)
        a, b = self.integer(rest[0]), self.integer(rest[1])
        if "HI" not in mods:
            total = ((a << int(rest[2], 16)) & MASK) + b
        else:
            if "SX32" in mods:
                wide, shift, carry = signed(a & MASK), rest[2], rest[3:]
            else:
                wide, shift, carry = (a & MASK) | self.integer(rest[2]) << 32, rest[3], rest[4:]
            total = ((wide << int(shift, 16)) >> 32 & MASK) + b
            if "X" in mods:
                total += self.flag(carry[0])
        self.put(o[0], total)
        if out and out not in ("PT", "UPT"):
            self.flags[out] = total > MASK

    def do_LOP3(self, mods: list[str], o: tuple[str, ...]) -> None:
        out, rest = None, list(o)
        if re.fullmatch(r"U?P\w+", rest[0]):
            out = rest.pop(0)
        a, b, c = (self.integer(x) & MASK for x in rest[1:4])
        table, value = int(rest[4], 16), 0
        for i in range(8):
            if table >> i & 1:
                value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        value &= MASK
        self.put(rest[0], value)
        if out and out not in ("PT", "UPT"):
            self.flags[out] = value != 0 or self.flag(rest[5])

    def do_PLOP3(self, mods: list[str], o: tuple[str, ...]) -> None:
        index = sum(self.flag(x) << (2 - i) for i, x in enumerate(o[2:5]))
        for name, table in zip(o[:2], o[5:7], strict=True):
            if name not in ("PT", "UPT"):
                self.flags[name] = bool(int(table, 16) >> index & 1)

    def do_SHF(self, mods: list[str], o: tuple[str, ...]) -> None:
        low, by, high = self.integer(o[1]) & MASK, self.integer(o[2]) & MASK, self.integer(o[3]) & MASK
        wide = "U64" in mods or "S64" in mods
        by = min(by, 63 if wide else 32) if "W" not in mods else by & (63 if wide else 31)
        both = low | high << 32
        if mods[0] == "L":
            out = both << by
            self.put(o[0], out >> 32 if "HI" in mods or wide else low << by)
        else:
            if "S64" in mods or "S32" in mods:
                both = signed(both, 64)
            if "HI" in mods:  # of the high word alone, unless it is the low one's continuation
                self.put(o[0], (both >> 32) >> by)
            else:
                self.put(o[0], both >> by)

    def do_ISETP(self, mods: list[str], o: tuple[str, ...]) -> None:
        a, b = (self.integer(x) & MASK for x in o[2:4])
        if "U32" not in mods:
            a, b = signed(a), signed(b)
        truth = COMPARE[mods[0]](a, b)
        if "EX" in mods and a == b:
            truth = self.flag(o[5])
        self.compared(mods, o, truth)

    def compared(self, mods: list[str], o: tuple[str, ...], truth: bool) -> None:
        join = next(JOIN[m] for m in mods[1:] if m in JOIN)
        with_it = self.flag(o[4])
        for name, value in ((o[0], truth), (o[1], not truth)):
            if name not in ("PT", "UPT"):
                self.flags[name] = join(value, with_it)

    def do_FSETP(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.compared(mods, o, COMPARE[mods[0]](self.real(o[2]), self.real(o[3])))

    def do_DSETP(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.compared(mods, o, COMPARE[mods[0]](self.real(o[2], True), self.real(o[3], True)))

    def do_FSET(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_float(float(COMPARE[mods[1]](self.real(o[1]), self.real(o[2])))))

    def do_SEL(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], self.integer(o[1] if self.flag(o[3]) else o[2]))

    def do_FSEL(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_float(self.real(o[1] if self.flag(o[3]) else o[2])))

    def do_FMNMX(self, mods: list[str], o: tuple[str, ...]) -> None:
        a, b = self.real(o[1]), self.real(o[2])
        either = b if a != a else a if b != b else min(a, b) if self.flag(o[3]) else max(a, b)
        self.put(o[0], of_float(either))

    def do_VIMNMX(self, mods: list[str], o: tuple[str, ...]) -> None:
        a, b = (self.integer(x) & MASK for x in o[1:3])
        if "U32" not in mods:
            a, b = signed(a), signed(b)
        self.put(o[0], min(a, b) if self.flag(o[3]) else max(a, b))

    def do_VIADDMNMX(self, mods: list[str], o: tuple[str, ...]) -> None:
        a, b = (self.integer(o[1]) + self.integer(o[2])) & MASK, self.integer(o[3]) & MASK
        if "U32" not in mods:
            a, b = signed(a), signed(b)
        self.put(o[0], min(a, b) if self.flag(o[4]) else max(a, b))

    def do_IABS(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], abs(signed(self.integer(o[1]))))

    def do_POPC(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], self.integer(o[1]).bit_count())

    def do_FLO(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], (self.integer(o[1]) & MASK).bit_length() - 1)

    def do_BREV(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], int(f"{self.integer(o[1]) & MASK:032b}"[::-1], 2))

    def do_FADD(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_float(self.real(o[1]) + self.real(o[2])))

    def do_FMUL(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_float(self.real(o[1]) * self.real(o[2])))

    def do_FFMA(self, mods: list[str], o: tuple[str, ...]) -> None:
        out = self.real(o[1]) * self.real(o[2]) + self.real(o[3])
        self.put(o[0], of_float(min(max(out, 0.0), 1.0) if "SAT" in mods else out))

    def do_DADD(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_double(self.real(o[1], True) + self.real(o[2], True)), 2)

    def do_DMUL(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_double(self.real(o[1], True) * self.real(o[2], True)), 2)

    def do_DFMA(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], of_double(self.real(o[1], True) * self.real(o[2], True) + self.real(o[3], True)), 2)

    def do_FCHK(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.flags[o[0]] = not 1e-30 < abs(self.real(o[2])) < 1e30 or abs(self.real(o[1])) > 1e30

    def do_MUFU(self, mods: list[str], o: tuple[str, ...]) -> None:
        if mods[0] in ("RCP64H", "RSQ64H"):
            x = to_double(self.integer(o[1]) << 32)
            value = (1 / x if x else math.inf) if mods[0] == "RCP64H" else x**-0.5 if x > 0 else math.inf
            return self.put(o[0], of_double(value) >> 32)
        x = self.real(o[1])
        with_limits: dict[str, Callable[[float], float]] = {
            "EX2": lambda x: 2.0**x if x < 128 else math.inf,
            "LG2": lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan,
            "RCP": lambda x: 1 / x if x else math.copysign(math.inf, x),
            "RSQ": lambda x: x**-0.5 if x > 0 else math.inf if x == 0 else math.nan,
            "SQRT": lambda x: x**0.5 if x >= 0 else math.nan,
            "TANH": math.tanh,
        }
        self.put(o[0], of_float(x if x != x else with_limits[mods[0]](x)))
        return None

    def do_I2F(self, mods: list[str], o: tuple[str, ...]) -> None:
        wide = "U64" in mods or "S64" in mods
        value = self.integer(o[1], wide)
        if not any(m[0] == "U" for m in mods):
            value = signed(value, 64 if wide else 32)
        if "F64" in mods:
            self.put(o[0], of_double(float(value)), 2)
        else:
            self.put(o[0], of_float(float(value)))

    do_I2FP = do_I2F

    def do_F2I(self, mods: list[str], o: tuple[str, ...]) -> None:
        x = self.real(o[1], "F64" in mods)
        how = rounding(mods)
        self.put(o[0], how(x) if math.isfinite(x) else 0, 2 if "U64" in mods or "S64" in mods else 1)

    def do_F2F(self, mods: list[str], o: tuple[str, ...]) -> None:
        to, of = mods[-2:]
        x = self.real(o[1], of == "F64")
        self.put(o[0], of_double(x) if to == "F64" else of_float(x), 2 if to == "F64" else 1)

    def do_FRND(self, mods: list[str], o: tuple[str, ...]) -> None:
        x = self.real(o[1])
        how = rounding(mods)
        self.put(o[0], of_float(float(how(x)) if math.isfinite(x) else x))

    def do_F2FP(self, mods: list[str], o: tuple[str, ...]) -> None:
        to = bfloat if "BF16" in mods else of_half
        self.put(o[0], to(self.real(o[1])) << 16 | to(self.real(o[2])))

    def halves(self, text: str, to: Callable[[int], float]) -> tuple[float, float]:
        sign = -1.0 if text[0] == "-" else 1.0
        bits = self.plain(text.lstrip("-").split(".")[0]) if text.lstrip("-")[0] in "RUc" else None
        if bits is None:
            return float(text), float(text)
        low, high = bits & 0xFFFF, bits >> 16
        if ".H0" in text:
            high = low
        if ".H1" in text:
            low = high
        return sign * to(low), sign * to(high)

    def do_HADD2(self, mods: list[str], o: tuple[str, ...]) -> None:
        a, b = (self.halves(x, half) for x in o[1:3])
        if "F32" in mods:
            self.put(o[0], of_float(a[0] + b[0]))
        else:
            self.put(o[0], of_half(a[0] + b[0]) | of_half(a[1] + b[1]) << 16)

    def do_HFMA2(self, mods: list[str], o: tuple[str, ...]) -> None:
        if "BF16" in mods or "BF16_V2" in mods:
            widen: Callable[[int], float] = lambda bits: to_float(bits << 16)  # noqa: E731
            a, b, c = (self.halves(x, widen) for x in o[1:4])
            self.put(o[0], bfloat(a[0] * b[0] + c[0]) | bfloat(a[1] * b[1] + c[1]) << 16)
            return
        # Nearly always a constant: its two halves, the high one first.
        assert o[1] in ("-RZ", "RZ") and o[2] == "RZ", o
        self.put(o[0], of_half(float(o[3])) << 16 | of_half(float(o[4])))

    def do_HMNMX2(self, mods: list[str], o: tuple[str, ...]) -> None:
        widen = (lambda bits: to_float(bits << 16)) if "BF16_V2" in mods else half
        narrow = bfloat if "BF16_V2" in mods else of_half
        best = min if self.flag(o[-1]) else max
        values = [self.halves(x, widen) for x in o[1:-1]]
        self.put(o[0], narrow(best(v[0] for v in values)) | narrow(best(v[1] for v in values)) << 16)

    do_VHMNMX = do_HMNMX2

    def do_PRMT(self, mods: list[str], o: tuple[str, ...]) -> None:
        both = (self.integer(o[1]) & MASK) | self.integer(o[3]) << 32
        how, out = self.integer(o[2]), 0
        for i in range(4):
            select = how >> 4 * i & 15
            byte = both >> 8 * (select & 7) & 0xFF
            out |= (0xFF if byte >> 7 else 0) << 8 * i if select & 8 else byte << 8 * i
        self.put(o[0], out)

    def size(self, mods: list[str]) -> tuple[int, bool]:
        for name, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
            if name in mods:
                return size, name[0] == "S"
        return 4, False

    def loaded(self, mods: list[str], to: str, value: int) -> None:
        size, sign = self.size(mods)
        self.put(to, signed(value, 8 * size) if sign else value, max(1, size // 4))

    def do_LDC(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.loaded(mods, o[0], self.constant(o[1], self.size(mods)[0]))

    def do_LDG(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.loaded(mods, o[0], self.load(o[1], self.size(mods)[0], "global"))

    def do_LD(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.loaded(mods, o[0], self.load(o[1], self.size(mods)[0], "global"))

    def do_LDS(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.loaded(mods, o[0], self.load(o[1], self.size(mods)[0], "shared"))

    def do_STS(self, mods: list[str], o: tuple[str, ...]) -> None:
        size = self.size(mods)[0]
        at = self.address(o[0][1:-1]) & 0xFFFFFF
        value = self.integer(o[1]) if size <= 4 else sum(
            self.registers[f"R{int(o[1][1:]) + i}"] << 32 * i for i in range(size // 4)
        ) if o[1] != "RZ" else 0  # fmt: skip
        self.shared[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def do_UBLKCP(self, mods: list[str], o: tuple[str, ...]) -> None:
        to, of, count = self.registers[o[0][1:-1]] & 0xFFFFFF, self.pair(o[1][1:-1]), self.registers[o[2]]
        size = 16 * (count & 0xFFFF)
        self.shared[to : to + size] = ctypes.string_at(of, size)

    def do_S2R(self, mods: list[str], o: tuple[str, ...]) -> None:
        known = {"SR_TID.X": self.thread, "SR_LANEID": self.thread % 32, "SR_CgaSize": self.launch.cluster}
        known |= {"SR_CgaCtaId": 0, "SR_CTAID.X": 0, "SR_SWINHI": 0, "SRZ": 0, "SR_NTID": self.launch.threads}
        known |= {"SR_CLUSTER_CTARANK": 0, "SR_CLUSTER_NCTARANK": self.launch.cluster}
        self.put(o[0], known[o[1]])

    do_S2UR = do_S2R

    def do_CS2R(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.put(o[0], 0, 1 if "32" in mods else 2)

    def do_R2UR(self, mods: list[str], o: tuple[str, ...]) -> None:
        if len(o) > 2:
            self.flags[o[0]] = False  # no lane has another value
        self.put(o[-2], self.integer(o[-1]))

    def do_P2R(self, mods: list[str], o: tuple[str, ...]) -> None:
        flags = sum(self.flag(f"P{i}") << i for i in range(7))
        self.put(o[0], flags & self.integer(o[3]) | self.integer(o[2]) & ~self.integer(o[3]))

    def do_R2P(self, mods: list[str], o: tuple[str, ...]) -> None:
        value, mask = self.integer(o[1]), self.integer(o[2])
        if ".B" in o[1]:
            value >>= 8 * int(o[1][-1])
        for i in range(7):
            if mask >> i & 1:
                self.flags[f"P{i}"] = bool(value >> i & 1)

    def do_SHFL(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.flags[o[0]] = True
        self.flags["PT"] = True
        self.put(o[1], self.integer(o[2]))

    def do_VOTE(self, mods: list[str], o: tuple[str, ...]) -> None:
        names = [x for x in o[:2] if re.fullmatch(r"U?P\w+", x)]
        value = self.flag(o[-1])
        for name in names[: len(o) - 1]:
            if name not in ("PT", "UPT"):
                self.flags[name] = value
        for name in o[:-1]:
            if re.fullmatch(r"U?R\w+", name):
                self.put(name, MASK if value else 0)

    def do_ELECT(self, mods: list[str], o: tuple[str, ...]) -> None:
        self.flags[o[0]] = True

    def do_SYNCS(self, mods: list[str], o: tuple[str, ...]) -> None:
        if mods[0] == "PHASECHK" and re.fullmatch(r"P\d", o[0]):
            self.flags[o[0]] = True


# ---- launches --------------------------------------------------------------------------------------------------------


class Watched(NamedTuple):
    body: str  # RowsShortIfNS_8bfloat16ELi8ELb0EE, as names are mangled
    launch: Launch
    executed: collections.Counter[str]


def watched(call: Callable[[], Any], kernels: dict[str, Kernel], **forced: Any) -> list[Watched]:
    """The launches of row kernels that a call makes on an H100, each with what its thread executes."""
    sys.path.insert(0, str(ROOT / "tests"))
    import simt

    library, why = simt.library()
    if library is None:
        raise RuntimeError(why)
    found: list[Watched] = []
    failed: list[BaseException] = []

    def seen(body: bytes, arguments: int, size: int, blocks: int, warps: int, cluster: int, shared: int) -> None:
        match = re.search(r"Rows(?:Short|Long|Apart)I.*?E(?=E*$)", body.decode())
        if match is None or failed:
            return
        launch = Launch(ctypes.string_at(arguments, size), 32 * warps, blocks, cluster, shared)
        kernel = next(k for name, k in kernels.items() if match[0] in name)
        try:
            # While the call's tensors are there.
            found.append(Watched(match[0], launch, Thread(kernel, launch).run()))
        except BaseException as error:  # ctypes would swallow it
            failed.append(error)

    watch = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 5)(seen)
    library.mlkernels_simt_watch(watch, 132, 227 << 10)
    try:
        with simt.forced(**forced):
            call()
    finally:
        library.mlkernels_simt_watch(None, 2, 48 << 10)
    if failed:
        raise failed[0]
    return found


class Count(NamedTuple):
    """Lane-instructions of a row: all, and those of two slow kinds."""

    body: str
    row: float
    special: float  # MUFU: a quarter of a multiprocessor's lanes
    shared: float  # shared memory and exchanges
    percent: float  # of what a copy of the floor's bytes leaves time for
    kinds: collections.Counter[str]


SPECIAL, SHARED = ("MUFU",), ("LDS", "STS", "SHFL", "ATOMS")


MANY_ROWS = 4097  # fewer are planned as a small problem


def count(
    loss: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: Any,
    gradient: bool,
    kernels: dict[str, Kernel],
    **forced: Any,
) -> Count:
    """A row's cost from two launches; ``shape`` is (C,) or (C, d1, ...), under "mean"."""
    import torch

    classes, inner = shape[0], math.prod(shape[1:])

    def one(rows: int, teams: int) -> Watched:
        batch = -(-rows // inner)
        input = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        target = torch.arange(batch * inner).view(batch, *shape[1:]) * 7 % classes
        call = lambda: loss(input.requires_grad_(gradient), target, backend="cuda")  # noqa: E731
        return watched(call, kernels, **{"teams": teams, "cluster": -1, **forced})[0]

    short = forced.get("way", "short" if classes <= 1024 else "long") == "short" and inner == 1
    probe = one(MANY_ROWS if short else 2, 1 << 20)
    warps = probe.launch.threads // 32
    # What a team, a block or a cluster, does in one turn of its loop.
    if "Short" in probe.body:
        together = warps * struct.unpack_from("<i", probe.launch.arguments, len(probe.launch.arguments) - 12)[0]
    else:
        together = 2 * probe.launch.threads if "Apart" in probe.body else 1  # perhaps two rows of a thread
    teams = -(-MANY_ROWS // together) if short else 1
    few, many = one(2 * together * teams, teams), one(6 * together * teams, teams)
    per_row = 32 * warps * many.launch.blocks / teams / (4 * together)
    kinds: collections.Counter[str] = collections.Counter()
    for op in many.executed:
        kinds[op.split(".")[0]] += (many.executed[op] - few.executed[op]) * per_row  # type: ignore[assignment]
    row = sum(kinds.values())
    floor = (1 + gradient) * classes * dtype.itemsize + 8
    part = lambda names: sum(kinds[name] for name in names)  # noqa: E731
    return Count(probe.body, row, part(SPECIAL), part(SHARED), 100 * row * COPY_RATE / LANE_RATE / floor, kinds)


SHORT, LONG = (2, 10, 100, 256, 1000), (4096, 8192, 16384, 50257, 128256)


def main() -> None:
    import torch

    import mlkernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="*", default=[*SHORT, *LONG])
    parser.add_argument("--kinds", type=int, default=0, help="how many of the most frequent operations to print")
    parser.add_argument("--way", choices=("short", "long", "streamed", "apart"))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--loss", nargs="*", default=["cross_entropy", "modulated_cross_entropy"])
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import simt

    simt.install()
    where = ROOT / "build"
    print("per row: lane-instructions; of the budget: what a copy of the same bytes leaves time for\n")
    print(f"{'kernel':<34}{'shape':<18}{'':<26}{'of a row':>9}{'element':>9}{'MUFU':>7}{'shared':>7}{'budget':>8}")
    for dtype in arguments.dtype:
        objects = f"rows_{'float' if dtype == 'float32' else dtype}.o"
        kernels = kernels_of(next(where.glob(f"*/cuda/{objects}")), cuobjdump())
        shapes: list[tuple[int, ...]] = [(c,) for c in arguments.classes]
        if arguments.way in (None, "apart") and list(arguments.classes) == [*SHORT, *LONG]:
            shapes.append((19, 32, 64))
        for shape in shapes:
            for name in arguments.loss:
                for gradient in (False, True):
                    loss = getattr(mlkernels, name)
                    forced = {"way": arguments.way} if arguments.way else {}
                    found = count(loss, shape, getattr(torch, dtype), gradient, kernels, **forced)
                    flags = re.sub(r"NS_\d+(\w+?)E|I[fd]{1,2}(?=L)", "", found.body.removesuffix("E"))
                    what = f"{dtype} {name.removesuffix('_cross_entropy')[:13]} {'visit' if gradient else 'forward'}"
                    print(
                        f"{flags:<34.34}{'x'.join(map(str, shape)):<12}{what:<32.32}{found.row:>9.0f}"
                        f"{found.row / shape[0]:>9.1f}{found.special / shape[0]:>7.2f}{found.shared / shape[0]:>7.2f}"
                        f"{found.percent:>7.0f}%",
                        flush=True,
                    )
                    if arguments.kinds:
                        print("   ", ", ".join(f"{k} {n:.0f}" for k, n in found.kinds.most_common(arguments.kinds)))


def cuobjdump() -> str:
    """From the toolkit, or from Triton's package."""
    import importlib.util
    import shutil

    found, spec = shutil.which("cuobjdump"), importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = next(map(str, Path(spec.origin).parent.glob("backends/nvidia/bin/cuobjdump")), None)
    if found is None:
        raise RuntimeError("needs cuobjdump, of CUDA's toolkit or of Triton's package")
    return found


if __name__ == "__main__":
    main()

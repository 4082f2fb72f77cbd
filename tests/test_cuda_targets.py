"""The CUDA C++ kernels compiled for their targets: no spills, no stack, 16-byte accesses, each chip's own copies."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FULL = bool(os.environ.get("MLKERNELS_FULL"))
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402

# Of sm_90 what the build has made anyhow. What is no sm_90 copies otherwise; what is newer has the same copies.
ALWAYS = [("90", storage) for storage in build.STORAGES] + [("80", "bfloat16")]
MORE = [(arch, storage) for arch in build.CUDA_ARCHS for storage in build.STORAGES if (arch, storage) not in ALWAYS]
CASES = ALWAYS + (MORE if FULL else [])


def tool(name):
    """From the toolkit, or from Triton's package."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        found = next(map(str, Path(spec.origin).parent.glob(f"backends/nvidia/bin/{name}")), None)
    return found


CUOBJDUMP = tool("cuobjdump")
try:
    NVCC = build.find_nvcc()
except build.CannotBuild:
    NVCC = None
pytestmark = pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="needs nvcc and cuobjdump")


def compiled(arch, storage):
    """The object of the rows of one storage type for one target."""
    here = build.OBJECTS / ("cuda" if build.cuda_archs(NVCC) == [arch] else f"cuda-{arch}")
    unit = next(
        u for u in build.cuda_units(NVCC, build.find_compiler(), here, [arch]) if u.output.name == f"rows_{storage}.o"
    )
    build.make_units([unit])
    return unit.output


def dumped(path, option):
    return subprocess.run([CUOBJDUMP, option, str(path)], capture_output=True, text=True, check=True).stdout


def short(name):
    """RowsLong<float, bfloat16, general, streamed> of a mangled name."""
    kind = re.search(r"Rows(Long|Short|Strided)", name)[0]
    options = re.search(rf"{kind}I(.*?)EEN", name)
    flags = re.findall(r"L([ib])(\d+)E", options[1] + "E" if options else "")
    names = {"RowsLong": ("general", "streamed"), "RowsShort": ("elements", "general"), "RowsStrided": ()}[kind]
    said = [
        n if t == "b" else f"{value} {n}"
        for n, (t, value) in zip(names, flags, strict=False)
        if t == "i" or value == "1"
    ]
    return " ".join([kind, *said])


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Where every process leaves its lines; conftest.py prints them."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cuda-targets.txt"


@pytest.mark.parametrize(("arch", "storage"), CASES, ids=[f"sm_{a}-{s}" for a, s in CASES])
def test_rows(arch, storage, table):
    path = compiled(arch, storage)
    usage = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", dumped(path, "--dump-resource-usage"))
    kernels = [(name, dict(re.findall(r"(\w+):(\d+)", line))) for name, line in usage if "Rows" in name]
    # 4 of long rows, 1 of strided rows, and 2 of short rows for each number of columns that a lane may hold.
    assert len(kernels) == (7 if storage == "double" else 9)
    lines = []
    for name, used in sorted(kernels, key=lambda kernel: short(kernel[0])):
        lines.append(
            f"sm_{arch:<5}{storage:<10}{short(name):<30}{used['REG']:>4} registers, "
            f"stack {used['STACK']}, local {used['LOCAL']}"
        )
        assert int(used["STACK"]) == int(used["LOCAL"]) == 0, lines[-1]
    with table.open("a") as file:
        file.write("\n".join(lines) + "\n")

    code = dumped(path, "-sass")
    for function in code.split("Function : ")[1:]:
        name = function.split()[0]
        if "Rows" not in name:
            continue
        assert not re.search(r"\b(LDL|STL)\b", function), short(name)
        if "RowsStrided" in name:
            continue
        assert "STG.E.NA.128" in function or re.search(r"STG.E\S*.128", function), short(name)
        assert re.search(r"LDS\S*.128", function), short(name)
        if int(re.match(r"\d+", arch)[0]) >= 90:
            assert "UBLKCP" in function and "SYNCS" in function, short(name)
        else:
            assert re.search(r"LDGSTS\S*.128", function), short(name)


def in_flight(function):
    """Bytes that a thread has asked global memory for before it looks at the first of them; the most first."""
    batches, asked = [], {}
    for operation, operands in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", function):
        first, _, rest = operands.partition(",")
        writes = re.fullmatch(r"R(\d+)", first.strip())
        read = re.findall(r"\bR(\d+)\b", rest if writes else operands)
        if asked.keys() & {int(register) for register in read}:
            batches.append(sum(asked.values()))
            asked = {}
        if operation.startswith("LDG") and writes:
            width = re.search(r"\.(?:[US](8|16)|(64|128))\b", operation)
            asked[int(writes[1])] = int(width[1] or width[2]) // 8 if width else 4
    return sorted([*batches, sum(asked.values())], reverse=True)


#: Of each kernel around the rows: the bytes that a thread is to have on their way in each of its loops, where operands
#: are float32.
AHEAD = {
    "Prologue": (32 * 4, 8 * 8),
    "TotalLoss": (8 * 16,),
    "SumBuckets": (8 * 4,),
    "SortKeys": (8 * 8,),
    "SumRuns": (2 * 4 * 8,),
    "CopyMany": (4 * 16,),
    "StoreSums": (4,),
}


def test_copies_and_sums(table):
    """No stack; as many bytes on their way before the first is looked at as the kernels mean to have."""
    here = build.OBJECTS / ("cuda" if build.cuda_archs(NVCC) == ["90"] else "cuda-90")
    unit = next(u for u in build.cuda_units(NVCC, build.find_compiler(), here, ["90"]) if u.output.name == "others.o")
    build.make_units([unit])
    usage = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", dumped(unit.output, "--dump-resource-usage"))
    assert len(usage) == 14
    for name, line in usage:
        used = dict(re.findall(r"(\w+):(\d+)", line))
        assert int(used["STACK"]) == int(used["LOCAL"]) == 0, name
    functions = dumped(unit.output, "-sass").split("Function : ")[1:]
    assert len(functions) == 14
    lines, seen = [], set()
    for function in functions:
        name = function.split()[0]
        kind = next(kind for kind in AHEAD if kind in name)
        seen.add(kind)
        found = in_flight(function)
        most = found[0]
        lines.append(f"sm_90   {kind:<14}{most:>4} bytes of a thread on their way, {256 * most >> 10} KiB of a block")
        assert all(a >= b for a, b in zip(found, AHEAD[kind], strict=False)), (lines[-1], found)
        assert kind != "CopyMany" or re.search(r"LDG\S*\.128", function)
    assert seen == AHEAD.keys()
    with table.open("a") as file:
        file.write("\n".join(lines) + "\n")

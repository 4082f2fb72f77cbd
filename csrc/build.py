"""Builds the compiled kernels: ``python csrc/build.py`` in place, setup.py for an installation.

* ``mlkernels/_cpu.abi3.so``, the CPU's;
* ``mlkernels/_cuda.abi3.so`` where there is nvcc, also against a torch without CUDA, which does not load it.
  ``MLKERNELS_CUDA=0`` leaves it out, ``MLKERNELS_CUDA=1`` says loudly if it cannot be built;
  ``MLKERNELS_CUDA_ARCHS=90a`` (a list, by comma) builds for fewer devices than :data:`CUDA_ARCHS`, and in less time;
* with ``--simt`` the CUDA kernels for the host, which only the tests load.

Standard library only: an interpreter that has torch but no (recent) setuptools can build in place all the same.

The libraries are no Python modules: they register their operators with torch through LibTorch's stable ABI, and one
binary serves every torch from 2.11 on and every Python. So Python's own compiler settings have no say here; ``CXX``,
``CXXFLAGS`` and ``LDFLAGS`` do.

Where one cannot be built (no torch, no compiler, an error) the package installs all the same and runs without it. The
reason, one line, is left in ``mlkernels/_cpu.error.txt`` or ``_cuda.error.txt`` for ``python -m mlkernels`` to show.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
# Not setuptools' build_temp: that is a fresh directory in every editable install.
OBJECTS = ROOT / "build" / f"{sys.platform}-{platform.machine()}"

OLDEST_TORCH = (2, 11)
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    # Enough to vectorise. Never -ffast-math: it loses the NaN and inf checks, and gcc then links code that flushes
    # subnormals in the whole process. Never -march=native: the binary picks its instruction set where it runs.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
    # Nothing includes Python.h; should something ever do, it must keep to what every Python since 3.10 has.
    "-DPy_LIMITED_API=0x030A0000",
]
# csrc/cpu/kernels.cpp is compiled once for each; library_cpu.cpp chooses among them at run time.
ISAS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ]


# csrc/cuda/rows.cu is compiled once for each.
STORAGES = ("float", "double", "bfloat16", "float16")
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]
NVCC_FLAGS += ["-DMLKERNELS_ISA=cuda"]


class CannotBuild(Exception):
    """Why there will be no library, in one line."""


def find_torch() -> Path:
    """The installed torch's directory; it is not imported, which takes seconds and can fail for other reasons."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "torch was not there at build time; install it first, then mlkernels with pip install --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return Path(spec.submodule_search_locations[0])


def find_compiler() -> list[str]:
    if sys.platform == "win32":
        raise CannotBuild("only gcc and clang are supported, not yet Windows")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler: {chosen[0] if chosen else 'c++, g++ or clang++'} was not found")


def make(output: Path, command: list[str], inputs: list[Path]) -> None:
    """Runs ``command -o output``, unless this very command made it from these inputs already."""
    recipe = output.with_name(output.name + ".cmd")
    line = shlex.join(command)
    if output.exists() and recipe.exists() and recipe.read_text() == line:
        made = output.stat().st_mtime_ns
        if all(path.stat().st_mtime_ns < made for path in inputs):
            return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: a build that is cut off, or a second one at the same time, leaves nothing half done.
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    print(f"{line} -o {os.path.relpath(output, ROOT)}", flush=True)
    started = time.time_ns()
    try:
        done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            first = next((text for text in lines if "error" in text.lower()), lines[-1])
            raise CannotBuild(f"{command[0]} failed: {first.strip()[:300]}")
        os.utime(partial, ns=(started, started))  # an input that is edited meanwhile is newer
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    recipe.write_text(line)


class Unit(NamedTuple):
    """A source and how it is compiled."""

    output: Path
    source: Path
    command: list[str]


def make_units(units: list[Unit]) -> list[Path]:
    headers = sorted(CSRC.rglob("*.h"))

    def compile_one(unit: Unit) -> None:
        if not unit.source.exists():
            raise CannotBuild(f"{unit.source.relative_to(ROOT)} is missing")
        make(unit.output, [*unit.command, "-c", str(unit.source.relative_to(ROOT))], [unit.source, *headers])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, units))
    return [unit.output for unit in units]


def compiling(torch: Path, compiler: list[str]) -> list[str]:
    # -isystem: torch's headers are not ours to be warned about.
    command = [*compiler, *FLAGS, "-Wall", f"-I{CSRC.relative_to(ROOT)}", "-isystem", str(torch / "include")]
    return [*command, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def link(output: Path, compiler: list[str], objects: list[Path], *options: str) -> Path:
    # The shim is all of torch that is used, and in the process already when this is loaded.
    command = [*compiler, "-shared", *(os.path.relpath(path, ROOT) for path in objects), *options]
    if sys.platform == "linux":
        command += ["-Wl,--as-needed", "-Wl,--allow-shlib-undefined", "-s"]
    make(output, [*command, *shlex.split(os.environ.get("LDFLAGS", ""))], objects)
    return output


def make_cpu() -> Path:
    torch, compiler = find_torch(), find_compiler()
    command, here = compiling(torch, compiler), OBJECTS / "cpu"
    units = [
        Unit(here / f"kernels_{isa}.o", CSRC / "cpu" / "kernels.cpp", [*command, *flags, f"-DMLKERNELS_ISA={isa}"])
        for isa, flags in ISAS.items()
    ]
    units.append(Unit(here / "library_cpu.o", CSRC / "library_cpu.cpp", command))
    options = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "linux":
        options += ["-Wl,-z,defs"]  # a symbol of ours that no library has fails now and not at import
    return link(here / "_cpu.abi3.so", compiler, make_units(units), *options)


def find_nvcc() -> Path:
    if os.environ.get("MLKERNELS_CUDA") == "0":
        raise CannotBuild("left out by MLKERNELS_CUDA=0")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc") or (home and shutil.which(str(Path(home, "bin", "nvcc"))))
    if not found:
        raise CannotBuild("nvcc was found neither on PATH nor in CUDA_HOME")
    return Path(found)


def cuda_root(nvcc: Path) -> Path:
    """The toolkit that an nvcc belongs to: it says so itself."""
    said = subprocess.run([str(nvcc), "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1] if top else nvcc.resolve().parent.parent).resolve()


def cuda_archs() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get("MLKERNELS_CUDA_ARCHS", "").replace(" ", "").split(","))) or CUDA_ARCHS


def cuda_units(nvcc: Path, compiler: list[str], here: Path, archs: Sequence[str], *more: str) -> list[Unit]:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # And for devices that are none of these: compiled where it runs. Code of an "a" target runs nowhere else.
    targets += [
        f"-gencode=arch=compute_{arch},code=compute_{arch}"
        for arch in dict.fromkeys((archs[0], archs[-1]))
        if arch.isdigit()
    ]
    command = [str(nvcc), *NVCC_FLAGS, f"-ccbin={compiler[0]}", f"-I{CSRC.relative_to(ROOT)}", *targets, *more]
    rows = [Unit(here / f"rows_{s}.o", CSRC / "cuda" / "rows.cu", [*command, f"-DMLK_STORAGE={s}"]) for s in STORAGES]
    return [*rows, Unit(here / "others.o", CSRC / "cuda" / "others.cu", command)]


def make_cuda() -> Path:
    nvcc = find_nvcc()
    torch, compiler = find_torch(), find_compiler()
    root, here, archs = cuda_root(nvcc), OBJECTS / "cuda", cuda_archs()
    units = cuda_units(nvcc, compiler, here, archs)
    command = [*compiling(torch, compiler), "-isystem", str(root / "include"), "-DUSE_CUDA", "-DMLKERNELS_ISA=cuda"]
    command += ["-DMLK_LIBRARY=mlkernels", "-DMLK_KEY=CUDA", f'-DMLK_ARCHS="{",".join(archs)}"']
    units.append(Unit(here / "library_cuda.o", CSRC / "library_cuda.cpp", command))
    objects = make_units(units)
    static = next((path for path in sorted(root.glob("**/libcudart_static.a")) if "stubs" not in path.parts), None)
    if static is None:
        raise CannotBuild(f"{root} has no libcudart_static.a")
    # The CUDA part of the shim is in libtorch_cuda, which need not be here: no -z defs.
    options = [str(static), "-ldl", "-lrt", "-lpthread", f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--exclude-libs,ALL"]
    return link(here / "_cuda.abi3.so", compiler, objects, *options)


def make_simt() -> Path:
    """The CUDA kernels over fibers of the host (csrc/simt_host.h): for the tests, not for the package."""
    torch, compiler = find_torch(), find_compiler()
    here = OBJECTS / "simt"
    command = [flag for flag in compiling(torch, compiler) if flag not in ("-O3", "-fno-trapping-math")]
    command += ["-O2", "-DMLK_HOST", "-DMLKERNELS_ISA=host_simt"]
    as_cpp = [*command, "-x", "c++"]
    rows = CSRC / "cuda" / "rows.cu"
    units = [Unit(here / f"rows_{s}.o", rows, [*as_cpp, f"-DMLK_STORAGE={s}"]) for s in STORAGES]
    units.append(Unit(here / "others.o", CSRC / "cuda" / "others.cu", as_cpp))
    library = [*command, "-DMLK_LIBRARY=mlkernels_simt", "-DMLK_KEY=CPU"]
    units.append(Unit(here / "library.o", CSRC / "library_cuda.cpp", library))
    return link(here / "_simt.abi3.so", compiler, make_units(units), f"-L{torch / 'lib'}", "-ltorch_cpu")


def place(content: bytes, path: Path) -> None:
    # By rename: a process that runs the old library keeps it.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


LIBRARIES = {"_cpu": make_cpu, "_cuda": make_cuda}
#: What an installation may hold.
NAMES = [f"{stem}.{ending}" for stem in LIBRARIES for ending in ("abi3.so", "error.txt")]


def build_into(package: Path) -> None:
    """Puts the libraries, or the reasons why there are none, into this directory."""
    package.mkdir(parents=True, exist_ok=True)
    for stem, make_library in LIBRARIES.items():
        library, reason = package / f"{stem}.abi3.so", package / f"{stem}.error.txt"
        try:
            content = make_library().read_bytes()
            if not library.exists() or library.read_bytes() != content:
                place(content, library)
            reason.unlink(missing_ok=True)
        except CannotBuild as error:
            # One of an older source would still be loaded, and be wrong.
            library.unlink(missing_ok=True)
            place(f"{error}\n".encode(), reason)
            if stem == "_cpu" or os.environ.get("MLKERNELS_CUDA") == "1":
                what = "compiled kernels and will be slow" if stem == "_cpu" else "CUDA kernels"
                print(f"\nWARNING: mlkernels is without its {what}: {error}\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    build_into(ROOT / "mlkernels")
    if "--simt" in sys.argv[1:]:
        try:
            make_simt()
        except CannotBuild as error:
            print(f"\nWARNING: the CUDA kernels cannot be tested on this host: {error}\n", file=sys.stderr, flush=True)

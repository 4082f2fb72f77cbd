"""Builds the CPU kernels, ``mlkernels/_cpu.abi3.so``: ``python csrc/build.py`` in place, setup.py for an installation.
With ``--simt`` also the CUDA kernels for the host, which only the tests load.

Standard library only: an interpreter that has torch but no (recent) setuptools can build in place all the same.

The library is no Python module: it registers its operators with torch through LibTorch's stable ABI, and one binary
serves every torch from 2.11 on and every Python. So Python's own compiler settings have no say here; ``CXX``,
``CXXFLAGS`` and ``LDFLAGS`` do.

Where it cannot be built (no torch, no compiler, an error) the package installs all the same and runs on its reference
backend. The reason, one line, is left in ``mlkernels/_build_error.txt`` for ``python -m mlkernels`` to show.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
# Not setuptools' build_temp: that is a fresh directory in every editable install.
OBJECTS = ROOT / "build" / f"cpu-{sys.platform}-{platform.machine()}"
LIBRARY = "_cpu.abi3.so"
REASON = "_build_error.txt"

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


def make_library() -> Path:
    torch, compiler = find_torch(), find_compiler()
    # -isystem: torch's headers are not ours to be warned about.
    compile_command = [*compiler, *FLAGS, "-Wall", f"-I{CSRC.relative_to(ROOT)}", "-isystem", str(torch / "include")]
    compile_command += shlex.split(os.environ.get("CXXFLAGS", ""))
    kernels = CSRC / "cpu" / "kernels.cpp"
    units = [(OBJECTS / f"kernels_{isa}.o", kernels, [*flags, f"-DMLKERNELS_ISA={isa}"]) for isa, flags in ISAS.items()]
    units.append((OBJECTS / "library_cpu.o", CSRC / "library_cpu.cpp", []))
    headers = sorted(CSRC.rglob("*.h"))

    def compile_one(unit: tuple[Path, Path, list[str]]) -> None:
        output, source, flags = unit
        if not source.exists():
            raise CannotBuild(f"{source.relative_to(ROOT)} is missing")
        make(output, [*compile_command, *flags, "-c", str(source.relative_to(ROOT))], [source, *headers])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, units))
    objects = [output for output, _, _ in units]
    # The shim is all of torch that is used; libtorch_cpu has it, and is in the process already when this is loaded.
    link = [
        *compiler,
        "-shared",
        *(os.path.relpath(path, ROOT) for path in objects),
        f"-L{torch / 'lib'}",
        "-ltorch_cpu",
    ]
    if sys.platform == "linux":
        # A symbol of ours that no library has fails now and not at import; torch's own dependencies need not be here.
        link += ["-Wl,-z,defs", "-Wl,--as-needed", "-Wl,--allow-shlib-undefined", "-s"]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    library = OBJECTS / LIBRARY
    make(library, link, objects)
    return library


def make_simt() -> Path:
    """The CUDA kernels over fibers of the host (csrc/simt_host.h): for the tests, not for the package."""
    torch, compiler = find_torch(), find_compiler()
    objects_of = OBJECTS.with_name(OBJECTS.name.replace("cpu", "simt", 1))
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-fno-trapping-math")]
    flags += ["-O2", "-Wall", "-DMLK_HOST", "-DMLKERNELS_ISA=host_simt", f"-I{CSRC.relative_to(ROOT)}"]
    compile_command = [*compiler, *flags, "-isystem", str(torch / "include")]
    cuda = CSRC / "cuda"
    units = [(f"rows_{kind}.o", cuda / "rows.cu", [f"-DMLK_STORAGE={kind}"]) for kind in STORAGES]
    units.append(("others.o", cuda / "others.cu", []))
    units.append(("library.o", CSRC / "library_cuda.cpp", ["-DMLK_LIBRARY=mlkernels_simt", "-DMLK_KEY=CPU"]))
    headers = sorted(CSRC.rglob("*.h"))

    def compile_one(unit: tuple[str, Path, list[str]]) -> None:
        name, source, more = unit
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        command = [*compile_command, *more, *language, "-c", str(source.relative_to(ROOT))]
        make(objects_of / name, command, [source, *headers])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, units))
    objects = [objects_of / name for name, _, _ in units]
    link = [*compiler, "-shared", *(os.path.relpath(path, ROOT) for path in objects), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    library = objects_of / "_simt.abi3.so"
    make(library, link, objects)
    return library


def place(content: bytes, path: Path) -> None:
    # By rename: a process that runs the old library keeps it.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def build_into(package: Path) -> None:
    """Puts the library, or the reason why there is none, into this directory."""
    package.mkdir(parents=True, exist_ok=True)
    library, reason = package / LIBRARY, package / REASON
    try:
        content = make_library().read_bytes()
        if not library.exists() or library.read_bytes() != content:
            place(content, library)
        reason.unlink(missing_ok=True)
    except CannotBuild as error:
        # One of an older source would still be loaded, and be wrong.
        library.unlink(missing_ok=True)
        place(f"{error}\n".encode(), reason)
        warning = f"WARNING: mlkernels is without its compiled kernels and will be slow: {error}"
        print(f"\n{warning}\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    build_into(ROOT / "mlkernels")
    if "--simt" in sys.argv[1:]:
        try:
            make_simt()
        except CannotBuild as error:
            print(f"\nWARNING: the CUDA kernels cannot be tested on this host: {error}\n", file=sys.stderr, flush=True)

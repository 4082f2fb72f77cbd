"""Builds the compiled kernels: ``python csrc/build.py`` in place, setup.py for an installation.

* ``mlkernels/_cpu.abi3.so``, the CPU's;
* ``mlkernels/_cuda.abi3.so`` where torch is built with CUDA and there is an nvcc: for the GPUs of this machine, or for
  :data:`CUDA_ARCHS` where there are none. ``MLKERNELS_CUDA=0`` leaves it out; ``MLKERNELS_CUDA=1`` builds it for any
  torch, which loads it once that torch has CUDA, and says loudly if it cannot be built; ``MLKERNELS_CUDA_ARCHS=80,90``
  says for what;
* ``mlkernels/_fast_path.<Python>-torch-<version>.so``, which crosses from Python to the CPU's once per direction. It is
  built for the torch and the Python that are there and used by no others; ``MLKERNELS_FAST_PATH=0`` leaves it out;
* with ``--simt`` the CUDA kernels for the host, which only the tests load.

``MLKERNELS_SANITIZE=address,undefined`` (or ``thread``) builds all of this for that sanitizer, beside other objects;
see docs/reliability.md.

Ninja decides what is to be compiled again, in ``build/``. Besides it an interpreter that has torch is enough.

The first two are no Python modules: they register their operators with torch through LibTorch's stable ABI, and one
binary serves every torch from 2.11 on and every Python. So Python's own compiler settings have no say here; ``CXX``,
``CXXFLAGS`` and ``LDFLAGS`` do.

Where one cannot be built (no torch, no compiler, an error) the package installs all the same and runs without it. The
reason, one line, is left in ``mlkernels/_cpu.error.txt``, or that of its name, for ``python -m mlkernels`` to show.
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
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
# Not setuptools' build_temp: that is a fresh directory in every editable install.
OBJECTS = ROOT / "build" / f"{sys.platform}-{platform.machine()}"
SANITIZE = os.environ.get("MLKERNELS_SANITIZE", "")
if SANITIZE:
    OBJECTS = OBJECTS.with_name(f"{OBJECTS.name}-{SANITIZE.replace(',', '-')}")

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
    # No loop that is compiled twice, for arrays that lie close together and for others: where the two contract another
    # product, the last bit of a result would depend on where the allocator put them.
    "--param=vect-max-version-for-alias-checks=0",
    "-Werror=switch",  # a kind that is left out would be another one
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
    # Nothing includes Python.h; should something ever do, it must keep to what every Python since 3.10 has.
    "-DPy_LIMITED_API=0x030A0000",
]
if SANITIZE:
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
# csrc/cpu/kernels.cpp and pieces.cpp are compiled once for each; library_cpu.cpp chooses among them at run time.
ISAS: dict[str, list[str]] = {"baseline": []}
# bfloat16.cpp alone, beside those of AVX-512.
PAIRS: dict[str, list[str]] = {}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ]
    PAIRS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16"]

# csrc/cuda/rows.cu is compiled once for each.
STORAGES = ("float", "double", "bfloat16", "float16")
#: Of these, what nvcc knows. Not 90a: the machine code is the same, and there is no PTX of it for newer devices.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
    "-Xfatbin=-compress-all",
    "-DMLKERNELS_ISA=cuda",
]


class CannotBuild(Exception):
    """Why there will be no library, in one line."""


class DoesNotCompile(CannotBuild):
    """What a compiler that is there says of the sources."""


def find_torch() -> Path:
    """The installed torch's directory; it is not imported, which takes seconds and can fail for other reasons."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "torch was not there at build time; install it first, then this with pip install --no-build-isolation"
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


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja was not found: pip install ninja")
    return [found]


def relative(path: Path) -> str:
    # So that a checkout can be moved, or copied with what it has built.
    return os.path.relpath(path, ROOT)


def write_headers() -> None:
    """Brings csrc/numbering.h and schemas.h up to the modules of these names, loaded alone: the package needs torch."""
    for name in ("numbering", "schemas"):
        spec = importlib.util.spec_from_file_location(f"mlkernels_{name}", ROOT / "mlkernels" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        header = CSRC / f"{name}.h"
        if not header.exists() or header.read_text() != module.header():  # else ninja would compile everything again
            place(module.header().encode(), header)


class Unit(NamedTuple):
    """A file, and the command that makes it of others, but for its ``-o``."""

    output: Path
    inputs: Sequence[Path]
    command: Sequence[str]


def compiled(output: Path, source: Path, command: Sequence[str]) -> Unit:
    """The object of a source; the compiler itself says which headers it read."""
    return Unit(output, [source], [*command, "-MMD", "-MF", f"{relative(output)}.d", "-c", relative(source)])


def make_units(units: Sequence[Unit]) -> list[Path]:
    """Has ninja run the commands whose inputs, or which themselves, are not what they were."""
    import fcntl

    def path(file: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", relative(file))

    here = units[0].output.parent
    lines = [f"builddir = {path(here)}", "rule run", "  command = $line -o $out"]
    for unit in units:
        lines.append(f"build {path(unit.output)}: run {' '.join(map(path, unit.inputs))}")
        lines.append(f"  line = {shlex.join(unit.command).replace('$', '$$')}")
        if "-MF" in unit.command:
            lines += ["  deps = gcc", f"  depfile = {relative(unit.output)}.d".replace("$", "$$")]
    here.mkdir(parents=True, exist_ok=True)
    said = []
    with open(here / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of the tests ask at the same time
        write_headers()
        (here / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [*find_ninja(), "-f", str(here / "build.ninja")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            assert run.stdout is not None
            for line in run.stdout:
                if not line.startswith("ninja: no work"):
                    print(line, end="", flush=True)
                said.append(line.strip())
    if run.returncode:
        errors = [line for line in said if re.search(r"(?i)\b(error|fatal)\s*:", line)]
        failed = [line for line in said if line.startswith("FAILED:")]
        raise DoesNotCompile([*errors, *failed, f"ninja ended with {run.returncode}"][0][:300])
    return [unit.output for unit in units]


def compiling(torch: Path, compiler: list[str]) -> list[str]:
    # -isystem: torch's headers are not ours to be warned about.
    command = [*compiler, *FLAGS, "-Wall", f"-I{relative(CSRC)}", "-isystem", str(torch / "include")]
    return [*command, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def compiling_library(torch: Path, compiler: list[str]) -> list[str]:
    """The same for what includes torch's headers: their paths, which its checks put into messages, are not kept."""
    return [*compiling(torch, compiler), f"-fmacro-prefix-map={torch.parent}/="]


def make_library(output: Path, compiler: list[str], units: Sequence[Unit], *options: str) -> Path:
    # The shim is all of torch that is used, and in the process already when this is loaded.
    # Some builds of torch export parts of the C++ library, without its versions: the library itself comes first.
    first = ["-lstdc++"] if sys.platform == "linux" else []
    command = [*compiler, "-shared", *(relative(unit.output) for unit in units), *first, *options]
    if sys.platform == "linux":
        command += ["-Wl,--allow-shlib-undefined", f"-fsanitize={SANITIZE}" if SANITIZE else "-s"]
    command += shlex.split(os.environ.get("LDFLAGS", ""))
    return make_units([*units, Unit(output, [unit.output for unit in units], command)])[-1]


def make_cpu() -> Path:
    torch, compiler = find_torch(), find_compiler()
    command, here = compiling(torch, compiler), OBJECTS / "cpu"
    units = [
        compiled(here / f"{name}_{isa}.o", CSRC / "cpu" / f"{name}.cpp", [*command, *flags, f"-DMLKERNELS_ISA={isa}"])
        for name, isas in {"kernels": ISAS, "pieces": ISAS, "bfloat16": PAIRS}.items()
        for isa, flags in isas.items()
    ]
    units.append(compiled(here / "buffers.o", CSRC / "cpu" / "buffers.cpp", command))
    library = compiling_library(torch, compiler)
    names = ("library_cpu", "library_linear", "library_pieces")
    units += [compiled(here / f"{name}.o", CSRC / f"{name}.cpp", library) for name in names]
    options = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "linux":
        options += ["-Wl,-z,defs"]  # a symbol of ours that no library has fails now and not at import
    return make_library(here / "_cpu.abi3.so", compiler, units, *options)


def find_nvcc() -> Path:
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


def has_cuda(torch: Path) -> bool:
    return (torch / "lib" / "libtorch_cuda.so").exists()


def cuda_archs(nvcc: Path) -> list[str]:
    """What to build for: what is asked for; else this machine's GPUs; else all of the list that nvcc knows."""
    asked = os.environ.get("MLKERNELS_CUDA_ARCHS", "").replace(" ", "").split(",")
    if any(asked):
        return [arch for arch in asked if arch]
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise CannotBuild(f"{nvcc} knows none of {', '.join(CUDA_ARCHS)}")
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return archs
    here = sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)})
    return [str(arch) for arch in here] if here and all(arch >= 80 and str(arch) in known for arch in here) else archs


def kernel_units(here: Path, command: Sequence[str]) -> list[Unit]:
    rows, others = CSRC / "cuda" / "rows.cu", CSRC / "cuda" / "others.cu"
    units = [compiled(here / f"rows_{s}.o", rows, [*command, f"-DMLK_STORAGE={s}"]) for s in STORAGES]
    return [*units, compiled(here / "others.o", others, command)]


def cuda_units(nvcc: Path, compiler: list[str], here: Path, archs: Sequence[str], *more: str) -> list[Unit]:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # For devices that are none of these, compiled where it runs; that of 90 has clusters. An "a" target has no heirs.
    targets += [
        f"-gencode=arch=compute_{arch},code=compute_{arch}"
        for arch in archs
        if arch == "90" or (arch == archs[-1] and arch.isdigit())
    ]
    command = [str(nvcc), *NVCC_FLAGS, f"-ccbin={compiler[0]}", f"-I{relative(CSRC)}", *targets, *more]
    return kernel_units(here, command)


def library_cuda(torch: Path, compiler: list[str], root: Path, archs: Sequence[str]) -> list[str]:
    """The command that compiles library_cuda.cpp."""
    command = [*compiling_library(torch, compiler), "-isystem", str(root / "include")]
    command += ["-DUSE_CUDA", "-DMLKERNELS_ISA=cuda", "-DMLK_LIBRARY=mlkernels_cuda", "-DMLK_KEY=CUDA"]
    return [*command, "-DMLK_LIBRARY_OF_COPIES=mlkernels", f'-DMLK_ARCHS="{",".join(archs)}"']


def make_cuda() -> Path:
    if os.environ.get("MLKERNELS_CUDA") == "0":
        raise CannotBuild("left out by MLKERNELS_CUDA=0")
    torch = find_torch()
    if not has_cuda(torch) and os.environ.get("MLKERNELS_CUDA") != "1":
        raise CannotBuild("torch had no CUDA when the package was built; MLKERNELS_CUDA=1 builds them all the same")
    nvcc, compiler = find_nvcc(), find_compiler()
    root, here, archs = cuda_root(nvcc), OBJECTS / "cuda", cuda_archs(nvcc)
    units = cuda_units(nvcc, compiler, here, archs)
    command = library_cuda(torch, compiler, root, archs)
    units.append(compiled(here / "library_cuda.o", CSRC / "library_cuda.cpp", command))
    static = next((path for path in sorted(root.glob("**/libcudart_static.a")) if "stubs" not in path.parts), None)
    if static is None:
        raise CannotBuild(f"{root} has no libcudart_static.a")
    # The CUDA part of the shim is in libtorch_cuda. It must be named, even where this torch has none: torch loads its
    # libraries locally, and what nobody names is not found. In its place an empty library of that name.
    libraries = torch / "lib"
    stub = here / "stub" / "libtorch_cuda.so"
    if not has_cuda(torch):
        make_units([Unit(stub, [], [*compiler, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{stub.name}"])])
        libraries = stub.parent
    options = [str(static), "-ldl", "-lrt", "-lpthread", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    options += [f"-L{relative(libraries)}", "-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--exclude-libs,ALL"]
    return make_library(here / "_cuda.abi3.so", compiler, units, *options)


def make_simt() -> Path:
    """The CUDA kernels over fibers of the host (csrc/simt/machine.h): for the tests, not for the package."""
    torch, compiler = find_torch(), find_compiler()
    here = OBJECTS / "simt"
    command = [flag for flag in compiling(torch, compiler) if flag not in ("-O3", "-fno-trapping-math")]
    command += ["-O2", "-DMLK_HOST", "-DMLKERNELS_ISA=host_simt"]
    units = kernel_units(here, [*command, "-x", "c++"])
    library = [*command, "-DMLK_LIBRARY=mlkernels_simt", "-DMLK_LIBRARY_OF_COPIES=mlkernels_simt", "-DMLK_KEY=CPU"]
    units.append(compiled(here / "library.o", CSRC / "library_cuda.cpp", library))
    return make_library(here / "_simt.abi3.so", compiler, units, f"-L{torch / 'lib'}", "-ltorch_cpu")


def make_fast_path() -> Path:
    if os.environ.get("MLKERNELS_FAST_PATH") == "0":
        raise CannotBuild("left out by MLKERNELS_FAST_PATH=0, as of wheels: it serves one torch and one Python")
    torch, compiler = find_torch(), find_compiler()
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise CannotBuild(f"{headers} has no Python.h")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise CannotBuild("it relies on the GIL, which this Python does not have")
    # Not that of the metadata, which for some wheels lacks what follows the +.
    version = re.search(r"^__version__ = '(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
    if version is None:
        raise CannotBuild("torch does not say which one it is")
    here = OBJECTS / "fast_path"
    command = compiling_fast_path(torch, compiler, headers)
    units = [compiled(here / "library.o", CSRC / "library_fast_path.cpp", command)]
    options = [f"-L{torch / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]
    if sys.platform == "darwin":
        options.append("-Wl,-undefined,dynamic_lookup")
    name = f"_fast_path.{sys.implementation.cache_tag}-torch-{version[1]}.so"
    return make_library(here / name, compiler, units, *options)


def compiling_fast_path(torch: Path, compiler: list[str], headers: Path) -> list[str]:
    """The same for what includes all of torch and Python, and so is for these alone."""
    stable = ("-std=", "-DTORCH_TARGET_VERSION", "-DPy_LIMITED_API")
    command = [flag for flag in compiling_library(torch, compiler) if not flag.startswith(stable)]
    return [*command, "-std=c++20", "-isystem", str(headers)]


def place(content: bytes, path: Path) -> None:
    # By rename: a process that runs the old library keeps it.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


LIBRARIES = {"_cpu": make_cpu, "_cuda": make_cuda, "_fast_path": make_fast_path}


def built_in(package: Path) -> list[str]:
    """The names of what :func:`build_into` has put there."""
    return sorted(
        path.name for stem in LIBRARIES for ending in ("*.so", "error.txt") for path in package.glob(f"{stem}.{ending}")
    )


def build_into(package: Path) -> None:
    """Puts the libraries, or the reasons why there are none, into this directory."""
    package.mkdir(parents=True, exist_ok=True)
    for stem, make_library in LIBRARIES.items():
        reason = package / f"{stem}.error.txt"
        stale = {*package.glob(f"{stem}.*.so")}
        try:
            made = make_library()
            content, library = made.read_bytes(), package / made.name
            if not library.exists() or library.read_bytes() != content:
                place(content, library)
            stale.discard(library)
            reason.unlink(missing_ok=True)
        except CannotBuild as error:
            place(f"{error}\n".encode(), reason)
            if stem == "_cpu" or os.environ.get("MLKERNELS_CUDA") == "1":
                what = "compiled kernels and will be slow" if stem == "_cpu" else "CUDA kernels"
                print(f"\nWARNING: mlkernels is without its {what}: {error}\n", file=sys.stderr, flush=True)
        for library in stale:  # of an older source, or another torch: it would still be loaded, and be wrong
            library.unlink()


if __name__ == "__main__":
    build_into(ROOT / "mlkernels")
    if "--simt" in sys.argv[1:]:
        try:
            make_simt()
        except CannotBuild as error:
            print(f"\nWARNING: the CUDA kernels cannot be tested on this host: {error}\n", file=sys.stderr, flush=True)

"""csrc/build.py: for what it builds, when it builds again, and what its libraries ask of a torch that is not here."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_install import COMPILER, library, nm

from mlkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402

TORCH = Path(torch.__file__).parent
OLDEST = ".".join(map(str, build.OLDEST_TORCH)) + ".0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlkernels-tests"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- how -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(native.cpu_isa() is None, reason="no CPU kernels")
def test_bits_do_not_depend_on_where_arrays_lie(tmp_path):
    """Loops over two arrays, with the library's flags: a compiler may make one for arrays that lie close together, and
    contract other products in it."""
    isa = native.cpu_isa().removesuffix("_bf16")
    command = [*build.compiling(TORCH, build.find_compiler()), *build.ISAS[isa], f"-DMLKERNELS_ISA={isa}"]
    program = tmp_path / "sweeps"
    subprocess.run([*command, str(ROOT / "tests/sweeps.cpp"), "-o", str(program)], check=True, cwd=ROOT)
    assert not subprocess.run([program], check=True, capture_output=True, text=True).stdout


# ---- what is compiled, and when --------------------------------------------------------------------------------------


def test_only_what_changed_is_made_again(tmp_path):
    """Also where a folder has a name that shells and ninja would take apart."""
    here = tmp_path / "a $b: c"
    here.mkdir()
    (here / "one.cpp").write_text('#include "both.h"\nint one() { return VALUE; }\n')
    (here / "two.cpp").write_text("int two() { return 2; }\n")
    (here / "both.h").write_text("#define VALUE 1\n")

    def make(*flags):
        units = [
            build.compiled(here / f"{name}.o", here / f"{name}.cpp", [*build.find_compiler(), *flags])
            for name in ("one", "two")
        ]
        before = {unit.output: unit.output.stat().st_mtime_ns if unit.output.exists() else 0 for unit in units}
        build.make_units(units)
        return [output.stem for output, time in before.items() if output.stat().st_mtime_ns > time]

    assert make() == ["one", "two"]
    assert make() == []
    (here / "both.h").write_text("#define VALUE 3\n")
    assert make() == ["one"]
    assert make("-DNEW") == ["one", "two"]
    (here / "two.cpp").write_text("int two() { return wrong; }\n")
    with pytest.raises(build.CannotBuild, match=r"two.cpp:1:\d+: error: .*wrong"):
        make("-DNEW")
    with pytest.raises(build.CannotBuild, match=r"two.cpp:1:\d+: error: .*wrong"):
        make("-DNEW")  # a file that could not be made is not taken for made


@pytest.mark.parametrize(
    ("asked", "gpus", "known", "wanted"),
    [
        ("", "", "75 80 86 87 89 90 100 103 110 120 121", ["80", "86", "89", "90", "100", "120"]),
        ("", "", "70 80 86 89 90", ["80", "86", "89", "90"]),
        ("", "9.0 9.0", "80 90 100", ["90"]),
        ("", "12.0 8.6", "80 86 90 120", ["86", "120"]),
        ("", "10.3", "80 90 100 120", ["80", "90", "100", "120"]),  # newer than nvcc: the PTX of what it knows
        ("", "7.5", "75 80 90", ["80", "90"]),
        ("80, 90a", "9.0", "80 90", ["80", "90a"]),
    ],
    ids=["no GPU", "an older nvcc", "one kind", "two kinds", "unknown to nvcc", "too old", "asked"],
)
def test_what_cuda_is_built_for(tmp_path, monkeypatch, asked, gpus, known, wanted):
    listed = " ".join(f"compute_{arch}" for arch in known.split())
    nvcc = script(tmp_path / "nvcc", f"[ $1 = --list-gpu-arch ] && printf '%s\\n' {listed}")
    script(tmp_path / "nvidia-smi", f"printf '%s\\n' {gpus}" if gpus else "echo no devices; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("MLKERNELS_CUDA_ARCHS", asked)
    assert build.cuda_archs(nvcc) == wanted


def test_newer_devices_get_clusters():
    """The PTX that a device of its own generation does not need: of 90, and of the newest."""

    def ptx(*archs):
        unit = build.cuda_units(Path("nvcc"), ["c++"], Path("here"), archs)[0]
        return [part for flag in unit.command for part in re.findall(r"^-gencode=.*code=(compute_\w+)", flag)]

    assert ptx(*build.CUDA_ARCHS) == ["compute_90", "compute_120"]
    assert ptx("90") == ["compute_90"]
    assert ptx("80", "86") == ["compute_86"]
    assert ptx("90a") == []


# ---- what the libraries ask for --------------------------------------------------------------------------------------


def needed(path):
    said = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", said)


@pytest.mark.parametrize("stem", ["_cpu", "_cuda"])
def test_library_loads_where_torch_is_local(stem, tmp_path):
    """Every symbol is found in a library that is *named*: torch opens its own for nobody else.

    libtorch_cuda, where this torch has none, is played by a library that has what torch 2.11's shim has beyond
    libtorch_cpu. All symbols are asked for at once, in a process that has imported nothing but torch.
    """
    path = library(stem)
    assert os.fsencode(TORCH) not in path.read_bytes()  # where it was built is nobody's business, and not reproducible
    names = needed(path)
    assert f"libtorch_{stem[1:]}.so" in names
    cpu = {name for _, name in nm(TORCH / "lib" / "libtorch_cpu.so", "-D", "--defined-only")}
    shim = (ROOT / "tests" / "shim_symbols_2_11.txt").read_text().splitlines()
    stub = tmp_path / "libtorch_cuda.so"
    functions = "".join(f"int {name}() {{ return 0; }}\n" for name in shim if name[0] != "#" and name not in cpu)
    (tmp_path / "stub.c").write_text(functions)
    command = [*build.find_compiler(), "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}"]
    subprocess.run([*command, str(tmp_path / "stub.c"), "-o", str(stub)], check=True)
    program = (
        "import ctypes, os, sys, torch\nfor path in sys.argv[1:]:\n    ctypes.CDLL(path, os.RTLD_NOW | os.RTLD_LOCAL)\n"
    )
    first = [] if build.has_cuda(TORCH) or stem == "_cpu" else [str(stub)]
    done = subprocess.run([sys.executable, "-c", program, *first, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def oldest_torch():
    """Headers and Python of the oldest torch there may be: out of its wheel for macOS, which has only 80 MB."""
    sources = CACHE / f"torch-{OLDEST}"
    if not sources.exists():
        parts = CACHE / f"download-{os.getpid()}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform=macosx_11_0_arm64", "--python-version=3.12", f"--dest={parts}", f"torch=={OLDEST}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no wheel of torch {OLDEST}: {done.stderr.strip()[-200:]}")
            (wheel,) = parts.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if re.match(r"torch/.*\.(h|hpp|py|pyi|typed)$|.*/METADATA$", n)]
                archive.extractall(parts / "sources", wanted)
            if not sources.exists():
                (parts / "sources").rename(sources)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
    return sources


def test_libraries_compile_with_the_oldest_torch(oldest_torch):
    compiler = build.find_compiler()
    commands = {"cpu": build.compiling(oldest_torch / "torch", compiler)}
    try:
        root = build.cuda_root(build.find_nvcc())
        commands["cuda"] = build.library_cuda(oldest_torch / "torch", compiler, root, ["90"])
    except build.CannotBuild:
        pass  # no CUDA headers
    for name, command in commands.items():
        command += ["-fsyntax-only", f"csrc/library_{name}.cpp"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.skipif(not os.environ.get("MLKERNELS_FULL"), reason="a minute; MLKERNELS_FULL=1")
def test_python_is_right_for_the_oldest_torch(oldest_torch, tmp_path):
    """Every name of torch's that the package uses is in the oldest one, and takes what it is given."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-warn-unused-ignores", "--implicit-reexport"]
    command.append(f"--cache-dir={tmp_path}")
    environment = {**os.environ, "MYPYPATH": str(oldest_torch)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ours = [line for line in done.stdout.splitlines() if line.startswith("mlkernels/")]
    assert not ours and "checked" in done.stdout, "\n".join(ours) or done.stdout[-2000:] + done.stderr[-2000:]

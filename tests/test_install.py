"""What an installation promises: one binary for every torch, a package that works without it, and a word on why."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlkernels
from mlkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "csrc" / "build.py"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def python(*arguments, **environment):
    """A fresh interpreter in the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def library(stem="_cpu"):
    found = sorted(Path(mlkernels.__file__).parent.glob(f"{stem}.*so"))
    if not found or sys.platform != "linux" or shutil.which("nm") is None:
        pytest.skip("needs the compiled library, and nm")
    return found[0]


def nm(path, *options):
    """(type, name) of each symbol."""
    done = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True)
    return [tuple(line.split()[-2:]) for line in done.stdout.splitlines() if line.strip()]


# ---- the binary ------------------------------------------------------------------------------------------------------


def test_library_is_built_where_it_can_be():
    if COMPILER is None or sys.platform == "win32":
        pytest.skip("no C++ compiler")
    if os.environ.get("MLKERNELS_NATIVE") == "0":
        pytest.skip("switched off")
    assert native.cpu_missing is None
    assert native.cpu_isa() in native.ISAS


@pytest.mark.parametrize("stem", ["_cpu", "_cuda"])
def test_library_needs_only_the_stable_shim(stem):
    """Every undefined symbol is in torch 2.11's C shim, or comes from the C and C++ runtimes, which are versioned."""
    lines = (ROOT / "tests" / "shim_symbols_2_11.txt").read_text().splitlines()
    shim = {line for line in lines if not line.startswith("#")}
    runtime = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC|LIBC\+\+|GOMP|OMP)_")
    strong = [name for kind, name in nm(library(stem), "-D", "--undefined-only") if kind != "w"]
    assert [name for name in strong if name not in shim and not runtime.search(name)] == []
    assert any(name in shim for name in strong)


@pytest.mark.parametrize("stem", ["_cpu", "_cuda"])
def test_library_exports_no_kernel(stem):
    """Only its C entry points, and what the C++ runtime itself makes weak."""
    strong = {name for kind, name in nm(library(stem), "-D", "--defined-only") if kind in "TDBR"}
    assert {name for name in strong if not name.startswith("mlkernels_")} <= {
        "_edata",
        "_end",
        "__bss_start",
        "_init",
        "_fini",
    }


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_instruction_sets_do_not_leak(isa):
    """The linker keeps one of several weak copies: one compiled for AVX-512 must not serve a machine without it."""
    library()
    objects = list((ROOT / "build").glob(f"*/cpu/*_{isa}.o"))
    if not objects:
        pytest.skip(f"not built here for {isa}")
    for path in objects:
        weak = {name for kind, name in nm(path, "--defined-only") if kind in ("W", "V", "u")}
        assert {name for name in weak if isa not in name} <= {"DW.ref.__gxx_personality_v0"}  # the runtime's address


def test_import_keeps_subnormals():
    done = python("-c", "import torch, mlkernels; print(float(torch.tensor(1e-39) * 0.5) > 0, 5e-324 * 1.0 > 0)")
    assert done.stdout.split() == ["True", "True"]


def test_import_brings_nothing_else():
    """Dynamo, sympy and Triton take longer to import than torch; they wait for a call that needs them."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mlkernels\n"
        "assert 'distributed' in dir(mlkernels) and 'mlkernels.distributed' not in sys.modules\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "x = torch.zeros(2, 3, requires_grad=True)\n"
        "mlkernels.arcface_loss(x, torch.tensor([0, 1])).backward()\n"
        "print(*sorted({'torch._dynamo', 'torch._inductor', 'sympy', 'triton'} & set(sys.modules) - before))\n"
    )
    imported, called = python("-c", program, TRITON_INTERPRET="0").stdout.split("\n")[:2]
    others = {name for name in imported.split() if name.split(".")[0] not in {"mlkernels", *sys.stdlib_module_names}}
    assert others == set()
    assert called == ""


# ---- without the binary ----------------------------------------------------------------------------------------------


def test_works_without_the_library():
    program = (
        "import torch, mlkernels\n"
        "x = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)\n"
        "loss = mlkernels.modulated_cross_entropy(x, torch.tensor([0]))\n"
        "loss.backward()\n"
        "print(mlkernels.available_backends()['cpu'], float(loss), x.grad.tolist())\n"
    )
    done = python("-c", program, MLKERNELS_NATIVE="0")
    assert done.stdout.startswith("switched off by MLKERNELS_NATIVE=0 0.0213")
    assert done.stderr.count("RuntimeWarning") == 1
    assert "slow reference backend: switched off" in done.stderr


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C++ compiler: no-such-compiler"), ("false", "FAILED: ")]
)
def test_failed_build_says_why(tmp_path, compiler, reason):
    if shutil.which("false") is None:
        pytest.skip("needs false")
    stale = tmp_path / "_cpu.abi3.so"
    stale.write_bytes(b"of an older source")
    program = (
        f"import sys; sys.path.insert(0, {str(BUILD.parent)!r}); import build, pathlib; "
        f"build.OBJECTS = pathlib.Path({str(tmp_path)!r}, 'objects'); "
        f"build.build_into(pathlib.Path({str(tmp_path)!r}))"
    )
    done = python("-c", program, CXX=compiler)
    assert done.stderr.count("WARNING: mlkernels is without its compiled kernels") == 1
    assert reason in done.stderr
    assert not stale.exists()
    lines = (tmp_path / "_cpu.error.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(reason)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_report():
    said = python("-m", "mlkernels").stdout
    found = dict(re.split(r"  +", line, maxsplit=1) for line in said.splitlines())
    assert found["mlkernels"] == mlkernels.__version__
    assert found["torch"] == torch.__version__
    assert found["backend reference"] == "available"
    assert found["backend cpu"] == (native.cpu_missing or "available")
    assert found["fast path"] == (mlkernels.fast_path.missing or "available")
    assert f"kernels for {native.cpu_isa() or 'none'}" in said


def test_report_says_why_not():
    said = python("-m", "mlkernels", MLKERNELS_NATIVE="0").stdout
    assert re.search(r"backend cpu +switched off by MLKERNELS_NATIVE=0", said)
    assert "kernels for none" in said


def test_version_is_a_literal():
    """setuptools reads it from the source, without importing torch."""
    source = Path(mlkernels.__file__).read_text()
    assert re.search(rf'^__version__ = "{re.escape(mlkernels.__version__)}"$', source, re.MULTILINE)


def test_report_of_the_cuda_kernels():
    """Built or not, and why they do not run here."""
    said = python("-m", "mlkernels").stdout
    line = next(line for line in said.splitlines() if line.startswith("backend cuda"))
    if torch.version.cuda is None:
        built = bool(sorted(Path(mlkernels.__file__).parent.glob("_cuda.*so")))
        assert line.endswith("this torch is built without CUDA" + ", though the kernels are built" * built)
    elif not torch.cuda.is_available() and native._cuda is not None:
        assert line.split(maxsplit=2)[2] == native.no_gpu() != "there is no GPU"  # torch says what it lacks


@pytest.mark.parametrize(
    ("environment", "reason", "loud"),
    [
        ({"MLKERNELS_CUDA": "0"}, "left out by MLKERNELS_CUDA=0", False),
        ({"MLKERNELS_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "", "CUDA_PATH": ""}, "nvcc was found neither", True),
        ({"MLKERNELS_CUDA": ""}, "torch had no CUDA when the package was built; MLKERNELS_CUDA=1 builds", False),
    ],
    ids=["switched off", "wanted", "no CUDA in torch"],
)
def test_cuda_kernels_that_cannot_be_built(tmp_path, environment, reason, loud):
    """The rest is installed; only who asked for them is warned."""
    if environment == {"MLKERNELS_CUDA": ""} and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    program = (
        f"import sys; sys.path.insert(0, {str(BUILD.parent)!r}); import build, pathlib; "
        f"build.LIBRARIES = {{'_cuda': build.make_cuda}}; build.build_into(pathlib.Path({str(tmp_path)!r}))"
    )
    done = python("-c", program, **environment)
    assert (tmp_path / "_cuda.error.txt").read_text().startswith(reason)
    assert ("WARNING: mlkernels is without its CUDA kernels" in done.stderr) == loud


def test_a_failed_cuda_build_leaves_the_rest(tmp_path):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: error of the test' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    (tmp_path / "libcudart_static.a").touch()
    program = (
        f"import sys; sys.path.insert(0, {str(BUILD.parent)!r}); import build, pathlib; "
        f"build.OBJECTS = pathlib.Path({str(tmp_path)!r}, 'objects'); "
        f"build.LIBRARIES = {{'_cuda': build.make_cuda}}; build.build_into(pathlib.Path({str(tmp_path)!r}))"
    )
    python("-c", program, PATH=f"{nvcc.parent}:{os.environ['PATH']}", MLKERNELS_CUDA="1", MLKERNELS_CUDA_ARCHS="90")
    assert "nvcc fatal: error of the test" in (tmp_path / "_cuda.error.txt").read_text()
    assert not (tmp_path / "_cuda.abi3.so").exists()

"""README's lines of installation, as they stand there, in an environment that has nothing of the package yet."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from test_install import COMPILER

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINES = re.findall(r"^    (.+)$", README.split("## Install")[1].split("\n## ")[0], re.MULTILINE)
HERE = Path(sysconfig.get_path("purelib"))
pytestmark = pytest.mark.skipif(sys.platform == "win32" or shutil.which("git") is None, reason="needs git")


@pytest.fixture
def checkout(tmp_path):
    """The files of this checkout; and with ``built()`` what has been compiled here, which takes a minute."""
    # By an empty repository, to which each file is new: this checkout may have none, or lie in another's build/.
    git = ["git", f"--git-dir={tmp_path / 'git'}", f"--work-tree={ROOT}"]
    subprocess.run([*git, "init", "-q"], check=True)
    found = [*git, "ls-files", "-oz", "--exclude-standard"]
    listed = subprocess.run(found, cwd=ROOT, capture_output=True, text=True, check=True)
    copy = tmp_path / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


class Environment:
    """A virtual environment with the tests' own packages, but for the package itself and what is hidden.

    The packages lie where they are, so that "pip install" finds what it wants and downloads nothing.
    """

    def __init__(self, path, hidden=()):
        venv.create(path, symlinks=True)
        own = next(path.glob("lib/python*/site-packages"))
        if hidden:
            for entry in HERE.iterdir():
                if not entry.name.startswith(hidden) and entry.suffix != ".pth":
                    (own / entry.name).symlink_to(entry)
        else:
            (own / "others.pth").write_text(f"{HERE}\n")
        pip = path / "bin" / "pip"
        pip.write_text(f'#!/bin/sh\nexec {path}/bin/python -m pip "$@"\n')
        pip.chmod(0o755)
        self.bin = path / "bin"
        ninja = Path(sysconfig.get_path("scripts"), "ninja")  # where its package looks for it
        if ninja.exists():
            (self.bin / "ninja").symlink_to(ninja)

    def run(self, line, where, path="", **variables):
        """The line in a shell whose PATH is this one after the environment's; what it printed."""
        variables = {"PATH": f"{self.bin}:{path}", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **variables}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLKERNELS_", "PYTHON", "PIP_", "CUDA_"))}
        done = subprocess.run(
            ["/bin/sh", "-c", line], cwd=where, env=kept | variables, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr


STEP = "import torch, mlkernels as m; m.focal_loss(torch.zeros(2, 3).requires_grad_(), torch.tensor([0, 1])).backward()"


def test_what_the_lines_are():
    assert len(LINES) == 3
    assert LINES[0].startswith("pip install torch") and LINES[2].startswith("python -m mlkernels")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_with_a_compiler(checkout, tmp_path):
    """The objects of this checkout are taken over, so that the build has only to look at them.

    Not CUDA's: beside a torch for GPUs the lines compile it for all of them, which takes nvcc minutes.
    """
    objects = [path for name in ("cpu", "fast_path") for path in ROOT.glob(f"build/*/{name}")]
    for path in objects:
        shutil.copytree(path, checkout / path.relative_to(ROOT))
    fresh = Environment(tmp_path / "venv")
    for line in LINES:
        said = fresh.run(line, checkout, os.environ["PATH"], MLKERNELS_CUDA="0")
    assert re.search(r"^backend cpu +available$", said, re.MULTILINE), said
    # Elsewhere too.
    assert said.splitlines()[-4:] == fresh.run(LINES[2], tmp_path).splitlines()[-4:]
    fresh.run(f'python -c "{STEP}"', tmp_path)


def test_without_compiler_and_triton(checkout, tmp_path):
    # torch's builds for GPUs want theirs, and pip would look for it.
    hides = () if any(one.startswith("triton") for one in metadata.requires("torch") or ()) else ("triton",)
    fresh = Environment(tmp_path / "venv", hidden=(*hides, "mlkernels", "__editable__"))
    for line in LINES:
        said = fresh.run(line, checkout)
    assert re.search(r"^backend cpu +not built: no C\+\+ compiler", said, re.MULTILINE), said
    if hides:
        assert re.search(r"^backend triton +the package triton is not installed$", said, re.MULTILINE), said
        assert re.search(r"^triton +not installed$", said, re.MULTILINE), said
    assert "runs on its slow reference backend" in fresh.run(f'python -c "{STEP}"', tmp_path)


def test_a_copy_beside_its_sources(checkout, tmp_path):
    """Installed without -e: nothing of an older build is in it, and in the checkout Python finds the sources."""
    stale = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "mlkernels"
    stale.mkdir(parents=True)
    (stale / "deleted.py").write_text("")
    fresh = Environment(tmp_path / "venv")
    fresh.run(LINES[1].replace("install", "wheel --no-deps").replace("-e ", ""), checkout)
    (wheel,) = checkout.glob("*.whl")
    assert wheel.name.startswith("mlkernels_losses-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(p.relative_to(checkout)) for p in checkout.glob("mlkernels/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "mlkernels/_cpu.error.txt" in names  # there is no compiler on this PATH
    fresh.run(f"pip install --no-deps {wheel}", tmp_path)
    assert "backend cpu        not built: no C++ compiler" in fresh.run("python -m mlkernels", tmp_path)
    said = fresh.run("python -m mlkernels", checkout)
    assert re.search(r"backend cpu +not built in the source tree: run `python .*csrc/build.py`, or start Python", said)


@pytest.mark.skipif(not os.environ.get("MLKERNELS_FULL"), reason="minutes; MLKERNELS_FULL=1")
@pytest.mark.parametrize("cuda", ["1", ""])
def test_from_nothing(checkout, tmp_path, cuda):
    """Everything compiled anew, with nvcc where there is one and it is asked for."""
    fresh = Environment(tmp_path / "venv")
    for line in LINES:
        said = fresh.run(line, checkout, os.environ["PATH"], MLKERNELS_CUDA=cuda, MLKERNELS_CUDA_ARCHS="90")
    assert re.search(r"^backend cpu +available$", said, re.MULTILINE), said
    if shutil.which("nvcc") and cuda:
        assert (checkout / "mlkernels" / "_cuda.abi3.so").exists()

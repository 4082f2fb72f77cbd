"""The compiled part of the package, which csrc/build.py makes; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # not there by itself where pip runs this file

from build import build_into, built_in  # noqa: E402


class Modules(build_py):
    """From nothing: a wheel takes all that lies in build_lib, modules of an older source included."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Build(build_ext):
    """Hands over to csrc/build.py: setuptools cannot compile one source three times with different flags."""

    def run(self) -> None:
        build_into((ROOT if self.inplace else Path(self.build_lib)) / "mlkernels")

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        built = Path(self.build_lib) / "mlkernels"
        here = ROOT / "mlkernels"
        found = here if self.inplace else built
        return {str(built / name): str(here / name) for name in built_in(found)}


setup(
    # That there is one is all that setuptools needs to know: the wheel is for one platform.
    ext_modules=[Extension("mlkernels._cpu", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_py": Modules, "build_ext": Build},
    # Free-threaded Pythons have no limited API, and wheels for them no such tag; the library is the same.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)

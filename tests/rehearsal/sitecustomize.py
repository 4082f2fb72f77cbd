"""A CPU taken for a GPU, for a rehearsal of bench/gpu.sh: each of its programs runs as it is, on problems of no size.

Python imports this by itself where the folder is on PYTHONPATH. What it changes is said below, and nothing else is.
"""

import importlib
import importlib.abc
import sys


def change(name, module):
    """The device, the kernels behind the names of our backends, and how much there is to do."""
    if name == "bench.gpu":
        import torch

        whole = module.ours
        module.gpu = lambda: torch.device("cpu")
        module.usable = lambda: ["triton", "cuda"]
        module.ours = lambda device, by: whole(device, "cpu" if by in ("triton", "cuda") else by)
        module.compile_ahead = lambda work, seconds, say: say(f"compiling {len(work)} is left out")
        module.SECONDS, module.ELEMENTS, module.COPIED = 0.0, 2**13, 2**12
        module.STATE_WIDTHS, module.SEGMENTATION, module.COMPILED_AT = [4], (2, 5, 4, 6), set()
        module.CLASSES = [1000, 10]
    elif name == "bench.smoke":
        module.TINY = {key: module.TINY[key] for key in ("short", "apart16")}


class Changing(importlib.abc.MetaPathFinder):
    """Finds the modules that are changed, by those that come after it."""

    NAMES = ("bench.gpu", "bench.smoke")

    def find_spec(self, name, path, target=None):
        if name not in self.NAMES:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(name, path, target)
            if found is not None:
                execute = found.loader.exec_module

                def executed(module, execute=execute):
                    execute(module)
                    change(name, module)

                found.loader.exec_module = executed
                return found
        return None


sys.meta_path.insert(0, Changing())

"""A CPU taken for a GPU, for a rehearsal of bench/gpu.sh: each of its programs runs as it is, on problems of no size.

Python imports this by itself where the folder is on PYTHONPATH. What it changes is said below, and nothing else is.
"""

import importlib.abc
import sys


def options(module):
    """The device, and the backends that are said to be there."""
    import torch

    module.is_gpu = lambda device: True
    module.gpu = lambda: torch.device("cpu")
    module.device_of = lambda options, module: torch.device("cpu")
    module.usable = lambda device: list(module.ON_GPU)
    module.backends_of = lambda options, device: (options.backends or list(module.ON_GPU), {})


def cases(module):
    """How much there is to do."""
    module.FIRST = module.CLASSES = [1000, 10]
    module.ELEMENTS, module.SMALL, module.SEGMENTATION = 2**13, 2**12, (2, 19, 16, 16)


def peers(module):
    """The kernels behind the names of our backends."""
    whole = module.ours
    module.ours = lambda device, by: whole(device, "cpu" if by in ("triton", "cuda") else by)


def measure(module):
    """For how long."""
    module.Plan.seconds = lambda plan, problem: 0.0
    module.STATE_WIDTHS = [4]


def ahead(module):
    """Nothing is compiled."""
    module.compile_ahead = lambda work, seconds, say: say(f"compiling {len(work)} is left out")


def smoke(module):
    """Two problems."""
    module.TINY = {key: module.TINY[key] for key in ("short", "apart16")}


def smoke_linear(module):
    """The kernels behind the name of ours."""
    module.SERVED = {"triton": "cpu"}


CHANGED = (options, cases, peers, measure, ahead, smoke, smoke_linear)
CHANGES = {f"bench.{change.__name__}": change for change in CHANGED}


class Changing(importlib.abc.MetaPathFinder):
    """Finds the modules that are changed, by those that come after it."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(name, path, target)
            if found is not None:
                execute = found.loader.exec_module

                def executed(module, execute=execute):
                    execute(module)
                    CHANGES[name](module)

                found.loader.exec_module = executed
                return found
        return None


sys.meta_path.insert(0, Changing())

import functools
import hashlib
import itertools
import os
import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

# Torch warns of an operator whose results share memory, and raises in a process that CI runs: here as there. Counts
# where torch's functorch is imported, and in the processes that tests start.
os.environ.setdefault("CI", "conftest")

# Without a GPU Triton's kernels are interpreted. The variable counts where Triton is imported, so before all else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import simt
from hypothesis import settings
from table import LOSSES, usable_backends

import mlkernels
from mlkernels import buffers
from mlkernels.backends import native

# Inductor keeps what it has compiled by the names of operators, whatever an older checkout's returned.
_FILES = [Path(mlkernels.__file__).parent / name for name in ("schemas.py", "ops.py", "linear/graph.py")]
_OPERATORS = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()[:16]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/mlkernels-inductor-{_OPERATORS}")

# Without a GPU the CUDA kernels run over fibers. Before any module asks which backends there are.
if not torch.cuda.is_available():
    simt.install()

# A deadline would tell how loaded the machine is. In a CI, and nowhere else, examples are the same on every run.
settings.register_profile(
    "default",
    settings.get_profile("default" if os.environ["CI"] == "conftest" else "ci"),
    deadline=None,
    max_examples=int(os.environ.get("MLKERNELS_EXAMPLES", "60")),
)
settings.load_profile("default")


#: A launch takes Triton's interpreter up to seconds. Of a function whose cases are many it has so many, the same on
#: every run; all of them under MLKERNELS_FULL=1, and always where the mathematics itself is tested.
TRITON_CASES = 12
FEWER = {"test_gradcheck_and_gradgradcheck": 4}  # seconds each
WHOLE = {"test_triton.py", "test_values.py", "test_gradients.py", "test_precision.py"}


def pytest_collection_modifyitems(config, items):
    if os.environ.get("MLKERNELS_FULL") or os.environ.get("TRITON_INTERPRET") != "1":
        return
    functions = defaultdict(list)
    for item in items:
        values = getattr(item, "callspec", None)
        if values and "triton" in values.params.values() and item.path.name not in WHOLE:
            functions[item.path.name, item.originalname].append(item)
    dropped = set()
    for (_, name), cases in functions.items():
        number = FEWER.get(name, TRITON_CASES)
        if len(cases) > number:
            kept = random.Random(name).sample(sorted(cases, key=lambda item: item.nodeid), number)
            dropped |= {item.nodeid for item in cases} - {item.nodeid for item in kept}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in dropped])
        items[:] = [item for item in items if item.nodeid not in dropped]


def pytest_terminal_summary(terminalreporter, config):
    """What test_compile_targets.py and test_cuda_targets.py compiled, perhaps in another process."""
    factory = getattr(config, "_tmp_path_factory", None)
    for name, title in (("aot.txt", "Triton kernels"), ("cuda-targets.txt", "CUDA kernels")):
        table = factory and factory.getbasetemp() / name
        if table and table.exists():
            terminalreporter.section(f"{title} ahead of time")
            terminalreporter.write_line("\n".join(sorted(table.read_text().splitlines())))
    seconds = Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("seconds by file, over all processes")
    terminalreporter.write_line("\n".join(f"{spent:8.1f} {name}" for name, spent in seconds.most_common()))


@pytest.fixture(autouse=True)
def _reproducible():
    # Not torch.manual_seed: for devices that are not there it keeps a stack trace, 5 ms a test.
    torch.default_generator.manual_seed(0)
    settings.load_profile("default")  # torch.testing loads one of its own where it is imported


@pytest.fixture(scope="session", autouse=True)
def _threads():
    # Small tensors all over: two threads would wait for each other. test_layouts.py has what takes more.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    """Triton's interpreter, right and twice as fast."""
    if mlkernels.available_backends()["triton"] is not None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    # It cuts float32 down to bfloat16; the hardware rounds to the nearest, ties to even.
    convert = interpreter._convert_float

    def rounding(input, input_dtype, output_dtype, mode):
        if str(output_dtype) == "bf16" and str(input_dtype) == "fp32":
            bits = np.ascontiguousarray(input, dtype=np.float32).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(input), 0x7FC0, rounded).astype(np.uint16)
        return convert(input, input_dtype, output_dtype, mode)

    interpreter._convert_float = rounding

    # It replaces the language's functions anew in every function that a kernel calls: once per launch is enough.
    replace = interpreter._patch_lang
    replaced: dict = {}

    @functools.cache
    def languages_of(fn):
        return tuple(any(v is lang for v in fn.__globals__.values()) for lang in (interpreter.tl, interpreter.tl.core))

    def once(fn):
        languages = languages_of(fn)
        if languages in replaced:
            return interpreter._LangPatchScope()
        outermost = not replaced
        scope = replaced[languages] = replace(fn)
        if outermost:
            restore = scope.restore

            def restore_all():
                for other in reversed([*replaced.values()][1:]):
                    other.restore()
                restore()
                replaced.clear()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = once

    # A dictionary of all types for each operation, and broadcasts of what has one shape.
    found, pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda type: pointer if type.scalar.is_ptr() else found(type.scalar)
    semantic, shape = interpreter.TritonSemantic, lambda tensor: [getattr(n, "value", n) for n in tensor.shape]
    broadcast = semantic.broadcast_impl_value

    def quick(self, lhs, rhs):
        return (lhs, rhs) if shape(lhs) == shape(rhs) else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = quick


@pytest.fixture(params=usable_backends())
def backend(request):
    """Every backend that can be used here on the CPU."""
    return request.param


@pytest.fixture(params=LOSSES, ids=str)
def loss(request):
    """Every loss of the table."""
    return request.param


@pytest.fixture
def kept_memory(monkeypatch):
    """Counts the buffers that a function takes where everything is large enough for one; its results stay the same."""

    def count(function):
        made, real = [], buffers.empty
        monkeypatch.setattr(buffers, "empty", lambda *of: made.append(of) or real(*of))
        wanted = function()
        assert not made
        monkeypatch.setattr(buffers, "BUFFER_FROM", 0)
        assert all(torch.equal(*pair) for pair in zip(function(), wanted, strict=True))
        return len(made)

    if native.cpu_missing:
        pytest.skip(native.cpu_missing)
    return count


@pytest.fixture
def threads_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

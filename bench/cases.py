"""What is measured: problems, which of them on which device, and their inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: The first six take ways of their own through the kernels; the last two share theirs with focal's and ArcFace's kind.
LOSSES = ["cross_entropy", "modulated", "arcface", "two_scale", "piecewise", "poly1", "focal", "cosface"]
#: A loss alone; with the gradient of its mean; row losses, then a gradient with an upstream of each row; the second
#: one from a CUDA graph.
MODES = ["forward", "step", "split", "graph"]
DTYPES = ["bfloat16", "float32", "float16", "float64"]

LABEL, LOSS, SAVED, UPSTREAM = 8, 4, 8, 4  # bytes per row
SMALL = 2**19  # elements: below, a step is all launches and calls


class Problem(NamedTuple):
    """Logits of one shape, classes in dimension 1, and one dtype; of a linear head also the features that make them."""

    shape: tuple[int, ...]
    dtype: str
    features: int = 0

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))} {self.dtype}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape; of a linear head N, D and C."""
        return (self.shape[0], self.features, self.classes) if self.features else self.shape

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.classes

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """u: one pass over the logits."""
        return self.elements * self.torch_dtype.itemsize

    @property
    def small(self) -> bool:
        return self.elements < SMALL


def floor_bytes(problem: Problem, mode: str) -> int:
    """What has to be read and written once per direction: 1u forward, 2u with a mean's gradient, 3u split."""
    u, rows = problem.nbytes, problem.rows
    if mode == "forward":
        return u + rows * LABEL
    if mode == "split":
        forward, backward = LABEL + LOSS + SAVED, LABEL + SAVED + UPSTREAM
        return 3 * u + rows * (forward + backward)
    return 2 * u + rows * LABEL


# ---- which ones ------------------------------------------------------------------------------------------------------

CPU_SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 8000), (1024, 32000)]
CPU_LARGE = CPU_SHAPES[-2:]  # also in bfloat16: elsewhere all is overhead, the same for every dtype

#: What people have most of comes first: a run that is cut off has kept it.
FIRST = [1000, 8192, 32768, 50257, 128256, 10]
CLASSES = [*FIRST, 4096, 16384, 128255, 262144, 256, 2, 100]
SEGMENTATION = (8, 19, 1024, 2048)
ELEMENTS = 2**30  # of a GPU's problem
#: A linear head's rows, features and classes: as others publish them, and for a CPU.
GPU_LINEAR = [
    (8192, 4096, 128256),
    (8192, 4096, 151936),
    (4096, 1024, 131072),
    (1024, 512, 1000000),
    (16384, 2048, 248320),
    (1024, 512, 10000000),
]
#: The last two are small: what a call costs beside its products is seen there.
CPU_LINEAR = [
    *((shape, dtype) for dtype in ("float32", "bfloat16") for shape in ((1024, 64, 200000), (512, 512, 50000))),
    *((shape, "float32") for shape in ((256, 512, 10000), (128, 64, 1000))),
]


def with_classes(classes: int, dtype: str, elements: int) -> Problem:
    """About so many elements; rows in sixteens, as training has them: Triton specialises on that."""
    return Problem((max(1, elements // classes // 16) * 16, classes), dtype)


def problems(gpu: bool, quick: bool = False) -> list[Problem]:
    """A GPU's or a CPU's, the most valuable first."""
    if not gpu:
        shapes = [CPU_SHAPES[0], *CPU_SHAPES[2:4]] if quick else CPU_SHAPES
        return [Problem(shape, "float32") for shape in shapes] + [
            Problem(shape, "bfloat16") for shape in (() if quick else CPU_LARGE)
        ]
    elements = ELEMENTS // 8 if quick else ELEMENTS

    def of(classes: list[int], dtype: str) -> list[Problem]:
        return [with_classes(one, dtype, elements) for one in classes]

    first = [*of(FIRST, "bfloat16"), Problem(SEGMENTATION, "bfloat16")]
    first += [Problem(shape, "float32") for shape in CPU_SHAPES[:3]]
    if quick:
        return [*first, *of(FIRST, "float32")]
    rest = [one for one in CLASSES if one not in FIRST]
    return [*first, *of(rest, "bfloat16"), *of(CLASSES, "float32"), Problem(SEGMENTATION, "float32")]


def linear(gpu: bool, quick: bool = False) -> list[Problem]:
    """The same for classifiers and losses in one."""
    found = [(shape, "bfloat16") for shape in GPU_LINEAR] if gpu else CPU_LINEAR
    found = found[: 1 if quick else None]
    return [Problem((rows, classes), dtype, features) for (rows, features, classes), dtype in found]


#: On either side of where the CPU's kernels change their ways (float32; csrc/library_cpu.cpp, kernels.cpp, buffers.h).
CPU_EDGES = [
    *((340, 10), (360, 10), (188, 100), (200, 100), (59, 520), (64, 520)),  # another thread
    *((1024, 47), (1024, 48), (512, 255), (512, 256)),  # a row's own vectors; rows in place
    *((1024, 1023), (1024, 1024)),  # a gradient in memory that is kept, 4 MiB
    *((2048, 1023), (2048, 1024)),  # stores past the caches, 8 MiB
    *((64, 131072), (64, 131073)),  # the next row is fetched ahead, 512 KiB
]

#: Lists of others, as they stand there, for figures that can be held against theirs; and our own edges: `--set`.
SETS = {
    "edges": [Problem(shape, "float32") for shape in CPU_EDGES],
    # meta-pytorch/tritonbench, tritonbench/operators/cross_entropy/operator.py: B = 8, T = 2048, V = 2^12 to 2^17.
    "tritonbench": [Problem((8 * 2048, 2**power), "float32") for power in range(12, 18)],
    # pytorch/pytorch, benchmarks/dynamo/genai_layers/kernels.py, CrossEntropyForward.get_shapes; quack's are the same.
    "genai_layers": [Problem((32768, 2**power), "bfloat16") for power in range(8, 17)]
    + [Problem((16384, 131072), "bfloat16"), Problem((8192, 262144), "bfloat16")],
    # pytorch/helion, pretuned_kernels/cross_entropy/cross_entropy.py: 21 shapes, the forward alone there.
    "helion": [
        Problem((tokens, vocabulary), "bfloat16")
        for vocabulary, sizes in {
            32000: (2048, 4096, 8192),
            128000: (8192, 16384, 32768),
            128256: (2048, 4096, 8192, 16384),
            129280: (2048, 4096, 8192),
            151936: (2048, 4096, 8192),
            152064: (2048, 4096, 8192),
            256000: (1024, 2048),
        }.items()
        for tokens in sizes
    ],
    # huggingface/trl, pull request 6858: bench/loss_bench.py, tokens x hidden x vocabulary.
    "trl": [Problem((rows, 248320), "bfloat16", 2048) for rows in (16384, 4096)],
}

# ---- inputs ----------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """One set of inputs."""

    leaves: tuple[Tensor, ...]  # the logits; or a linear head's features and weight
    target: Tensor
    upstream: Tensor  # of the row losses

    def clone(self) -> Inputs:
        """Others with the same values."""
        return self._replace(leaves=tuple(leaf.detach().clone().requires_grad_() for leaf in self.leaves))


def make_inputs(problem: Problem, cosines: bool, device: torch.device) -> Inputs:
    """Every other row confident, as in training; no value so far out that its exponential is subnormal."""
    shape, dtype = problem.shape, problem.torch_dtype
    rows = (shape[0], *shape[2:])
    generator = torch.Generator(device).manual_seed(0)
    target = torch.randint(problem.classes, rows, generator=generator, device=device)
    upstream = torch.rand(rows, generator=generator, device=device)

    def normal(shape: tuple[int, ...], spread: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, spread, generator=generator)

    if problem.features:
        features = normal((problem.rows, problem.features), 1.0)
        weight = normal((problem.classes, problem.features), 1.5 / math.sqrt(problem.features))
        features[::2] += 8 * weight[target[::2]] / 1.5**2
        return Inputs((features.requires_grad_(), weight.requires_grad_()), target, upstream)
    logits = normal(shape, 0.1 if cosines else 1.5)
    if cosines:
        logits.clamp_(-0.6, 0.6)
    boost = torch.zeros(rows, dtype=dtype, device=device)
    boost.view(-1)[::2] = 0.35 if cosines else 8.0
    logits.scatter_add_(1, target[:, None], boost[:, None])
    return Inputs((logits.requires_grad_(),), target, upstream)


def input_sets(problem: Problem, cache: int) -> int:
    """How many sets of inputs to rotate over, so that none is left in a cache of so many bytes."""
    return max(1, min(64, math.ceil(4 * cache / problem.nbytes)))

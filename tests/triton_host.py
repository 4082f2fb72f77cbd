"""Triton's whole host path over the stub driver, without a GPU; ``test_triton_host.py`` runs this.

    python tests/triton_host.py

prints one JSON object: what training steps compile and launch, and what reaches Triton's launcher. It is a process of
its own: under TRITON_INTERPRET=1 ``triton.jit`` makes functions that no driver ever sees.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from table import BY_NAME, LOSSES

import mlkernels
from tools import stub_driver

N, C = 128, 100
MANY = 40000  # for which labels are counted by a kernel of its own


def setting(rows: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, C), torch.randint(C, (rows,))


def step_of(name: str, input: Tensor, target: Tensor, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """A training step of a loss of the table."""
    loss = BY_NAME[name]
    trained = options.pop("trained", False)
    params = loss.values("shared" if trained else "number", target, input.shape[1], dtype=torch.float32)
    if trained:
        params = {name: value.requires_grad_() for name, value in params.items()}
    if loss.groups:
        options["group"] = loss.group(target)

    def step() -> tuple[Tensor, Tensor]:
        x = input.detach().requires_grad_()
        value = loss(x, target, params, backend="triton", **options)
        value.sum().backward()
        return value, x.grad

    return step


def structure(name: str, target: Tensor) -> str:
    """What of a loss decides which kernel it is: which of its parameters are tensors, of which kinds."""
    params = BY_NAME[name].values("number", target, C)
    kinds = {n: n.split("_")[0] if n.startswith(("t_", "tau_")) else n for n in params}
    return " ".join(sorted({f"{kinds[n]}{v.dim()}" for n, v in params.items() if isinstance(v, Tensor)}))


def compilations() -> list[dict[str, Any]]:
    """Over all losses of the table: compilations of the first steps, launches of a later one."""
    input, target = setting()
    found = []
    for loss in LOSSES:
        step = step_of(loss.name, input, target)
        compiled.clear()
        step()
        step()
        first = dict(Counter(compiled))
        compiled.clear()
        stub.reset()
        step()
        found.append(
            {
                "loss": loss.name,
                "structure": structure(loss.name, target),
                "compiled": first,
                "again": len(compiled),
                "launches": stub.launches,
            }
        )
    return found


def heard(step: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a step launches."""
    names: list[str] = []
    hook = lambda said: names.append(said.get()["name"])
    triton.knobs.runtime.launch_enter_hook.add(hook)
    step()
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    return names


def launches() -> dict[str, dict[str, int]]:
    """What a step of few rows and one of many launch."""
    found = {}
    for count in (N, MANY):
        found[str(count)] = dict(Counter(heard(step_of("focal_2", *setting(count)))))
    return found


def orders() -> list[tuple[int, int]]:
    """How often visits release what they have stored, and acquire what others have, in the code that was compiled."""
    texts = [one.asm["ptx"] for cache, *_ in rows.visit.device_caches.values() for one in cache.values()]
    return sorted({(text.count(".release."), text.count(".acquire.")) for text in texts})


def data() -> dict[str, int]:
    """What differs in numbers alone compiles nothing."""
    input, target = setting()
    tables = {n: torch.rand(3) for n in ("t_slope", "t_bias", "tau_slope", "tau_bias")}

    def piecewise(bins: int) -> None:
        own = {n: table.repeat(bins)[:bins] for n, table in tables.items()}
        x = input.clone().requires_grad_()
        mlkernels.piecewise_cross_entropy(x, target, **own, backend="triton").backward()

    calls: dict[str, tuple[Callable[[], Any], list[Callable[[], Any]]]] = {
        "rows": (
            lambda: [step_of("focal_2", torch.randn(n, C), torch.randint(C, (n,)))() for n in (N, MANY)],
            [step_of("focal_2", torch.randn(n, C), torch.randint(C, (n,))) for n in (1, 2, 16, 127, MANY + 7)],
        ),
        "classes": (
            step_of("focal_2", input, target),
            [step_of("focal_2", torch.randn(N, c), torch.randint(c, (N,))) for c in (68, 124)],
        ),
        "row stride": (
            step_of("focal_2", input, target),
            [step_of("focal_2", torch.randn(N, c)[:, :C], target) for c in (104, 112, 164)],
        ),
        "ignore_index": (
            step_of("focal_2", input, target),
            [step_of("focal_2", input, target, ignore_index=i) for i in (1, 16, -1, 2**40)],
        ),
        "bins": (lambda: piecewise(2), [lambda: piecewise(1), lambda: piecewise(16)]),
    }
    found = {}
    for name, (first, others) in calls.items():
        first()
        compiled.clear()
        for other in others:
            other()
        found[name] = compiled.count("visit")
    return found


# ---- what reaches the launcher ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched() -> Iterator[list[list[Any]]]:
    """What Triton's launcher is given meanwhile, flat."""
    found: list[list[Any]] = []
    cls = stub.driver.launcher_cls
    kept = cls.__call__

    def call(self: Any, *given: Any) -> Any:
        flat: list[Any] = []
        for one in given[:6] + given[9:]:  # without the hooks and what they are told
            flat.extend(one if isinstance(one, tuple) else [one])
        found.append([one.data_ptr() if isinstance(one, Tensor) else one for one in flat])
        return kept(self, *given)

    cls.__call__ = call
    try:
        yield found
    finally:
        cls.__call__ = kept


def named(launches: list[list[Any]], tensors: dict[str, Tensor]) -> list[list[Any]]:
    """Addresses by what lies there; those of memory that a call works in are all alike."""
    places = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    return [
        [places.get(one, "memory") if type(one) is int and one > 2**40 else one for one in given] for given in launches
    ]


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    replay._enabled = False
    try:
        yield
    finally:
        replay._enabled = True


#: Whose numbers and tables are trained.
TRAINED = ("arcface", "two_scale", "piecewise", "piecewise_groups")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0},
    {"reduction": "none", "weight": torch.rand(C) + 0.5, "logit_adjustment": torch.randn(C)},
]


def both_ways(
    name: str, rows: int = N, dtype: torch.dtype = torch.float32, shift: int = 0, **options: Any
) -> tuple[list[list[Any]], list[list[Any]]]:
    """What a step launches, as it comes and plainly, on tensors of its own, so many elements into their memory."""
    input, target = torch.randn(rows * C + shift, dtype=dtype)[shift:].view(rows, C), torch.randint(C, (rows,))
    found = []
    for way in (contextlib.nullcontext, plainly):
        with way(), launched() as launches:
            value, gradient = step_of(name, input, target, **options)()
        found.append(named(launches, {"input": input, "target": target, "value": value, "gradient": gradient}))
    return found[0], found[1]


def replays() -> list[dict[str, Any]]:
    """Each loss, plainly and from a tape, on other tensors than those that it was taped with."""
    found = []
    for loss, count, options in [
        *((loss, N, {}) for loss in LOSSES),
        *((BY_NAME["modulated"], N, options) for options in OPTIONS),
        *((BY_NAME[name], N, {"trained": True}) for name in TRAINED),
        (BY_NAME["modulated"], MANY, {}),
    ]:
        replay.forget()
        for _ in range(3):
            step_of(loss.name, *setting(count), **options)()
        played, plain = both_ways(loss.name, count, **options)
        tapes = [tape for tapes in replay._all for tape in tapes.values() if isinstance(tape, replay._Tape)]
        given = [one for tape in tapes for launch in tape.launches for one in launch.given]
        given += [part for one in given if isinstance(one, tuple) for part in one]
        found.append(
            {
                "loss": loss.name,
                "rows": count,
                "options": sorted(options),
                "launches": len(plain),
                "same": played == plain,
                "taped": len(tapes),
                "tensors kept": sum(isinstance(one, Tensor) for one in given),
            }
        )
    return found


#: Of calls that are taped and of one after them, which a tape must not serve: arguments of ``both_ways``.
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smoothing": ({}, {"label_smoothing": 0.1}),
    "no smoothing": ({"label_smoothing": 0.1}, {}),
    "softcap": ({"normalizer": 7.0}, {"normalizer": 7.0, "softcap": 20.0}),  # as many numbers, and another kernel
    "no normalizer": ({"normalizer": 7.0}, {}),
    "8 bytes further": ({}, {"shift": 2}),
    "4 bytes further": ({}, {"shift": 1}),
    "a number that float32 does not hold": (
        {"dtype": torch.float64, "z_loss": 0.25}, {"dtype": torch.float64, "z_loss": 0.1}
    ),
}  # fmt: skip


def unlike() -> dict[str, bool]:
    """Whether a call is launched as plainly, though one that is almost like it was taped."""
    found = {}
    for what, (taped, called) in UNLIKE.items():
        replay.forget()
        for _ in range(3):
            both_ways("modulated", **taped)
        played, plain = both_ways("modulated", **called)
        found[what] = played == plain
    return found


def linear() -> dict[str, Any]:
    """A linear head of four tiles, the last one narrower: what a call launches, and what is replayed of that."""

    def step() -> None:
        x, weight = torch.randn(N, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
        target = torch.randint(1000, (N,))
        mlkernels.linear_cross_entropy(
            x, weight, target, strategy="tiles", memory=4 * N * 256, backend="triton"
        ).backward()

    replay.forget()
    names = heard(step)
    for _ in range(2):
        step()
    compiled.clear()
    found = []
    for way in (contextlib.nullcontext, plainly):
        with way(), launched() as launches:
            step()
        found.append(named(launches, {}))
    tapes = [tape for tapes in replay._all for tape in tapes.values() if isinstance(tape, replay._Tape)]
    return {
        "launches": dict(Counter(names)), "taped": len(tapes), "same": found[0] == found[1], "again": len(compiled),
    }  # fmt: skip


def surroundings() -> dict[str, Any]:
    """Streams, hooks, devices and threads."""
    found: dict[str, Any] = {}
    input, target = setting()
    step = step_of("modulated", input, target)
    for _ in range(4):
        step()

    stub.stream = 77
    step()
    found["stream"] = stub.latest.stream
    stub.stream = 0

    names = heard(step)
    found["hooked"], seen = Counter(names)["visit"], len(names)
    step()
    found["hooked afterwards"] = len(names) - seen

    # Tensors of a second GPU, while the first is current. On a CPU build of torch nothing of this is there.
    devices: list[int] = []

    class Guard:
        def __init__(self, index: int):
            self.index = index

        def __enter__(self) -> None:
            self.before = stub.device
            stub.driver.set_current_device(self.index)

        def __exit__(self, *error: Any) -> None:
            stub.driver.set_current_device(self.before)

    kept = torch.Tensor.get_device, torch.cuda.current_device, torch.cuda.device
    torch.Tensor.get_device = lambda self: 1
    torch.cuda.current_device, torch.cuda.device = (lambda: stub.device), Guard
    stub.watch(lambda what, parameters: devices.append(what.device))
    for _ in range(4):
        step()
    stub.watch(None)
    torch.Tensor.get_device, torch.cuda.current_device, torch.cuda.device = kept
    found["devices"], found["device afterwards"] = sorted(set(devices)), stub.device

    # Many threads, each on its own tensors.
    replay.forget()
    wrong: list[Any] = []

    def work(own: torch.Generator) -> None:
        try:
            for rows in (N, 64, N, 64, N, 64):
                x, y = torch.randn(rows, C, generator=own), torch.randint(C, (rows,), generator=own)
                step_of("modulated", x, y)()
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(torch.Generator().manual_seed(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = [played == plain for played, plain in (both_ways("modulated"), both_ways("modulated", 64))]
    found["threads"] = {"wrong": wrong, "same": same}
    return found


def microseconds(calls: int = 200) -> dict[str, float]:
    """A step, in the middle."""
    step = step_of("modulated", *setting())

    def measured() -> float:
        times = []
        for _ in range(calls):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        return 1e6 * median(times)

    step(), step(), step()
    played = measured()
    with plainly():
        return {"played": played, "plain": measured()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    stub = stub_driver.install()
    import triton

    from mlkernels.backends.triton import replay, rows

    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **said: compiled.append(said["fn"].jit_function.__name__)
    # Triton warns once a process: before anything filters.
    with warnings.catch_warnings(record=True) as warned, stub_driver.served():
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "CUDA initialization")  # a torch that has CUDA misses the rest of the driver
        print(
            json.dumps(
                {
                    "triton": triton.__version__,
                    "compilations": compilations(),
                    "launches": launches(),
                    "orders": orders(),
                    "data": data(),
                    "replays": replays(),
                    "unlike": unlike(),
                    "linear": linear(),
                    "surroundings": surroundings(),
                    "microseconds": microseconds(),
                    "warned": [str(one.message) for one in warned],
                }
            )
        )

"""Faults put into nvcc's kernels, and Triton's: whether the emulator, or else a wrong number, gives each away."""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from . import Fault, Module, cuda_host
from .cases import Case, check
from .launches import launches
from .worker import prepare


def _added(bits: str, more: int) -> Callable[[re.Match[str]], str]:
    """An operand that is off by a number: the groups are what stands before it, itself, and what stands behind it."""
    return lambda m: f"{{.reg .{bits} off;\nadd.{bits.replace('b', 'u')} off, {m[2]}, {more};\n{m[1]}off{m[3]};}}"


_LONG = {"warps": 2, "chunk": 32, "teams": 1}
#: Rows in each of the paths that a launch may take.
ROWS = (
    Case(
        dtype="bfloat16", rows=70, classes=201, forced=(("path", "short"), ("warps", 1), ("cluster", -1), ("teams", 1))
    ),
    Case(dtype="bfloat16", rows=5, classes=1003, forced=tuple({"path": "long", "cluster": 4, **_LONG}.items())),
    Case(dtype="bfloat16", rows=4, classes=1003, forced=tuple({"path": "streamed", "slots": 2, **_LONG}.items())),
)
#: Enough of them that the last of three blocks adds up the loss.
BLOCKS = (
    Case(
        dtype="bfloat16", rows=520, classes=12, forced=(("path", "short"), ("warps", 2), ("cluster", -1), ("teams", 3))
    ),
)


class Kind(NamedTuple):
    """What is looked for, what is put in its place, and the cases that are to show it."""

    pattern: str
    replacement: Callable[[re.Match[str]], str]
    cases: tuple[Case, ...] = ROWS


_BULK = r"(cp\.async\.bulk\S+ \[%r\d+\], \[)(%rd\d+)(\], %r\d+, \[%r\d+\]);"
_EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared\.b64 _, \[%r\d+\], )(%r\d+)();"
_STORE = r"(st\.global\.L1::no_allocate\.v4\.u32 \[%rd\d+)\]"


def _nothing(place: re.Match[str]) -> str:
    return ";"


KINDS = {
    "no fence of an mbarrier": Kind(r"fence\.mbarrier_init\.release\.cluster;", _nothing),
    "a wait for the other phase": Kind(
        r"(mbarrier\.try_wait\.parity\.shared\.b64 done, \[%r\d+\], )(%r\d+)();",
        lambda m: f"{{.reg .b32 off;\nxor.b32 off, {m[2]}, 1;\n{m[1]}off;}}",
    ),
    "16 bytes more expected": Kind(_EXPECT, _added("b32", 16)),
    "2 bytes less expected": Kind(_EXPECT, _added("b32", -2)),
    "a bulk copy from 8 bytes on": Kind(_BULK, _added("b64", 8)),
    # Of a streamed row the first pass takes no more than the maximum, and any number near it would do.
    "a bulk copy from 16 bytes on": Kind(_BULK, _added("b64", 16), ROWS[:2]),
    "a store 4 bytes on": Kind(_STORE, lambda m: m[1] + "+4]"),
    "a store 16 bytes on": Kind(_STORE, lambda m: m[1] + "+16]"),
    "a load 8 bytes on": Kind(r"(ld\.shared\.v4\.u32 \t?\{[^}]*\}, \[%r\d+)\]", lambda m: m[1] + "+8]"),
    "a shuffle of 31 lanes": Kind(r"(shfl\.sync\.bfly\.b32 \t?[^;]*, )(?:%r\d+|-1);", lambda m: m[1] + "2147483647;"),
    "no barrier before a block has arrived": Kind(
        r"bar\.sync \t?0;(?=(?:[^;]*;){5,20}\s*membar\.gl;\s*atom)", _nothing, BLOCKS
    ),
    "no fence before a block has arrived": Kind(r"membar\.gl;(?=\s*atom)", _nothing, BLOCKS),
    "no fence once all have arrived": Kind(r"membar\.gl;(?!\s*atom)", _nothing, BLOCKS),
    "no barrier once all have arrived": Kind(
        r"(atom\.global\.add(?:[^;]*;){6,15}?\s*)bar\.warp\.sync \t?[^;]*;", lambda m: m[1], BLOCKS
    ),
    "arrivals without an atomic": Kind(
        r"atom(\.global)\.add(\.u32 \t?)(%r\d+), (\[%rd\d+\]), 1;",
        lambda m: (
            f"ld{m[1]}{m[2]}{m[3]}, {m[4]};\nadd{m[2]}{m[3]}, {m[3]}, 1;\nst{m[1]}{m[2]}{m[4]}, {m[3]};\n"
            f"sub{m[2]}{m[3]}, {m[3]}, 1;"
        ),
        BLOCKS,
    ),
}


_ACQUIRES = r"atom\.global\.gpu\.acquire(\.add\.u32[^;]*;)"
#: What orders the last program's reading after the others' stores.
TRITON_KINDS = {
    "no release": (r"atom\.global\.gpu\.release\.add", lambda m: "atom.global.gpu.relaxed.add"),
    "no acquire": (_ACQUIRES, lambda m: f"atom.global.gpu.relaxed{m[1]}"),
    "no barrier once all have arrived": (
        rf"(?s){_ACQUIRES}.*?(?=ld\.global\.cg)", lambda m: re.sub(r"bar\.sync[^;]*;", "", m[0]),
    ),
    "arrivals without an atomic": (
        r"(@%p\d+) atom\.global\.gpu\.release\.add\.u32 (%r\d+), (\[[^\]]*\]), (%r\d+);",
        lambda m: (
            f"{m[1]} ld.global.u32 {m[2]}, {m[3]};\n{m[1]} add.u32 {m[2]}, {m[2]}, 1;\n"
            f"{m[1]} st.global.u32 {m[3]}, {m[2]};\n{m[1]} sub.u32 {m[2]}, {m[2]}, 1;"
        ),
    ),
}  # fmt: skip
#: 17 programs, of which two are a group.
GROUPS = Case(dtype="bfloat16", rows=2100, classes=10, kind="ignored")


def _attempt(cases: Iterable[Case], backend: str = "cuda") -> str | None:
    """What the first case finds that finds something."""

    def found(case: Case) -> str | None:
        try:
            with cuda_host.forced(**dict(case.forced)) if backend == "cuda" else contextlib.nullcontext():
                check(case, backend)
        except (Fault, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    return next(filter(None, map(found, cases)), None)


@functools.cache
def _executed(cases: tuple[Case, ...]) -> frozenset[int]:
    """The lines that the cases execute."""
    module = cuda_host.ptx("90", "bfloat16")

    def hits() -> set[tuple[int, int]]:
        return {hit for name in module.names for hit in module.kernel(name).hits().items()}

    before = hits()
    clean = _attempt(cases)
    assert clean is None, clean
    return frozenset(line for line, _ in hits() - before)


def put(kind: str, tries: int = 1, seed: int = 0) -> list[str | None]:
    """What each of some faults of a kind is found by, None where nothing finds it.

    Raises:
        LookupError: none of the cases executes what is looked for.
    """
    cuda_host.install("90")
    launches.most_steps = 20_000_000
    text = cuda_host.text("90", "bfloat16")
    pattern, replacement, cases = KINDS[kind]
    executed = _executed(cases)
    places = [m for m in re.finditer(pattern, text) if text.count("\n", 0, m.start()) + 1 in executed]
    if not places:
        raise LookupError(f"no case executes {pattern}")
    found = []
    for place in random.Random(seed).sample(places, min(tries, len(places))):
        mutant = text[: place.start()] + replacement(place) + text[place.end() :]
        with cuda_host.replaced("90", "bfloat16", Module(mutant)):
            found.append(_attempt(cases))
    return found


def put_in_triton(target: str, kind: str) -> list[str | None]:
    """What a fault of a kind is found by, at each of the places where it can be put, None where nothing finds it."""
    prepare("triton", target)
    import triton.language as tl

    from mlkernels.backends.triton import arguments, rows, sums

    from . import triton_driver

    if arguments._GROUP != 2:
        arguments._GROUP, sums.GROUP = 2, tl.constexpr(2)
    pattern, replacement = TRITON_KINDS[kind]
    texts: list[str] = []

    def attempt(change: Callable[[str], str]) -> str | None:
        rows.visit.device_caches.clear()
        triton_driver.Module = lambda text: Module(change(text))
        try:
            return _attempt([GROUPS], "triton")
        finally:
            triton_driver.Module = Module
            rows.visit.device_caches.clear()

    clean = attempt(lambda text: texts.append(text) or text)
    assert clean is None, clean
    (visit,) = (text for text in texts if ".release.add" in text)
    found = []
    for place in re.finditer(pattern, visit):
        mutant = visit[: place.start()] + replacement(place) + visit[place.end() :]
        found.append(attempt(lambda text, mutant=mutant: mutant if text == visit else text))
    return found

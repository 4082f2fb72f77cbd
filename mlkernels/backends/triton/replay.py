"""A repeated call of an operator: one look-up, and one C launch per kernel.

What an operator allocates and launches follows from the metadata of its arguments: dtypes, shapes, strides, alignment,
which tensors there are, options. Triton binds, types and hashes every argument of every launch all the same, and takes
longer for that than a small loss does. So the second call of a kind is taped: what is allocated, what Triton hands to
its launchers, and where each address comes from. From the third on the tape is played with the addresses of the day.

* A call is taped only if all that it launches works on its own tensors and on memory that :func:`empty` made. Whatever
  a torch function computes for it (a copy, a sum) is foreign: such calls, and all of them under Triton's interpreter,
  take the plain way.
* The tape holds what Triton's own code gave its launcher, seen by a stand-in; where that is not what this file knows
  how to give, nothing is taped.
* Under a hook, a debug mode or instrumentation of Triton's, and where a launch has to be compiled, the way is plain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...numbering import CONSTS, Slot, consts_of

_VALUES = int(Slot.SOFTCAP) + 1
#: From here on numbers decide what is launched, by being positive.
_SWITCHES = CONSTS + int(Slot.SMOOTHING)
_NORMALIZER = CONSTS + int(Slot.NORMALIZER)
_MOST = 1024
#: Of every launch. Products are fused into additions unless the kernels say otherwise; Triton's own default changes
#: with its version, and 3.9 warns of that.
_OPTIONS = {"enable_fp_fusion": True}
#: What a launcher takes before the kernel's own arguments: grid, stream, function, metadata, launch_metadata, hooks.
_STREAM, _FUNCTION, _OWN = 3, 4, 9

_BARE = frozenset({Tensor, torch.nn.Parameter})
_dispatch_modes = torch._C._len_torch_dispatch_stack

_local = threading.local()


# ---- what operators do, while somebody listens -----------------------------------------------------------------------


class _Listener:
    """What one call allocates and launches."""

    def __init__(self, compiled: Sequence[Any] = ()):
        self.allocated: list[Tensor] = []
        self.compiled: list[Any] = []
        self.expected = list(compiled)  # of an earlier call of its kind
        self.given: list[list[Any]] = []


class _StandIn:
    """A launcher that remembers what it is given by this thread."""

    def __init__(self, run: Callable[..., Any]):
        self.run, self.thread = run, threading.get_ident()
        self.given: list[list[Any]] = []

    def __call__(self, *given: Any) -> Any:
        if threading.get_ident() == self.thread:
            self.given.append(list(given))
        return self.run(*given)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``."""
    options |= _OPTIONS
    listener: _Listener | None = getattr(_local, "listener", None)
    if listener is None:
        kernel[grid](*arguments, **options)
        return
    place = len(listener.compiled)
    if place >= len(listener.expected):
        listener.compiled.append(kernel[grid](*arguments, **options))
        return
    known = listener.expected[place]
    stand_in = _StandIn(known.run)
    known._run = stand_in
    try:
        listener.compiled.append(kernel[grid](*arguments, **options))
    finally:
        known._run = stand_in.run
    listener.given.append(stand_in.given[0] if len(stand_in.given) == 1 else [])


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result, or to work in."""
    return _listened(torch.empty(shape, dtype=dtype, device=device))


def empty_like(tensor: Tensor) -> Tensor:
    """The same, laid out as a tensor is."""
    return _listened(torch.empty_like(tensor))


def _listened(made: Tensor) -> Tensor:
    listener: _Listener | None = getattr(_local, "listener", None)
    if listener is not None:
        listener.allocated.append(made)
    return made


# ---- tapes -----------------------------------------------------------------------------------------------------------


class _Launch(NamedTuple):
    run: Callable[..., Any]
    given: list[Any]
    pointers: list[tuple[int, int, int]]  # argument, tensor, offset
    tuples: list[tuple[int, list[tuple[int, int] | None]]]  # argument, its tensors and offsets
    values: int  # the argument that holds the numbers of the loss, or 0
    in_values: list[tuple[int, int, int]]  # slot, tensor, offset
    normalizer: int  # the argument that is this number, or 0
    start: int  # the argument that is the first class of a tile, or 0


class _Result(NamedTuple):
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Tape(NamedTuple):
    driver: Any  # Triton's, and the device that was current
    number: int
    device: torch.device
    results: list[_Result]
    scratch: int  # bytes
    launches: list[_Launch]
    shape: Callable[[list[Tensor]], Any]  # results as the operator returns them

    def play(self, pointers: list[int], numbers: Sequence[float], start: int) -> Any:
        """The call again, on other tensors; pointers are those of the tensors among its arguments."""
        made = [torch.empty_strided(r.shape, r.strides, dtype=r.dtype, device=self.device) for r in self.results]
        pointers.extend([result.data_ptr() for result in made])
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=self.device)
            pointers.append(scratch.data_ptr())
        stream = self.driver.get_current_stream(self.number)
        for run, given, singles, tuples, values, in_values, normalizer, at_start in self.launches:
            arguments = given.copy()
            arguments[_STREAM] = stream
            for at, tensor, offset in singles:
                arguments[at] = pointers[tensor] + offset
            for at, parts in tuples:
                arguments[at] = tuple([None if part is None else pointers[part[0]] + part[1] for part in parts])
            if values:
                found: list[Any] = list(numbers[CONSTS : CONSTS + _VALUES])
                found += [0.0] * (_VALUES - len(found))
                for slot, tensor, offset in in_values:
                    found[slot] = pointers[tensor] + offset
                arguments[values] = tuple(found)
            if normalizer:
                arguments[normalizer] = numbers[_NORMALIZER]
            if at_start:
                arguments[at_start] = start
            run(*arguments)
        return self.shape(made)


class _Foreign(Exception):
    """A call that cannot be taped."""


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _taped(listener: _Listener, tensors: Sequence[Tensor], numbers: Sequence[float], result: Any) -> _Tape:
    """What was heard, as a tape."""
    if [*map(id, listener.compiled)] != [*map(id, listener.expected)]:
        raise _Foreign
    flat, shape = _shape_of(result)
    allocated = {_storage(made): made for made in listener.allocated}
    sources: dict[int, tuple[int, int]] = {}  # by storage: the number of a tensor, and the address that it begins at
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            if _storage(tensor) in sources:  # two arguments are one today, and need not be tomorrow
                raise _Foreign
            sources[_storage(tensor)] = (place, tensor.data_ptr())
    for place, tensor in enumerate(flat, len(tensors)):
        made = allocated.pop(_storage(tensor), None)
        if made is None or (made.data_ptr(), made.numel()) != (tensor.data_ptr(), tensor.numel()):
            raise _Foreign
        sources[_storage(tensor)] = (place, tensor.data_ptr())
    scratch = 0
    for storage, made in allocated.items():
        sources[storage] = (len(tensors) + len(flat), made.data_ptr() - scratch)
        scratch += -(-made.nbytes // 64) * 64

    def source(tensor: Tensor) -> tuple[int, int]:
        if _storage(tensor) not in sources:
            raise _Foreign
        place, start = sources[_storage(tensor)]
        return place, tensor.data_ptr() - start

    driver = triton.runtime.driver.active
    launches = [
        _launched(compiled, given, numbers, source)
        for compiled, given in zip(listener.compiled, listener.given, strict=True)
    ]
    results = [_Result(one.shape, one.stride(), one.dtype) for one in flat]
    return _Tape(driver, driver.get_current_device(), tensors[0].device, results, scratch, launches, shape)


def _launched(
    compiled: Any, given: list[Any], numbers: Sequence[float], source: Callable[[Tensor], tuple[int, int]]
) -> _Launch:
    names = compiled.src.fn.arg_names
    if len(given) != _OWN + len(names) or given[_FUNCTION] != compiled.function:
        raise _Foreign
    given[_OWN - 3 : _OWN] = None, None, None  # nobody is told
    constants = consts_of(numbers)
    singles, tuples, values, in_values, normalizer, start = [], [], 0, [], 0, 0
    for at, argument in enumerate(given[_OWN:], _OWN):
        if isinstance(argument, Tensor):
            singles.append((at, *source(argument)))
            given[at] = None  # else the tape would keep this call's tensors for good
        elif names[at - _OWN] == "normalizer" and argument is not None:
            if argument != constants[Slot.NORMALIZER]:
                raise _Foreign
            normalizer = at
        elif names[at - _OWN] == "start":
            start = at
        elif names[at - _OWN] == "values":
            values = at
            for slot, part in enumerate(argument):
                if isinstance(part, Tensor):
                    in_values.append((slot, *source(part)))
                elif part != constants[slot]:
                    raise _Foreign
            given[at] = None
        elif isinstance(argument, tuple) and any(isinstance(part, Tensor) for part in argument):
            if not all(part is None or isinstance(part, Tensor) for part in argument):
                raise _Foreign
            tuples.append((at, [None if part is None else source(part) for part in argument]))
            given[at] = None
    return _Launch(compiled.run, given, singles, tuples, values, in_values, normalizer, start)


def _shape_of(result: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a result, and how they make one."""
    if result is None:
        return [], lambda made: None
    if isinstance(result, list):
        return result, list
    if isinstance(result[1], list):
        end = 1 + len(result[1])
        return [result[0], *result[1], *result[2:]], lambda made: (made[0], made[1:end], *made[end:])
    return list(result), tuple


# ---- operators -------------------------------------------------------------------------------------------------------


def _watched() -> bool:
    """Whether somebody wants to see what Triton does, or has it do something else."""
    runtime = triton.knobs.runtime
    return bool(
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
    )


def _can_replay() -> bool:
    try:
        _watched()
    except AttributeError:  # another Triton than those that are known
        return False
    return not triton.knobs.runtime.interpret


_enabled = _can_replay()
_all: list[dict[Any, Any]] = []


def forget() -> None:
    """Drops all tapes: what they say no longer holds."""
    for tapes in _all:
        tapes.clear()


def replayed(
    operator: Callable[..., Any], leading: int, otherwise: Callable[..., Any], started: bool = False
) -> Callable[..., Any]:
    """The operator ``f(*tensors, numbers, params, *rest)``, from a tape where there is one.

    leading: how many tensors come first, each of which may be None. otherwise: what is called with tensors that are
    more than memory (subclasses, those that wait to be negated, zeros that are nowhere), or under a dispatch mode.
    started: the last argument is the ``start`` of every launch, a number like those of the loss.
    """
    tapes: dict[Any, Any] = {}  # a tape; before that the compiled kernels of the first call; None: there is none
    _all.append(tapes)

    def run(*arguments: Any) -> Any:
        numbers = arguments[leading]
        kind: list[Any] = numbers[:CONSTS]
        kind.append(len(numbers))
        kind += [number > 0 for number in numbers[_SWITCHES:]]
        tensors, pointers = [], []
        bare = not _dispatch_modes()
        start, end = (arguments[-1], -1) if started else (0, len(arguments))
        for one in (*arguments[:leading], *arguments[leading + 1], *arguments[leading + 2 : end]):
            if isinstance(one, Tensor):
                pointer = one.data_ptr() if type(one) in _BARE and not one.is_neg() else 0
                bare = bare and (pointer != 0 or one.numel() == 0)
                kind += (one.dtype, one.shape, one.stride(), pointer & 15)
                tensors.append(one)
                pointers.append(pointer)
            else:
                kind.append(one)
        if not bare:
            return otherwise(*arguments)
        index = tensors[0].get_device()
        if index >= 0 and index != torch.cuda.current_device():  # Triton launches on the current device
            with torch.cuda.device(index):
                return run(*arguments)
        kind.append(index)
        if tensors[0].dtype == torch.float64:  # whose numbers travel as float32 holds them, or as tensors
            kind += numbers
        key = tuple(kind)
        tape = tapes.get(key, ())
        if not _enabled or tape is None or _watched():
            return operator(*arguments)
        if type(tape) is _Tape:
            driver = triton.runtime.driver.active
            if tape.driver is driver and tape.number == driver.get_current_device():
                return tape.play(pointers, numbers, start)
            return operator(*arguments)
        listener = _local.listener = _Listener(tape)
        try:
            result = operator(*arguments)
        finally:
            _local.listener = None
        if None not in listener.compiled:
            if len(tapes) >= _MOST:  # sizes that never come again
                tapes.clear()
            try:
                tapes[key] = _taped(listener, tensors, numbers, result) if tape else listener.compiled
            except _Foreign:
                tapes[key] = None
        return result

    return run

"""What each test file is about, for tools.mutate: sources, and the functions and classes in them that count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Subject:
    """Sources, and tests with their options, as patterns of paths; the functions; and how what is built is built."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    within: str = ".*"
    build: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _of(name: str, *options: str) -> tuple[str, ...]:
    return (f"tests/test_{name}.py", *options)


#: Of a file of tests for every backend, those that the mutated code has a part in.
_REFERENCE, _CPU, _TRITON = ("-k", "not cpu and not triton and not cuda"), ("-k", "cpu"), ("-k", "triton")


def _cpu(sources: tuple[str, ...], tests: tuple[str, ...], within: str) -> Subject:
    """The CPU's library alone, built in place; without a compiler afterwards, so the CUDA kernels are not made anew."""
    build = "import sys; sys.path.insert(0, 'csrc'); import build as b; "
    build += "b.place(b.make_cpu().read_bytes(), b.ROOT / 'mlkernels/_cpu.abi3.so')"
    return Subject(sources, tests, within, f'python -c "{build}"', {"CXX": "none"})


LOSSES = "margin|_?bin(_of)?|table|piece|transform_target|row_scale|_damping|modulated|tau|truncated"
_WHOLE = f"{LOSSES}|statistics|finish|factors|reduced|row_stats|softmax_loss"
_reference, _triton = "mlkernels/backends/[fr]*.py", "mlkernels/backends/triton/*.py"
_softmax, _autograd, _checks, _ops = (f"mlkernels/{name}.py" for name in ("softmax", "autograd", "checks", "ops"))

SUBJECTS: dict[str, Subject] = {
    "accesses": Subject(
        ("mlkernels/backends/triton/arguments.py", "mlkernels/backends/triton/elements.py"),
        _of("accesses"),
        "_collapsed|_unit|_rows_at_once|multiple|row_offset|places|offsets",
    ),
    "autograd": Subject((_autograd,), _of("autograd", "-k", "not triton")),
    "bench": Subject(("bench/*.py",), _of("bench*")),
    "build": Subject(("csrc/build.py", "setup.py"), (*_of("build"), *_of("install"))),
    "compile": Subject(
        (_softmax, _autograd, _checks, _ops),
        _of("compile", "-k", "guarded or dynamic or dense or statistics or half or errors or without"),
        "apply|_[A-Z].*|_by_kernels|_placed|_order|_usual|_gradients|_loss_like|_softmax.*",
    ),
    "conventions": Subject(
        (_reference, _softmax), _of("conventions", *_REFERENCE), "softmax_loss|factors|reduced|Values|apply"
    ),
    "conventions_cpu": _cpu(
        ("csrc/rows.h", "csrc/library_cpu.cpp"),
        _of("conventions", *_CPU),
        "signed_label|batch_of|factors_of|store_unread|run_with_gradients",
    ),
    "cuda": Subject(("csrc/cuda/*",), _of("cuda"), build="python csrc/build.py --simt"),
    "distributed": Subject(("mlkernels/distributed/*.py",), _of("class_parallel")),
    "failures": Subject(
        (_reference, _checks),
        _of("failures", *_REFERENCE),
        f"{LOSSES}|_root|_angle|finish|softmax_loss|check_ind.*|index_error",
    ),
    "gradients": Subject((_reference,), _of("gradients", *_REFERENCE), f"{LOSSES}|_root|_angle|finish|softmax_loss"),
    "gradients_cpu": _cpu(
        ("csrc/finish.h",), _of("gradients", *_CPU), "coefficients|row_parameters|margin|tau|modulated"
    ),
    "gradients_oracle": Subject(("tests/oracle.py",), _of("gradients", "-k", "closed_derivatives or reference")),
    "hypothesis": Subject((_reference,), _of("hypothesis"), _WHOLE),
    "layouts": Subject(
        (_triton,),
        _of("layouts", *_TRITON),
        "_shape|_collapsed|_unit|exact|_reach|row_offset|offsets|places|of_row|read_logits",
    ),
    "layouts_cpu": _cpu(
        ("csrc/arguments.h", "csrc/cpu/call.h", "csrc/library_cpu.cpp", "csrc/cpu/kernels.cpp"),
        _of("layouts", *_CPU),
        "layout_of|gradient_like|array_of|gather_rows|scatter_rows|each_piece|run_.*",
    ),
    "linear": Subject(
        ("mlkernels/linear/*.py",), (*_of("linear"), *_of("pairs"), *_of("tile_update"), *_of("sampling"))
    ),
    "no_sync": Subject(
        (_softmax, _checks),
        _of("no_sync"),
        "apply|check_(indices|range)",
    ),
    "opcheck": Subject(
        (_ops,), _of("opcheck"), "needed|slots_of|_gradients|_loss_like|_softmax.*|_with_factors|_of_mean"
    ),
    "operators": _cpu(
        ("csrc/rows.h", "csrc/arguments.h", "csrc/library_cpu.cpp"),
        _of("operators"),
        "signed_label|batch_of|factors_of|store_unread|read_spec|kind_of|run_with_gradients",
    ),
    "precision": Subject(
        (_reference, _softmax, _autograd, _ops),
        _of("precision", "-k", "not triton"),
        "apply|_LossWithGradients|accumulated|softmax_loss|_softmax_loss|Values|factors",
    ),
    "schedule": Subject(("mlkernels/schedule/*.py",), (*_of("mils"), *_of("snapshot"))),
    "search_state": Subject(
        ("mlkernels/search/state.py",), (*_of("search_population"), *_of("search"), *_of("search_ranks"))
    ),
    "simt": Subject(
        ("csrc/simt/machine.h",), _of("simt", "-k", "expected or every_order"), environment={"CXX": "none"}
    ),
    "torch_samples": Subject(
        ("mlkernels/*.py", _reference, "mlkernels/schedule/snapshot.py"),
        _of("torch_samples", *_REFERENCE),
        "cross_entropy|_?soft_cross_entropy|multi_margin_loss|softmax_loss|Snapshot",
    ),
    "tracing": Subject(
        (_autograd, _checks, "mlkernels/lgm.py", "mlkernels/center.py"),
        _of("tracing"),
        "_usual|_takes_reference|_unusual|_by_kernels|_LossWithGradients|observed|traced|is_dual|check_indices|check_range|"
        "lgm_loss|center_loss",
    ),
    "triton": Subject(
        (_triton,),
        _of("triton", "-k", "elementary or sine or power or tiles or refreshed or parts or real or upstream or bits"),
        "log1p|expm1|tanh|acos|sincos|power|visit|count|total|bucket|tile|_sizes|softmax_.*|"
        "_rows_at_once",
    ),
    "triton_host": Subject((_triton,), _of("triton_host"), "_[A-Z].*|_.*|softmax_.*|run|play|forget"),
    "triton_wide": Subject(
        (_triton,), _of("triton_wide"), "row_offset|of_row|of_thread|places|offsets|visit|store_.*|read_logits"
    ),
    "values": Subject((_reference,), _of("values", *_REFERENCE), _WHOLE),
    "values_cpu": _cpu(
        ("csrc/finish.h",), _of("values", *_CPU), f"{LOSSES}|head_loss|finish|coefficients|row_parameters"
    ),
    "values_triton": Subject(
        (_triton,), _of("values", *_TRITON), f"{LOSSES}|head_loss|row_loss|coefficients|by_scale"
    ),
    "vgpu": Subject(
        ("tools/vgpu/emulator/*.cpp",),
        _of("vgpu"),
        build="python -c 'import sys; from tools import vgpu; sys.exit(vgpu.unavailable())'",
    ),
    "vgpu_kernels": Subject(
        tuple(f"tools/vgpu/{name}.py" for name in ("cases", "launches", "triton_driver", "worker")),
        _of("vgpu_kernels", "-k", "test_triton and cross_entropy"),
        "_.*|check|Launches|run|poisoned",
    ),
}  # fmt: skip

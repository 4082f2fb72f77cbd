"""What the project set out to reach on a CPU of two cores, and whether a run did."""

from __future__ import annotations

from typing import NamedTuple

from .run import Run
from .shapes import HEADLINE, LARGE, Case


class Target(NamedTuple):
    """``peer`` / ours at least ``bound`` times; or, for a floor, ours / ``peer`` at most that."""

    case: Case
    loss: str
    peer: str  # eager, compile, F.cross_entropy; copy, clone, float32: floors
    bound: float

    @property
    def is_floor(self) -> bool:
        return self.peer in ("copy", "clone", "float32")


class Outcome(NamedTuple):
    """A target and what was measured."""

    target: Target
    value: float

    @property
    def reached(self) -> bool:
        return self.value <= self.target.bound if self.target.is_floor else self.value >= self.target.bound

    @property
    def missed_by(self) -> float:
        """The factor that is missing; at most 1 where it was reached."""
        ratio = self.value / self.target.bound
        return ratio if self.target.is_floor else 1 / ratio

    def __str__(self) -> str:
        case, loss, peer, bound = self.target
        what = f"ours / {peer}" if self.target.is_floor else f"{peer} / ours"
        sign = "<=" if self.target.is_floor else ">="
        verdict = "reached" if self.reached else f"missed by {self.missed_by:.2f}x"
        return f"{case!s:<21} {loss:<14} {what:<22} {self.value:>7.2f}  {sign} {bound:<5g} {verdict}"


def _targets() -> list[Target]:
    def float32(rows: int, classes: int, *wanted: tuple[str, str, float]) -> list[Target]:
        return [Target(Case(rows, classes, "float32"), *one) for one in wanted]

    found = []
    for classes in (10, 100):
        found += float32(
            128,
            classes,
            ("modulated", "eager", 3),
            ("arcface", "eager", 3.5),
            ("cross_entropy", "F.cross_entropy", 1),
        )
    found += float32(
        256, 1000, ("modulated", "eager", 4), ("arcface", "eager", 8), ("cross_entropy", "F.cross_entropy", 2)
    )
    found += float32(1024, 8000, *((loss, "copy", 1.9) for loss in HEADLINE))
    found += float32(
        1024, 8000, ("modulated", "eager", 4), ("arcface", "eager", 10), ("cross_entropy", "F.cross_entropy", 4)
    )
    found += float32(1024, 8000, *((loss, "compile", 2.7) for loss in HEADLINE))
    found += float32(1024, 32000, *((loss, "clone", 1.25) for loss in HEADLINE))
    found += float32(
        1024, 32000, ("modulated", "eager", 2.2), ("arcface", "eager", 6), ("cross_entropy", "F.cross_entropy", 2.2)
    )
    found += [Target(Case(*shape, "bfloat16"), loss, "float32", 1) for shape in LARGE for loss in HEADLINE]
    return found


def check(run: Run) -> list[Outcome]:
    """The targets that this run measured. They are for CPUs."""
    found = []
    for target in _targets() if run.header["device_type"] == "cpu" else ():
        if target.peer == "float32":
            ours = run.median(target.case, target.loss, "ours")
            wide = run.median(target.case._replace(dtype="float32"), target.loss, "ours")
            value = ours / wide if ours and wide else None
        else:
            value = run.ratio(target.case, target.loss, target.peer)
            value = 1 / value if value and target.is_floor else value
        if value is not None:
            found.append(Outcome(target, value))
    return found

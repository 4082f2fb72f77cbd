"""Where the coefficients of the kernels' elementary functions come from.

``python -m tools.polynomials`` computes each polynomial anew, in 50 digits, from what it approximates, and shows how
well it does and where the sources say something else. ``tests/test_polynomials.py`` asks the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mpmath
import numpy as np
from mpmath import mpf

ROOT = Path(__file__).resolve().parent.parent
TRITON, ELEMENTARY, VEC = "mlkernels/backends/triton/elementary.py", "csrc/elementary.h", "csrc/cpu/vec.h"
Function = Callable[[mpf], mpf]
DIGITS = 50


class Part(NamedTuple):
    """What a polynomial P stands for: f = known + factor P, a function of the polynomial's own variable."""

    of: Function  # P itself
    weight: Function  # factor / f: an error of P times that is a relative one of f


def odd(f: Function) -> Part:
    """f(x) = x + x^3 P(x^2)."""

    def per_x(z: mpf) -> mpf:
        return f(mpmath.sqrt(z)) / mpmath.sqrt(z)

    return Part(lambda z: (per_x(z) - 1) / z, lambda z: z / per_x(z))


LOG1P = odd(mpmath.atanh)  # log1p(y) = 2 atanh(y / (2 + y))
TANH, ASIN, SIN = odd(mpmath.tanh), odd(mpmath.asin), odd(mpmath.sin)
#: cos(x) = 1 - x^2 / 2 + x^4 P(x^2)
COS = Part(lambda z: (mpmath.cos(mpmath.sqrt(z)) - 1 + z / 2) / z**2, lambda z: z**2 / mpmath.cos(mpmath.sqrt(z)))
#: expm1(x) = x + x^2 P(x)
EXPM1 = Part(lambda x: (mpmath.expm1(x) - x) / x**2, lambda x: x**2 / mpmath.expm1(x))
EXP = Part(EXPM1.of, lambda x: x**2 / mpmath.exp(x))


class Polynomial(NamedTuple):
    """A polynomial of a source: of least relative error of its function on [low, high], or a Taylor series."""

    path: str
    function: str  # where its definition begins
    place: int  # which of the function's Horner schemes
    part: Part
    low: mpf
    high: mpf
    degree: int
    error: float  # relative, of the function, were all but the coefficients exact: at most
    single: bool = False  # the coefficients are float32
    taylor: bool = False


with mpmath.workdps(DIGITS):
    NONE, THIRD, HALF, EIGHTH = mpf(0), mpf(1) / 9, mpf(1) / 4, (mpmath.pi / 4) ** 2  # squares
    TANH_END, CAP_END = mpf("0.36"), mpf(1)
    HALF_LN2 = mpmath.log(2) / 2
POLYNOMIALS = (
    Polynomial(TRITON, "def log1p(", 0, LOG1P, NONE, THIRD, 11, 2e-18),  # y in [-1/2, 1]
    Polynomial(TRITON, "def log1p(", 1, LOG1P, NONE, THIRD, 4, 3e-10),
    Polynomial(ELEMENTARY, "m_log1p_of_part(float x) {\n  // 2 atanh", 0, LOG1P, NONE, THIRD, 4, 2e-9, single=True),
    Polynomial(TRITON, "def expm1(", 0, EXPM1, mpf(-1), NONE, 12, 8e-18),
    Polynomial(TRITON, "def expm1(", 1, EXPM1, mpf(-1), NONE, 6, 2e-10),
    Polynomial(TRITON, "def tanh(", 0, TANH, NONE, TANH_END, 11, 6e-18),
    Polynomial(TRITON, "def tanh(", 1, TANH, NONE, TANH_END, 5, 2e-10),
    Polynomial(TRITON, "def acos(", 0, ASIN, NONE, HALF, 11, 3e-17),
    Polynomial(TRITON, "def sincos(", 0, SIN, NONE, EIGHTH, 5, 2e-17),
    Polynomial(TRITON, "def sincos(", 1, COS, NONE, EIGHTH, 5, 2e-18),
    Polynomial(ELEMENTARY, "T sine(T x, int quarters) {", 0, SIN, NONE, EIGHTH, 5, 2e-17),
    Polynomial(ELEMENTARY, "T sine(T x, int quarters) {", 1, COS, NONE, EIGHTH, 5, 2e-18),
    Polynomial(VEC, "vfloat exp_nonpositive(vfloat x) {", 0, EXP, -HALF_LN2, HALF_LN2, 4, 4e-9, single=True),
    Polynomial(VEC, "vdouble exp_nonpositive(vdouble x) {", 0, EXP, -HALF_LN2, HALF_LN2, 11, 6e-18, taylor=True),
    Polynomial(VEC, "vfloat tanh_series(vfloat z) {", 0, TANH, NONE, CAP_END, 6, 8e-9, single=True),
    Polynomial(VEC, "vdouble tanh_series(vdouble z) {", 0, TANH, NONE, CAP_END, 14, 4e-17),
)


# ---- approximation ---------------------------------------------------------------------------------------------------


def nodes(low: mpf, high: mpf, count: int) -> list[mpf]:
    """Chebyshev's, in rising order; an end is none of them."""
    middle, half = (low + high) / 2, (high - low) / 2
    return [middle - half * mpmath.cos(mpmath.pi * (2 * k + 1) / (2 * count)) for k in range(count)]


def minimax(part: Part, low: mpf, high: mpf, degree: int) -> list[mpf]:
    """The polynomial of least max |weight (P - of)|, lowest coefficient first: Remez' exchange."""
    grid = nodes(low, high, 40 * (degree + 2))
    grid += [end for end in (low, high) if end != 0]  # no weight there
    grid.sort()
    known = [(x, part.of(x), part.weight(x)) for x in grid]
    chosen = [known[40 * k + 20] for k in range(degree + 2)]
    for _ in range(20):
        rows = [[*(x**k for k in range(degree + 1)), (-1) ** i / weight] for i, (x, _, weight) in enumerate(chosen)]
        *found, level = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([value for _, value, _ in chosen]))
        errors = [(weight * (mpmath.polyval(found[::-1], x) - value)) for x, value, weight in known]
        if max(map(abs, errors)) < abs(level) * (1 + mpf(10) ** -12):
            return found
        best = [0]  # the largest error between two changes of sign
        for place, error in enumerate(errors):
            if (error > 0) != (errors[best[-1]] > 0):
                best.append(place)
            elif abs(error) > abs(errors[best[-1]]):
                best[-1] = place
        chosen = [known[place] for place in best]
        assert len(chosen) == degree + 2
    raise ArithmeticError("no polynomial was found")


def coefficients(polynomial: Polynomial) -> list[float]:
    """What the source should say, lowest first."""
    p = polynomial
    with mpmath.workdps(DIGITS):
        found = mpmath.taylor(mpmath.exp, 0, p.degree + 2)[2:] if p.taylor else minimax(*p[3:7])
    return [float(np.float32(float(c))) if p.single else float(c) for c in found]


def error(polynomial: Polynomial, found: list[float]) -> float:
    """The largest relative error of the function, were all but these coefficients exact."""
    part, low, high = polynomial.part, polynomial.low, polynomial.high
    with mpmath.workdps(DIGITS):
        exact = [mpf(c) for c in found[::-1]]
        return float(max(abs(part.weight(x) * (mpmath.polyval(exact, x) - part.of(x))) for x in nodes(low, high, 300)))


# ---- the sources -----------------------------------------------------------------------------------------------------


def written(polynomial: Polynomial) -> list[float]:
    """The coefficients that the source has, lowest first: its statements, executed with the polynomial x."""
    _, text = (ROOT / polynomial.path).read_text().split(polynomial.function)
    body = re.split(r"\n(?:}|@triton)", text)[0]
    x = np.polynomial.Polynomial([0.0, 1.0])
    found: list[np.polynomial.Polynomial] = []
    for name, formula in re.findall(r"^\s*(?:float |T |vfloat |vdouble )?([pq]) = ([^;\n]+?);?$", body, re.MULTILINE):
        formula = re.sub(r"\bT\(", "(", re.sub(r"(\d)f\b", r"\1", formula))
        names = set(re.findall(r"\b[a-z]\w*", formula))
        if names <= {"z", "r", "near", name}:
            values = {**dict.fromkeys(names, x), **({name: found.pop()} if name in names else {})}
            found.append(eval(formula, {"__builtins__": {}}, values))
    made = found[polynomial.place] + np.polynomial.Polynomial([0.0])
    return [float(np.float32(c)) if polynomial.single else float(c) for c in made.coef]


def main() -> None:
    for p in POLYNOMIALS:
        made, there = coefficients(p), written(p)
        print(f"{p.path}, {p.function.splitlines()[0]} {p.place}:")
        print(f"  degree {p.degree} on [{float(p.low):g}, {float(p.high):g}]")
        print(f"  relative error {error(p, made):.2e}, as written {error(p, there):.2e}")
        for one, other in zip(made[::-1], there[::-1], strict=True):
            print(f"  {str(np.float32(one)) if p.single else one!r:<26}{'' if one == other else f'  not {other!r}'}")


if __name__ == "__main__":
    main()

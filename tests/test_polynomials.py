"""Every coefficient of an elementary function is computed anew: tools/polynomials.py."""

import re

import mpmath
import numpy as np
import pytest

from tools import polynomials
from tools.polynomials import POLYNOMIALS, ROOT, TRITON, VEC

START = r"^\s*(?:float |T |vfloat |vdouble )?([pq]) = ([^;\n]*\d[^;\n]*?);?$"


@pytest.mark.parametrize(
    "polynomial",
    POLYNOMIALS,
    ids=lambda p: f"{p.path.split('/')[-1]}-{re.findall(r'[a-z0-9_]+(?=[(])', p.function)[0]}-{p.place}",
)
def test_source_has_what_is_computed(polynomial):
    found = polynomials.written(polynomial)
    assert len(found) == polynomial.degree + 1
    assert found == polynomials.coefficients(polynomial)
    assert polynomials.error(polynomial, found) <= polynomial.error


def test_none_is_forgotten():
    for path in {polynomial.path for polynomial in POLYNOMIALS}:
        schemes = re.findall(START, (ROOT / path).read_text(), re.MULTILINE)
        begun = [
            formula
            for name, formula in schemes
            if not re.search(rf"\b{name}\b|/ |sqrt|exp", formula.replace("1.0 / ", ""))
        ]
        assert len(begun) == sum(polynomial.path == path for polynomial in POLYNOMIALS), begun


def test_least_error():
    """Remez' answer where it is known: |x| + ... of degree 1 on [1, 2] for 1 / x, whose error is (3 - 2 sqrt 2) / 4."""
    part = polynomials.Part(lambda x: 1 / x, lambda x: mpmath.mpf(1))
    with mpmath.workdps(30):
        low, slope = polynomials.minimax(part, mpmath.mpf(1), mpmath.mpf(2), 1)
        assert abs(slope + 0.5) < 1e-8
        assert abs(low + slope - 1) == pytest.approx((3 - 2 * 2**0.5) / 4, rel=1e-4)


@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
def test_series_of_atanh_are_long_enough(single):
    """So many terms of vec.h's twice_atanh: what is left out is below half a unit in the last place."""
    text = (ROOT / VEC).read_text()
    (fraction,) = re.findall(r"twice_atanh<T, sizeof\(T\) == 4 \? (\d+) : (\d+)>", text)
    (logarithm,) = re.findall(r"twice_atanh<T, SINGLE_PRECISION \? (\d+) : (\d+)>", text)
    ulp = np.finfo(np.float32 if single else np.float64).eps
    with mpmath.workdps(50):
        for terms, end in ((fraction, mpmath.mpf(1) / 3), (logarithm, (mpmath.sqrt(2) - 1) / (mpmath.sqrt(2) + 1))):
            count = int(terms[0 if single else 1])
            series = sum(end ** (2 * k + 1) / (2 * k + 1) for k in range(count + 1))
            assert float(1 - series / mpmath.atanh(end)) < ulp / 2


def test_parts_of_constants():
    """Reductions subtract a multiple of pi / 2, or ln 2, in parts; all but the last end in zeros."""
    triton, vec = (ROOT / TRITON).read_text(), (ROOT / VEC).read_text()
    with mpmath.workdps(50):
        for whole, parts, digits, turns in (
            (mpmath.pi / 2, re.findall(r"turns \* ([\d.e-]+)\)? ?-? ?", triton.split("def sincos")[1])[:3], 53, 13),
            (mpmath.pi / 2, re.findall(r"turns \* ([\d.e-]+)\)? ?-? ?", triton.split("def sincos")[1])[3:6], 24, 13),
            (
                mpmath.log(2),
                re.findall(r"n \* ([\d.e-]+)f\)", vec)[:1] + re.findall(r"n \* ([\d.e-]+)f;", vec)[:1],
                24,
                8,
            ),
            (
                mpmath.log(2),
                re.findall(r"n \* ([\d.e-]+)\)", vec)[:1] + re.findall(r"n \* ([\d.e-]+);", vec)[:1],
                53,
                11,
            ),
        ):
            real = np.float32 if digits == 24 else np.float64
            values = [mpmath.mpf(float(real(part))) for part in parts]
            assert len(values) >= 2
            assert abs(sum(values) - whole) < whole * mpmath.mpf(2) ** (2 - digits - 8)
            for value in values[:-1]:  # times a whole number of so many bits, exactly
                bits = int(value * mpmath.mpf(2) ** 200)
                assert bits.bit_length() - (bits & -bits).bit_length() + 1 <= digits - turns

"""Elementary functions, written from core operations.

Libdevice does not exist under Triton's interpreter, and the hardware's ``lg2.approx`` loses every digit near 1. The
polynomials are those of least relative error, 2e-17 and less, in float32 of some 2e-10 (``tools/polynomials.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [-1/2, 1], as 2 atanh(x / (2 + x))."""
    q = x / (2.0 + x)
    z = q * q
    if x.dtype == tl.float64:
        p = 0.08023648829060642 * z + 0.02901677870117298
        p = p * z + 0.05046285118656939
        p = p * z + 0.05227982603843491
        p = p * z + 0.05885250195308294
        p = p * z + 0.06666504349500593
        p = p * z + 0.07692313868879933
        p = p * z + 0.09090908934660274
        p = p * z + 0.11111111113622248
        p = p * z + 0.1428571428569067
        p = p * z + 0.20000000000000112
        p = p * z + 0.3333333333333333
    else:
        p = 0.12144832593026264 * z + 0.10715356517241599
        p = p * z + 0.14308299552059317
        p = p * z + 0.19999444142099126
        p = p * z + 0.3333333775040112
    return 2.0 * (q + q * z * p)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0."""
    near = tl.maximum(x, -1.0)
    if x.dtype == tl.float64:
        p = 7.2100544672824955e-12 * near + 1.482888534479895e-10
        p = p * near + 2.065879288496622e-09
        p = p * near + 2.5026425319904824e-08
        p = p * near + 2.755522393362368e-07
        p = p * near + 2.755719876860481e-06
        p = p * near + 2.4801582414036214e-05
        p = p * near + 0.00019841269703050102
        p = p * near + 0.001388888888624081
        p = p * near + 0.008333333333300639
        p = p * near + 0.04166666666666428
        p = p * near + 0.16666666666666657
        p = p * near + 0.5
    else:
        p = 1.600287588702312e-05 * near + 0.00018521459934554586
        p = p * near + 0.0013781790388111594
        p = p * near + 0.008328462144013336
        p = p * near + 0.041665466844509585
        p = p * near + 0.16666652508418106
        p = p * near + 0.49999999428641223
    return tl.where(x > -1.0, x + x * x * p, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh(x); an element-wise function of the row, so float32 gets a shorter polynomial."""
    size = tl.abs(x)
    z = x * x
    if x.dtype == tl.float64:
        p = 6.494593461300031e-06 * z - 3.115913816981058e-05
        p = p * z + 9.24705878823991e-05
        p = p * z - 0.0002375022953824312
        p = p * z + 0.0005896185883265129
        p = p * z - 0.001455763256563841
        p = p * z + 0.003592119538305774
        p = p * z - 0.008863234849928717
        p = p * z + 0.02186948850140973
        p = p * z - 0.0539682539672111
        p = p * z + 0.1333333333333176
        p = p * z - 0.33333333333333326
    else:
        p = 0.002226979008155941 * z - 0.008262750714459564
        p = p * z + 0.02173272380269563
        p = p * z - 0.05395216746602886
        p = p * z + 0.13333245375207306
        p = p * z - 0.33333331720877407
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.6, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2, without the difference: it keeps its digits where tanh(x) is nearly 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def acos(x):
    """arccos(x) for x in [-1, 1], by arcsine on [0, 1/2] and the half-angle formula beyond."""
    size = tl.abs(x)
    far = size > 0.5
    z = tl.where(far, 0.5 - 0.5 * size, x * x)
    root = tl.sqrt(tl.maximum(z, 0.0))
    p = 0.03191247393738422 * z - 0.016224561630322806
    p = p * z + 0.0195284707537391
    p = p * z + 0.006527896190170956
    p = p * z + 0.012169231052410464
    p = p * z + 0.013885232305502846
    p = p * z + 0.017359705106833358
    p = p * z + 0.02237175802592275
    p = p * z + 0.030381959138068907
    p = p * z + 0.04464285682829953
    p = p * z + 0.07500000000337052
    p = p * z + 0.16666666666665408
    arc = root + root * z * p  # arcsin(root)
    beyond = tl.where(x > 0, 2.0 * arc, PI - 2.0 * arc)
    return tl.where(far, beyond, PI / 2 - tl.where(x > 0, arc, -arc))


@triton.jit
def sincos(x):
    """sin(x) and cos(x), |x| < 10^4. libdevice's would keep an array in local memory, for angles that no margin has."""
    turns = tl.floor(x * 0.6366197723675814 + 0.5)  # of pi / 2, which comes in three parts
    if x.dtype == tl.float64:
        r = ((x - turns * 1.57079625129699707031) - turns * 7.54978941586159635335e-8) - turns * 5.39030285815811905e-15
    else:
        r = ((x - turns * 1.5703125) - turns * 4.837512969970703125e-4) - turns * 7.549789948768648e-8
    z = r * r
    p = -2.5050747767528846e-08 + 1.5896230510929358e-10 * z
    p = p * z + 2.755731362139936e-06
    p = p * z - 0.000198412698295895
    p = p * z + 0.008333333333322118
    p = p * z - 0.1666666666666663
    sine = r + r * z * p
    p = 2.087570084131778e-09 - 1.1358536467989107e-11 * z
    p = p * z - 2.755731417929712e-07
    p = p * z + 2.4801587288851738e-05
    p = p * z - 0.0013888888888873056
    p = p * z + 0.041666666666666595
    cosine = 1.0 - 0.5 * z + z * z * p
    quarter = turns - 4.0 * tl.floor(0.25 * turns)
    odd = (quarter == 1.0) | (quarter == 3.0)
    first = tl.where(odd, cosine, sine)
    second = tl.where(odd, sine, cosine)
    return tl.where(quarter >= 2.0, -first, first), tl.where((quarter == 1.0) | (quarter == 2.0), -second, second)


@triton.jit
def power(x, y):
    """x^y for x >= 0. The whole part of the exponent by multiplications: exponents are nearly always small integers."""
    small = (y >= 0) & (y < 16)
    whole = tl.where(small, tl.floor(y), 0.0)
    count = whole.to(tl.int32)
    out = tl.where(count % 2 == 1, x, 1.0)
    square = x * x
    out = tl.where(count // 2 % 2 == 1, out * square, out)
    square = square * square
    out = tl.where(count // 4 % 2 == 1, out * square, out)
    square = square * square
    out = tl.where(count // 8 % 2 == 1, out * square, out)
    rest = y - whole
    return tl.where(rest == 0, out, out * tl.exp2(rest * tl.log2(x)))

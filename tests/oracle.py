"""Exact arithmetic in Python's own integers: slow, and independent of every floating-point unit."""

import math
from fractions import Fraction

import numpy as np


def fp32_nearest(exact: Fraction, sign: float, bits: int = 23) -> float:
    """The fp32 value nearest to `exact`, ties to even; `sign` is that of a result of zero. bits: 7 for bf16."""
    if exact == 0:
        return math.copysign(0.0, sign)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - bits)  # subnormals share one unit
    nearest = round(magnitude / unit) * unit  # Python rounds a Fraction half to even
    result = math.inf if nearest >= Fraction(2) ** 128 else float(nearest)
    return math.copysign(result, exact)


def fma_bf16(a: float, b: float, c: float) -> float:
    """a * b + c, rounded once to bf16."""
    return fma_fp32(a, b, c, bits=7)


def fma_fp32(a: float, b: float, c: float, bits: int = 23) -> float:
    """a * b + c, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c  # in fp64, where no product of two finite fp32 overflows
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    product_sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    both_negative = product_sign < 0 and math.copysign(1.0, c) < 0
    # a sum that is exactly zero is +0, but for -0 + -0; a product of zero counts by its sign
    is_sum_of_zeros = c == 0 and (a == 0 or b == 0)
    return fp32_nearest(exact, -1.0 if is_sum_of_zeros and both_negative else 1.0, bits)


def multiply_then_add_fp32(a: float, b: float, c: float) -> float:
    """The product rounded, then the sum rounded; finite arguments without overflow in the product."""
    product = fp32_nearest(Fraction(a) * Fraction(b), math.copysign(1.0, a) * math.copysign(1.0, b))
    return fma_fp32(product, 1.0, c)


def each(function, *operands: np.ndarray) -> np.ndarray:
    """`function` of Python floats, element by element, as fp32."""
    with np.errstate(over="ignore"):
        return np.array([function(*values) for values in zip(*(o.tolist() for o in operands), strict=True)], np.float32)

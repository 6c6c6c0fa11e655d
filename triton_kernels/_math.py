# SPDX-License-Identifier: Apache-2.0
"""Functions that Triton has only as the hardware's approximations."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # so few digits that its product with a small integer is exact
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)  # the rest of log(2)


@triton.jit
def exp(x):
    """e^x, x fp32, to an ulp. The hardware's is off by 2, and by x / 2 more from the rounding of x log2(e).

    The polynomial is Cephes' for expf (Moshier 1989), for |x| < log(2) / 2.
    """
    x = tl.minimum(
        tl.maximum(x, -174.0, propagate_nan=tl.PropagateNan.ALL), 176.0, propagate_nan=tl.PropagateNan.ALL
    )
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    half = tl.floor(n * 0.5)  # 2^n alone may leave float32 where the result does not
    return (p * r * r + r + 1.0) * _power_of_two(half) * _power_of_two(n - half)


@triton.jit
def _power_of_two(n):
    """2^n by its bits: n is an integer from -126 to 127."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)

"""Number formats on the device: widening, FP8 and FP4 casts, and the scales of a block.

Note [Two ways to cast]
The Triton interpreter rounds wrongly (subnormals, ties, carries) and knows no inline assembly. Every cast therefore
has a second form in integer arithmetic, chosen by `HARDWARE=False`. It is exact on any device, so it also serves GPUs
without FP8 conversion instructions. Both forms give the same bits: FP8 is round to nearest even, saturating, with
every NaN as 0x7F.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def laid_out_as(x, like, HARDWARE: tl.constexpr):
    """int32 `x` as it is, but computed by the threads that hold the 32-bit values `like`, of the same shape.

    Triton lets what is not loaded begin in a layout of its own, and may move it to the other tensors' one by one.
    """
    if HARDWARE:  # a move that takes `like` too: an operation's tensors share a layout
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, like], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return x


@triton.jit
def widen(x, HARDWARE: tl.constexpr):
    """bf16, fp16 or fp32 to fp32, exactly."""
    if x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    elif HARDWARE:  # in pairs: one instruction each, where the compiler's conversion takes two for every other value
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:  # the interpreter loses subnormals
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _round_to_bf16_in_integers(x):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded, bits | 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 to the nearest value (ties to even) of bf16, fp16 or fp32."""
    if dtype == tl.bfloat16 and not HARDWARE:  # the interpreter rounds wrongly
        bits = _round_to_bf16_in_integers(x).to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_pair_to_bf16(x0, x1, HARDWARE: tl.constexpr):
    """Two fp32 tensors to the nearest bf16 values (ties to even), kept as fp32."""
    if HARDWARE:  # in pairs: one by one the conversion runs at a quarter of the rate
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x0, x1], dtype=tl.uint32, is_pure=True, pack=1
        )
        return (pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return _round_to_bf16_in_integers(x0), _round_to_bf16_in_integers(x1)


@triton.jit
def reciprocal(x, HARDWARE: tl.constexpr):
    """The IEEE quotient 1 / x of positive fp32; of 0, Inf."""
    if HARDWARE:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.where(x == 0, float("inf"), tl.div_rn(x * 0 + 1.0, tl.where(x == 0, 1.0, x)))


@triton.jit
def _fp8_code_in_integers(x, E5M2: tl.constexpr):
    """fp32 to the int32 code of an FP8 value: note [Two ways to cast]."""
    MANTISSA: tl.constexpr = 2 if E5M2 else 3
    BIAS: tl.constexpr = 15 if E5M2 else 7
    SHIFT: tl.constexpr = 23 - MANTISSA
    MAX_CODE: tl.constexpr = 0x7B if E5M2 else 0x7E
    MIN_NORMAL_BITS: tl.constexpr = (128 - BIAS) << 23
    # Added to a subnormal, this constant's last mantissa bit weighs one subnormal step: one exact rounding.
    STEP_BITS: tl.constexpr = (127 + 23 - (BIAS - 1 + MANTISSA)) << 23
    absolute = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    # Inf and NaN would overflow the addition below.
    bits = tl.minimum(absolute, 0x7F000000)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    small = tl.minimum(bits, MIN_NORMAL_BITS).to(tl.float32, bitcast=True)
    step = tl.full([], STEP_BITS, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (small + step).to(tl.int32, bitcast=True) - STEP_BITS
    code = tl.where(bits < MIN_NORMAL_BITS, subnormal, tl.minimum(normal, MAX_CODE))
    return tl.where(absolute > _INF_BITS, 0x7F, sign | code)


@triton.jit
def fp8_code(x, E5M2: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 to the byte of an FP8 value."""
    if not HARDWARE:
        return _fp8_code_in_integers(x, E5M2).to(tl.uint8)
    elif E5M2:
        return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def fp8_codes_packed(x0, x1, x2, x3, E5M2: tl.constexpr, HARDWARE: tl.constexpr):
    """Four fp32 tensors to one int32 tensor of four FP8 bytes, `x0` in the lowest."""
    if not HARDWARE:
        low = _fp8_code_in_integers(x0, E5M2) | (_fp8_code_in_integers(x1, E5M2) << 8)
        high = _fp8_code_in_integers(x2, E5M2) | (_fp8_code_in_integers(x3, E5M2) << 8)
        return low | (high << 16)
    elif E5M2:
        return tl.inline_asm_elementwise(
            """{ .reg .b16 low, high;
            cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;
            cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }""",
            "=r,f,f,f,f",
            [x0, x1, x2, x3],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }""",
            "=r,f,f,f,f",
            [x0, x1, x2, x3],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def e4m3_value(code):
    """int32 codes of non-negative E4M3 values to fp32. The exponent's bias is mended by one exact multiplication."""
    return (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def magnitude(x, HARDWARE: tl.constexpr):
    """|x| for a maximum that ignores NaN, as the device's does; the interpreter's does not."""
    if HARDWARE:
        return tl.abs(x)
    else:
        return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def largest_magnitude(values, HARDWARE: tl.constexpr):
    """fp32 elementwise maximum of the magnitudes of a tuple of tensors; on the device NaN where all are NaN."""
    if values[0].dtype == tl.bfloat16 and HARDWARE:  # two to an instruction; the sign that it makes is dropped last
        largest = values[0]
        for i in tl.static_range(1, len(values)):
            largest = tl.inline_asm_elementwise(
                "max.xorsign.abs.bf16x2 $0, $1, $2;",
                "=r,r,r",
                [largest, values[i]],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        return tl.abs(widen(largest, HARDWARE))
    else:
        largest = magnitude(widen(values[0], HARDWARE), HARDWARE)
        for i in tl.static_range(1, len(values)):
            largest = tl.maximum(largest, magnitude(widen(values[i], HARDWARE), HARDWARE))
        return largest


@triton.jit
def without_nan(amax):
    """A maximum that ignored NaN: 0 where there was nothing but NaN."""
    return tl.maximum(amax, 0.0)


@triton.jit
def fp8_block_scale(amax, epsilon, E5M2: tl.constexpr, POWER_OF_2: tl.constexpr, INPUT_MAX: tl.constexpr):
    """`(scale, 1 / scale)` of a block. `INPUT_MAX`: largest finite value of the input's dtype.

    amax: of the block's magnitudes; one that ignored NaN, and is NaN where there was nothing else, counts as 0.
    fp8_max is 1.75 * 2^8 (E4M3) or 1.75 * 2^15 (E5M2), so the power of two at or below fp8_max / amax follows from
    amax's exponent, one less where its mantissa is above 1.75: no division.
    """
    amax = tl.maximum(amax, epsilon)  # of NaN and epsilon: epsilon
    bits = amax.to(tl.int32, bitcast=True)
    unscaled = (bits == 0) | (bits == _INF_BITS)
    if POWER_OF_2:
        TOP: tl.constexpr = 269 if E5M2 else 262
        exponent = TOP - ((bits + 0x1FFFFF) >> 23)
        if INPUT_MAX < 1e5:  # beyond float32 the scale is this one, rounded down
            exponent = tl.where(exponent > 254, 142, exponent)
        else:
            exponent = tl.minimum(exponent, 254)
        exponent = tl.where(unscaled, 127, exponent)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        scale_inv = tl.maximum((254 - exponent) << 23, 0x400000).to(tl.float32, bitcast=True)
    else:
        FP8_MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
        divisor = tl.where(unscaled, FP8_MAX, amax)
        scale = tl.div_rn(tl.zeros_like(divisor) + FP8_MAX, divisor)
        scale = tl.where(scale.to(tl.int32, bitcast=True) == _INF_BITS, INPUT_MAX, scale)
        scale_inv = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    return scale, scale_inv


@triton.jit
def e8m0_scale(amax, E5M2: tl.constexpr):
    """`(code, 2^(127 - code))` of a block, from its amax (no NaN): the int32 E8M0 code rounded up, and its inverse."""
    RECIPROCAL_BITS: tl.constexpr = 0x37924925 if E5M2 else 0x3B124925  # fl(1 / fp8_max)
    reciprocal = tl.full([], RECIPROCAL_BITS, tl.int32).to(tl.float32, bitcast=True)
    bits = (amax * reciprocal).to(tl.int32, bitcast=True)
    # A subnormal up to 2^-127 has code 0; above it, and for any other mantissa, the exponent is rounded up.
    code = tl.minimum((bits + tl.where(bits < 0x800000, 0x3FFFFF, 0x7FFFFF)) >> 23, 254)
    inverse = tl.maximum((254 - code) << 23, 0x400000).to(tl.float32, bitcast=True)
    return code, inverse


@triton.jit
def nvfp4_global_scale(amax):
    """`(multiplier of a block's amax, fl(1 / G))`, from the tensor's amax: G = 2688 / amax."""
    divisor = tl.where(amax == 0, 1.0, amax)
    encode = tl.minimum(tl.div_rn(tl.zeros_like(divisor) + 2688.0, divisor), FLOAT_MAX)
    encode = tl.where((amax == 0) | (encode == 0), 1.0, encode)
    sixth = tl.full([], 0x3E2AAAAB, tl.int32).to(tl.float32, bitcast=True)
    return encode * sixth, tl.div_rn(tl.zeros_like(encode) + 1.0, encode)


@triton.jit
def nvfp4_block_scale(amax, multiplier, decode, HARDWARE: tl.constexpr):
    """`(int32 E4M3 code, factor of the values)` of a block, from its amax (no NaN) and the tensor's two factors."""
    code = fp8_code(tl.minimum(amax * multiplier, FLOAT_MAX), False, HARDWARE).to(tl.int32)
    # A scale of 0 gives Inf, which is cut to the largest float.
    return code, tl.minimum(reciprocal(e4m3_value(code) * decode, HARDWARE), FLOAT_MAX)


@triton.jit
def _with_sign(code, bits):
    """The last 3 bits of `code` below the sign of the fp32 `bits`: a shift and one three-way logical instruction."""
    sign = bits >> 28
    return sign ^ ((sign ^ code) & 7)


@triton.jit
def e2m1_code(x, HARDWARE: tl.constexpr):
    """fp32 to the uint32 code of the nearest E2M1 value (ties to even): saturating, -0 is 8 and NaN is 7.

    The steps of E2M1 are 0.5 below 2, 1 below 4 and 2 above. Adding 2^22 times the power of two leaves room for just
    that step, so that the addition itself rounds, once. The last bits of the sum count steps from that power of two;
    two more steps, and twice the exponent with its bias of 127, make them the code modulo 8.
    """
    limited = tl.minimum(tl.abs(x), 6.0)  # of NaN and 6: 6
    bits = x.to(tl.uint32, bitcast=True)
    if not HARDWARE:
        limited = tl.where(x == x, limited, 6.0)
        bits = tl.where(x == x, bits, 0)  # on the device a product that is NaN has no sign
    power_bits = tl.maximum(limited, 1.0).to(tl.uint32, bitcast=True) & _INF_BITS
    rounded = tl.fma(power_bits.to(tl.float32, bitcast=True), 4194305.0, limited)  # 2^22 + 1: a product without error
    return _with_sign(rounded.to(tl.uint32, bitcast=True) + (power_bits >> 22), bits)


@triton.jit
def e2m1_code_stochastic(x, random, HARDWARE: tl.constexpr):
    """fp32 to the uint32 code of one of the two neighbouring E2M1 values. `random`: int32 in [0, 256)."""
    limited = tl.minimum(tl.abs(x), 6.0)
    bits = x.to(tl.uint32, bitcast=True)
    if not HARDWARE:
        limited = tl.where(x == x, limited, 6.0)
        bits = tl.where(x == x, bits, 0)
    step = tl.maximum(limited.to(tl.int32, bitcast=True) & _INF_BITS, 0x3F800000)
    step = (step - (1 << 23)).to(tl.float32, bitcast=True)
    shifted = limited + (random.to(tl.float32) * 0.00390625) * step
    exponent_bits = tl.maximum(shifted.to(tl.int32, bitcast=True) & _INF_BITS, 0x3F800000)
    # 2 / 2^exponent: an exact factor, so the truncation counts whole steps.
    per_step = ((255 << 23) - exponent_bits).to(tl.float32, bitcast=True)
    code = (shifted * per_step).to(tl.int32) + ((exponent_bits >> 22) - 254)
    return _with_sign(code.to(tl.uint32, bitcast=True), bits)

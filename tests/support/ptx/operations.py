"""The arithmetic instructions of PTX, on numpy arrays with one element a thread.

  OPERATIONS[opcode without its types]: a function of the types and of the operands, which are arrays of the last type.
  Approximate instructions (APPROXIMATE) have the largest error that their documentation allows. The bits of the result decide
  its sign, unless `error_sign` sets one sign for all.
  Rounding is to nearest even. Subnormals are kept, except with .ftz. A NaN is quiet, of any payload.
  Other instructions raise an error: fp64 except for those in EXACT; packed or 16-bit floats except for max and min.

Not here: memory, branches, and what threads exchange (machine.py).
"""

from __future__ import annotations

from functools import cache, partial, reduce

import numpy as np

TYPES = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "f32x2": np.uint64,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
APPROXIMATE = {"ex2": 2, "div": 2}  # units in the last place
WIDE = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
EXACT = "add", "sub", "mul", "div", "abs", "neg", "min", "max"  # of fp64: as IEEE 754 has them
SMALLEST = np.float32(2.0**-126)
error_sign = 0  # of every approximate instruction: -1, 1, or 0: by the bits of the result


def flush(x):
    """Subnormal fp32 to zero of the same sign."""
    small = np.abs(x) < SMALLEST
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x


def approximate(exact, ulps: int):
    """fp64 to fp32, up to `ulps` units in the last place away from it."""
    rounded = exact.astype(np.float32)
    sign = error_sign or np.where((rounded.view(np.uint32) * np.uint32(2654435761)) >> 31, 1.0, -1.0)
    wrong = exact + sign * (ulps - 0.5) * np.spacing(np.abs(rounded)).astype(np.float64)
    return np.where(np.isfinite(rounded) & (rounded != 0), wrong, exact).astype(np.float32)


def bf16_to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def convert(types, *operands):
    """cvt.to.from, with rounding to nearest; with two operands, the first in the upper half."""
    to, origin = types[-2:]
    if to.endswith("x2"):
        high, low = (convert((to[:-2], origin), x).astype(np.uint32) for x in operands)
        return high << 16 | low
    (x,) = operands
    if origin == "bf16":
        x, origin = bf16_to_float(x), "f32"
    if to == "bf16":
        return float_to_bf16(x.astype(np.float32))
    if to == "f16":
        return x.astype(np.float16).view(np.uint16)
    if to[0] in "us" and origin[0] == "f":
        if "rzi" not in types:
            raise NotImplementedError("cvt of a float to an integer, but towards zero")
        return np.trunc(x).astype(TYPES[to])
    return x.astype(TYPES[to])


def compare(comparison):
    is_unordered = comparison[-1] == "u" and comparison[:-1] in COMPARE  # true of NaN as well
    function = COMPARE.get(comparison[:-1] if is_unordered else comparison)

    def compared(types, a, b):
        if types[-1] == "bf16":
            a, b = bf16_to_float(a), bf16_to_float(b)
        if function is not None and not is_unordered and (comparison != "ne" or a.dtype.kind != "f"):
            return function(a, b)  # numpy, too, compares NaN to nothing; only that it is unequal to all
        unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.False_
        if function is None:
            return unordered if comparison == "nan" else ~unordered
        result = function(a, b)
        return result | unordered if is_unordered else result & ~unordered

    return compared


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def shift(function):
    """Shifts of the width of the type or more leave nothing but the sign."""

    def shifted(types, a, count):
        bits = 8 * a.dtype.itemsize
        if not count.ndim and count < bits:
            return function(a, a.dtype.type(count))
        count = np.asarray(count).astype(np.uint32)
        if a.dtype.kind == "i":
            return function(a, np.minimum(count, bits - 1).astype(a.dtype))
        return np.where(count < bits, function(a, np.minimum(count, bits - 1).astype(a.dtype)), 0).astype(a.dtype)

    return shifted


def fma(types, a, b, c):
    """The product of two fp32 is exact in fp64. The sum is rounded there too, so that rarely the last bit is not a GPU's."""
    exact = a.astype(np.float64)
    exact *= b  # in place, where it is no scalar
    exact += c
    return exact.astype(np.float32)


def divide(types, a, b):
    if types[-1] == "f32" and "rn" not in types:
        return approximate(a.astype(np.float64) / b, APPROXIMATE["div"])
    if types[-1] in ("f32", "f64"):
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))  # PTX rounds towards zero
    return (np.sign(a).astype(np.int64) * np.sign(b) * quotient).astype(a.dtype)


def exponential(types, a):
    assert "ftz" in types, "ex2 without .ftz"
    return np.where(a == 0, np.float32(1), approximate(np.exp2(a.astype(np.float64)), APPROXIMATE["ex2"]))


def minimum_xorsign(types, a, b):
    smaller = np.fmin(np.abs(a), np.abs(b))
    return np.copysign(smaller, np.where(np.signbit(a) ^ np.signbit(b), -1, 1).astype(a.dtype))


def bit_field(types, a, start, length):
    """Bits start .. start + length - 1, as a number of that many bits."""
    low = a.view(np.uint32) << np.uint32(32 - start - length) if length else np.zeros_like(a, np.uint32)
    return low.view(a.dtype) >> a.dtype.type(32 - length) if length else low.view(a.dtype)


def permute(types, a, b, selector):
    """Byte i of the result is byte selector[i] of b:a; with bit 3 of it, its sign eight times."""
    whole = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.zeros_like(whole, np.uint32)
    for i in range(4):
        pick = int(selector) >> 4 * i & 15
        byte = (whole >> np.uint64(8 * (pick & 7))).astype(np.uint32) & np.uint32(255)
        if pick & 8:
            byte = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= byte << np.uint32(8 * i)
    return result


def count_ones(types, a):
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, a.dtype.itemsize)
    return np.unpackbits(octets, axis=-1).sum(-1).astype(np.uint32)


def over_operands(function):
    """Of two operands, or three from sm_100 on."""
    return lambda types, *operands: reduce(function, operands)


def magnitude(types, a):
    """Without the sign; of two 16-bit floats in a word, and of one in its bits, by the bits."""
    if types[-1] in ("bf16", "f16x2", "bf16x2"):
        return a & a.dtype.type(0x7FFF if types[-1] == "bf16" else 0x7FFF7FFF)
    return np.abs(a)


def packed(name, kind, *words):
    """The largest or smallest of 16-bit floats, each half of the words by itself."""
    halves = [np.ascontiguousarray(x).view(np.uint16) for x in np.broadcast_arrays(*words)]  # a constant is one word
    if kind == "bf16":
        return float_to_bf16(OPERATIONS[name]((), *map(bf16_to_float, halves))).view(np.uint32)
    return OPERATIONS[name]((), *(x.view(np.float16) for x in halves)).view(np.uint32)


@cache
def operation(name, types):
    """The operation of that name: a function of values read as arrays of the last type."""
    kind, function = types[-1], OPERATIONS[name]
    if kind == "bf16" and name in ("min", "max", "min.NaN", "max.NaN"):
        return lambda *values: float_to_bf16(function(types, *map(bf16_to_float, values)))
    if kind in ("f16x2", "bf16x2") and name in ("min", "max"):
        return lambda *values: packed(name, kind[:-2], *values)
    is_exact = name in ("cvt", "selp", "abs") or (kind == "f16" and name in ("min", "max")) or (kind == "f64" and name in EXACT)
    if kind in ("f64", "f16", "bf16", "f16x2", "bf16x2") and not is_exact:
        raise NotImplementedError(f"{name} of {kind}")
    if "ftz" in types and name != "cvt":
        return lambda *values: flush(function(types, *map(flush, values)))
    return partial(function, types)


def wide(a, types):
    return a.astype(WIDE[types[-1]])


OPERATIONS = {
    "add": lambda types, a, b: a + b,
    "sub": lambda types, a, b: a - b,
    "mul": lambda types, a, b: a * b,
    "mul.lo": lambda types, a, b: a * b,
    "mul.hi": lambda types, a, b: (wide(a, types) * wide(b, types) >> 32).astype(a.dtype),
    "mul.wide": lambda types, a, b: wide(a, types) * wide(b, types),
    "mad.lo": lambda types, a, b, c: a * b + c,
    "mad.wide": lambda types, a, b, c: wide(a, types) * wide(b, types) + c.view(WIDE[types[-1]]),
    "fma": fma,
    "div": divide,
    "ex2": exponential,
    "neg": lambda types, a: -a,
    "abs": magnitude,
    "max.relu": lambda types, a, b: np.maximum(np.maximum(a, b), a.dtype.type(0)),
    "min": over_operands(np.fmin),  # of a number and NaN: the number
    "max": over_operands(np.fmax),
    "min.NaN": over_operands(np.minimum),  # NaN
    "max.NaN": over_operands(np.maximum),
    "min.xorsign.abs": minimum_xorsign,
    "and": lambda types, a, b: a & b,
    "or": lambda types, a, b: a | b,
    "xor": lambda types, a, b: a ^ b,
    "not": lambda types, a: ~a,
    "shl": shift(np.left_shift),
    "shr": shift(np.right_shift),
    "bfe": bit_field,
    "prmt": permute,
    "popc": count_ones,
    "selp": lambda types, a, b, p: np.where(p, a, b),
    "cvt": convert,
}

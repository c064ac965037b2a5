"""Loads a lane's logits, two 16-bit logits a word; finds the largest and the smallest; converts them to fp32.

  A word holds the logits v (lower half) and v + 1 (upper half), v even.
  bf16 to fp32 takes one instruction a logit: `word << 16`, or the upper half as it stands in memory.
  With PACKED the largest (smallest) logit of words is found in 16 bits, two logits an instruction, by `max.bf16x2` of PTX;
  ptxas joins two of them to one instruction of three operands on sm_90. Without it: in fp32, one logit an instruction.

Why registers: an axis of VEC logits in one thread is summed as a tree at the end of an iteration. Separate tensors of
shape (LANES,) are summed in one chain of fused multiply-adds.

Not here: what is computed from the logits (score.py). Tests: tests/kernels/test_score.py.
"""

# ruff: noqa: RET505, SIM300  (triton compiles what follows a return, but not the branch that a constant excludes)
import triton
import triton.language as tl


@triton.jit
def _columns(x, N: tl.constexpr):
    # (LANES, N) -> N tensors (LANES,), those of even columns first; every number stays in its thread
    if N == 1:
        return (tl.reshape(x, (x.shape[0],)),)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], N // 2, 2)))
        return _columns(even, N // 2) + _columns(odd, N // 2)


@triton.jit
def _load_logits(row_ptr, first, R: tl.constexpr, STEP: tl.constexpr, VEC: tl.constexpr):
    # In every lane the VEC logits from `first` on, and those STEP, 2 STEP, .. further: R VEC tensors (LANES,) of fp32, or
    # half as many words. `first` is a multiple of VEC; with words the row starts at a multiple of 4 bytes.
    out = ()
    if row_ptr.dtype.element_ty != tl.float32 and VEC > 1:
        row_ptr = row_ptr.to(tl.pointer_type(tl.int32))
        for r in tl.static_range(R):
            offs = (first // 2 + r * (STEP // 2))[:, None] + tl.arange(0, VEC // 2)[None, :]  # (LANES, VEC / 2)
            out = out + _columns(tl.load(row_ptr + offs), VEC // 2)
    else:
        for r in tl.static_range(R):
            offs = (first + r * STEP)[:, None] + tl.arange(0, VEC)[None, :]  # (LANES, VEC)
            out = out + _columns(tl.load(row_ptr + offs).to(tl.float32), VEC)
    return out


@triton.jit
def _lower(word, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _upper(word, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_words(row_ptr, b, N: tl.constexpr):
    # (N,) fp32: block b of N 16-bit logits, read as words
    words = tl.load(row_ptr.to(tl.pointer_type(tl.int32)) + (b * (N // 2) + tl.arange(0, N // 2)))
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    return tl.reshape(tl.join(_lower(words, DTYPE), _upper(words, DTYPE)), (N,))


@triton.jit
def _widen(x, DTYPE: tl.constexpr, VEC: tl.constexpr):
    # words of one load after the other -> fp32 logits in the order of `_columns`; fp32 logits stay
    if x[0].dtype != tl.int32:
        return x
    else:
        out = ()
        for first in tl.static_range(0, len(x), VEC // 2):
            for i in tl.static_range(VEC // 2):
                out = out + (_lower(x[first + i], DTYPE),)
            for i in tl.static_range(VEC // 2):
                out = out + (_upper(x[first + i], DTYPE),)
        return out


@triton.jit
def _packed_max(a, b, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def _packed_min(a, b, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def _largest(x, DTYPE: tl.constexpr, VEC: tl.constexpr, PACKED: tl.constexpr):
    # (LANES,) fp32: the largest logit of each lane. NaN is passed over.
    if PACKED and x[0].dtype == tl.int32:
        top = x[0]
        for i in tl.static_range(1, len(x)):
            top = _packed_max(top, x[i], DTYPE)
        return tl.maximum(_lower(top, DTYPE), _upper(top, DTYPE))
    else:
        z = _widen(x, DTYPE, VEC)
        top = z[0]
        for i in tl.static_range(1, len(z)):
            top = tl.maximum(top, z[i])
        return top


@triton.jit
def _first_minimum(low, DTYPE: tl.constexpr, VEC: tl.constexpr, PACKED: tl.constexpr):
    # what `_running_minimum` starts with: logits `low` (LANES,) of fp32, or words that hold them twice
    if PACKED and DTYPE != tl.float32 and VEC > 1:
        half = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        return (half << 16) | (half & 0xFFFF)
    else:
        return low


@triton.jit
def _running_minimum(low, x, DTYPE: tl.constexpr, VEC: tl.constexpr):
    # the smaller of `low` and the smallest logit of each lane; of words, of each half
    if low.dtype == tl.int32:
        for i in tl.static_range(len(x)):
            low = _packed_min(low, x[i], DTYPE)
    else:
        z = _widen(x, DTYPE, VEC)
        for i in tl.static_range(len(z)):
            low = tl.minimum(low, z[i])
    return low


@triton.jit
def _last_minimum(low, DTYPE: tl.constexpr):
    # (LANES,) fp32 of a running minimum
    if low.dtype == tl.int32:
        return tl.minimum(_lower(low, DTYPE), _upper(low, DTYPE))
    else:
        return low

"""Triton's interpreter, put right where it rounds differently from every GPU, and quickened; conftest.py imports it.

  fp32 -> bf16: a GPU rounds to nearest even, the interpreter truncates (twice the error).
  fma(x, y, z): a GPU rounds once, the interpreter before triton 3.9 rounds the product too: for logits of size 300 an
  error of 1.5e-5.
  maximum, minimum, clamp: a GPU returns the number where one operand is NaN, the interpreter before triton 3.9 the NaN.
  At each call of a device function it looks for what to patch among all names of triton.language: half of the time of a
  test. What there is to patch does not change, so it is looked up once.

Not here: kernels or tests.
"""

import inspect
from functools import cache
from importlib.metadata import version

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_cast = _Builder.cast_impl


def _cast_impl(self, src, dst_type):
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.float32, tl.bfloat16):
        data = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    elif kinds == (tl.bfloat16, tl.float32):
        data = (src.data.astype(np.uint32) << 16).view(np.float32)
    else:
        return _cast(self, src, dst_type)
    return interpreter.TensorHandle(data, dst_type.scalar)


def _create_fma(self, x, y, z):
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _create_clampf(self, x, low, high, propagate_nans):
    assert propagate_nans == interpreter._ir.PROPAGATE_NAN.NONE
    return self.binary_op(self.binary_op(x, low, np.fmax), high, np.fmin)


@cache
def _builtins(package):
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package, builder, *scope):
    for name, member in _builtins(package):
        if getattr(package, name) is member:  # not patched by an outer call
            interpreter._patch_attr(package, name, member, builder, *scope)


_Builder.cast_impl = _cast_impl
interpreter._patch_builtin = _patch_builtin
if tuple(int(x) for x in version("triton").split(".")[:2]) < (3, 9):
    _Builder.create_fma = _create_fma
    _Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    _Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    _Builder.create_clampf = _create_clampf

"""Imports the benchmarks' own kernel as `kernels.use` imports the library's: compiled, unless all kernels are interpreted."""

import importlib
import os
from unittest.mock import patch

from tests.support import kernels

with patch.dict(os.environ, TRITON_INTERPRET="1" if kernels.IS_INTERPRETED else "0"):
    importlib.import_module("benchmarks.gpu.read")

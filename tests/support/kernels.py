"""How Triton kernels run in the tests, by the variable OPD_KERNELS: compiled for a GPU (sm_90 unless another is named), their
PTX run on the CPU (ptx/), or `interpreter`, by Triton's own (interpreter.py), which takes twenty times as long.

Every process of the tests calls `use` before it imports kernels.
"""

import os

TARGET = os.environ.get("OPD_KERNELS", "sm_90")
IS_INTERPRETED = TARGET == "interpreter"


def use() -> None:
    os.environ["TRITON_INTERPRET"] = "1" if IS_INTERPRETED else "0"  # read when triton is imported
    if IS_INTERPRETED:
        from tests.support import interpreter  # noqa: F401
    else:
        from tests.support.ptx import driver

        driver.use(TARGET)

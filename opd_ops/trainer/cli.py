"""`opd-train`: the reference trainer from the command line, alone or under `accelerate launch -m opd_ops.trainer.cli`.

Not here: its options (config.py), the run (loop.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opd_ops.trainer.config import read_config
from opd_ops.trainer.lost_processes import LostProcessError
from opd_ops.trainer.servers.retries import ServerError


def main(arguments: Sequence[str] | None = None) -> None:
    """Read and check the options, then train. As many errors as possible come before a model loads.

    Expected errors are one line. An unexpected one during the training keeps its traceback.
    """
    try:
        config = read_config(arguments)
        from opd_ops.trainer.loop import OPDTrainer  # takes seconds to import, so only after the options are checked

        run = OPDTrainer(config)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; opd-train needs what pip install 'opd-ops[train]' installs")
    except (ValueError, OSError, ServerError) as error:
        sys.exit(_in_one_line(error))
    try:
        run.train()
    except (FloatingPointError, ServerError, LostProcessError) as error:
        sys.exit(_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    return f"error: {' '.join(str(error).split())}"  # also if a library's error has several lines


if __name__ == "__main__":
    main()

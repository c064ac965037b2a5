# `opd-train`: the reference trainer from the command line, alone or under `accelerate launch -m opd_ops.trainer.cli`.
#
# Not here: its options (config.py), the run (loop.py).
from __future__ import annotations

import sys
from collections.abc import Sequence

from opd_ops.trainer.config import read_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Read and check the options, then train; what can be refused is refused before a model loads."""
    config = read_config(arguments)
    from opd_ops.trainer.loop import OPDTrainer  # seconds to import, so only once the options have been found good

    try:
        OPDTrainer(config).train()
    except (ValueError, ModuleNotFoundError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

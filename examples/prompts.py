"""The fixed texts of the examples: the teacher's instruction, the questions to train on, the questions held out.

  The instruction was chosen because a 135M model follows it visibly; most others it barely follows.
  No held-out question is a rewording of a training question, and both sets cover the same everyday subjects.

Not here: how they are put to the model (opd_ops/trainer/rollouts.py), what is done with them (prompt_distillation.py).
"""

from pathlib import Path

from opd_ops.trainer.prompts import load_prompts

INSTRUCTION = "You are a pirate. Answer like a pirate, with 'Arrr' and 'matey'."
TRAINING = tuple(load_prompts(Path(__file__).with_name("training.jsonl")))
HELD_OUT = tuple(load_prompts(Path(__file__).with_name("held_out.jsonl")))

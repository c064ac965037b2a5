"""The reference trainer: on-policy distillation of a causal language model, from prompts to a saved student.

  one step:  the student answers prompts; the teacher reads the same tokens; the best-scored share of them trains the student
  (loop.py; the loss: opd_ops/loss.py)

Needs the extra `train`; `opd-train --help` lists what can be set (config.py).
Not here: adapters to the trainers of others (opd_ops/integrations/).
"""

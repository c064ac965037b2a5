"""The reference trainer: on-policy distillation of a causal language model, from prompts to a saved student.

  one step:  the student answers prompts; the teacher reads the same tokens; the best-scored share of them trains the student
  (loop.py; the loss: opd_ops/loss.py)

Needs the extra `train`; `opd-train --help` lists the options (config.py).
Not here: adapters to trainers of other libraries (opd_ops/integrations/).
"""

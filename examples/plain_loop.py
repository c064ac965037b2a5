"""A plain PyTorch loop, teacher to smaller student: SmolLM2-135M teaches a copy of itself that lost every third layer.

  loss = 1/|M| sum_{t in M} KL(student || teacher) on the student's own answers; M: the best-scored fifth of their tokens
  (arXiv 2605.26844, eqs. 6, 12, 13)

You will see: every few steps the mean KL over all sampled tokens, 4.5 nats at first and 2.4 after 16 steps, and how many
  tokens were trained on. On 2 CPU cores, in two and a half minutes. Run: python -m examples.plain_loop [STEPS]

Not here: evaluation on held-out questions and pictures (prompt_distillation.py).
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from examples import smollm2
from examples.prompts import TRAINING
from opd_ops import selective_opd_loss
from opd_ops.trainer.rollouts import head_over, sample


def without_every_third_layer(model: nn.Module) -> nn.Module:
    """A copy with fewer layers, numbered anew: a cache goes by their numbers."""
    student = copy.deepcopy(model).requires_grad_()
    student.model.layers = nn.ModuleList(layer for i, layer in enumerate(student.model.layers) if i % 3 != 1)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    student.config.num_hidden_layers = len(student.model.layers)
    return student


def train(
    teacher: nn.Module, tokenizer: object, steps: int, n_questions: int = 6, n_tokens: int = 32
) -> tuple[nn.Module, list[float]]:
    """The student, and the KL of every step in nats a token."""
    torch.manual_seed(0)
    student, kls = without_every_third_layer(teacher), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    for step in range(steps):
        first = step * n_questions % len(TRAINING)
        rollouts = sample(student, tokenizer, (TRAINING * 2)[first : first + n_questions], max_new_tokens=n_tokens)
        with torch.no_grad():
            teacher_head = head_over(teacher, tokenizer, rollouts)
        out = selective_opd_loss(head_over(student, tokenizer, rollouts), teacher_head, mask=rollouts.mask, fraction=0.2)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kls.append(out.metrics["kl_all"].item())
        if step % 4 == 3 or step == 0:
            n_selected, n_valid = int(out.metrics["n_selected"]), int(out.metrics["n_valid"])
            print(f"step {step + 1:3}: KL {kls[-1]:.2f} nats a token, trained on {n_selected} of {n_valid}", flush=True)
    return student, kls


if __name__ == "__main__":
    train(*smollm2.load_model(), steps=int(sys.argv[1]) if len(sys.argv) > 1 else 16)

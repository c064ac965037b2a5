"""Two models of which every rank holds a part: inputs of the tests of shared-out vocabularies.

Not here: the ranks (ranks.py), what is compared (inputs/test_vocabulary.py, backends/shared/test_joined.py).
"""

import math
from dataclasses import replace

import torch

from opd_ops import (
    JSD,
    EntropyAware,
    LocalSupport,
    Power,
    SampledToken,
    SkewKL,
    TailAware,
    TopK,
    TopKForwardKL,
    TotalVariation,
)
from tests.support.cases import generator, head_pair, leaf, leaf_head, logit_pair

VOCAB = 97
CUTS = {"uneven": (30, 7, 41, 19), "empty": (60, 0, 37, 0), "narrow": (5, 86, 3, 3)}
SHAPE = (3, 9)
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "jsd": JSD(0.3),
    "total_variation": TotalVariation(),
    "skew_kl": SkewKL(0.3),
    "power": Power(0.7),
    "local_support": LocalSupport(top_k=8),
    "tail_aware": TailAware(top_k=8),
    "forward_kl_topk": TopKForwardKL(top_k=8),
    "sampled": SampledToken(clip=3.0),
    "entropy_aware": EntropyAware(tau=0.1, top_k=8),
    "topk_student": TopK("reverse", "student", "sampled", 8),
    "topk_union": TopK("jsd", "union", "bucket", 8),
}


def cut(side, widths, rank, *, requires_grad=False):
    """A rank's part of a side: a leaf of its own."""
    first = sum(widths[:rank])
    part = slice(first, first + widths[rank])
    if isinstance(side, torch.Tensor):
        got = side[..., part].clone()
        return got.requires_grad_() if requires_grad else got
    bias = None if side.bias is None else side.bias[part].clone()
    got = replace(side, hidden=side.hidden.clone(), weight=side.weight[part].clone(), bias=bias)
    return leaf_head(got) if requires_grad else got


def sides_of(kind, dtype=torch.float32, seed=0):
    if kind == "logits":
        student, teacher = logit_pair(math.prod(SHAPE), VOCAB, noise=1.5, seed=seed, dtype=dtype)
        return student.view(*SHAPE, VOCAB), teacher.view(*SHAPE, VOCAB)
    softcap, scale = (20.0, 0.9) if kind == "softcap" else (None, 1.0)
    return head_pair(SHAPE, VOCAB, bias=True, softcap=softcap, scale=scale, seed=seed, dtype=dtype)


def leaf_side(side):
    return leaf(side) if isinstance(side, torch.Tensor) else leaf_head(side)


def gradients_of(side):
    tensors = [side] if isinstance(side, torch.Tensor) else [side.hidden, side.weight, side.bias]
    return [None if x is None else x.grad for x in tensors]


def options_of(**more):
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[0, 5:] = False
    if more.get("backend") == "triton":
        mask[0, 2:] = mask[1:, 4:] = mask[1, :2] = False
    tokens = torch.randint(0, VOCAB, SHAPE, generator=generator(5))
    return {"mask": mask, "tokens": tokens, "fraction": 0.3, "top_k": 6, "backend": "torch"} | more

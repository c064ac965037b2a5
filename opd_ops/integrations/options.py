"""Options of the loss, tried on a few random logits before a run that would first use them when its models are loaded.

  Whatever the loss refuses is refused here, in its words; a name it does not have, or one that the host passes, as TypeError.

What belongs to a run's own data cannot be tried and is taken as it comes: tensors, statistics of rollouts, selectors that are
callables, the reference of `Extrapolated`, process groups, and whether this machine has what a backend needs.
Here, too, what an evaluation puts in the place of the options that select.
Not here: the checks themselves (opd_ops/call/checks.py and its neighbours), the loss (opd_ops/loss.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_ops.arguments import plain
from opd_ops.backends.interface import check_backend
from opd_ops.call.checks import check_choice, check_generator, check_threshold
from opd_ops.divergences import Divergence, Extrapolated
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.teacher_lists import TopKLogprobs
from opd_ops.loss import selective_opd_loss
from opd_ops.scoring import SCORE_DTYPES

SHAPE = (1, 4)  # positions
VOCABULARY = 256
# Of an evaluation: every valid token of this process, whatever is selected in training. All options that select are here.
EVERY_TOKEN = {"fraction": 1.0, "selector": "all", "threshold": None, "scope": "batch", "selection_group": None}
LARGEST_VOCABULARY = 2**19  # beyond every tokenizer; a number above it is refused as it would be by a model


def try_options(
    options: Mapping[str, Any],
    *,
    given: Sequence[str],
    function: Callable[..., Any] = selective_opd_loss,
    teacher_top_k: int | None = None,
) -> None:
    """Calls `function` with the options on random logits, on the CPU and without touching torch's own generators.

    Args:
        given: Names of the arguments that the host passes itself, so that the options must not.
        teacher_top_k: Length of the lists of a teacher that sends those; None: the teacher has logits.
    Raises: TypeError: an option that there is not, or one that the host passes. Whatever `function` raises.
    """
    known = [name for name in inspect.signature(function).parameters if name not in ("student", "teacher", *given)]
    for name in options:
        if name in given:
            raise TypeError(f"{name}: got it among the options of the loss, but the trainer passes its own; leave it out")
        if name not in known:
            raise TypeError(f"options of the loss: got {name!r}, expected some of: {', '.join(known)}")
    tried = {name: value for name, value in options.items() if not isinstance(value, (Tensor, StudentStats))}
    vocabulary = _vocabulary(tried)
    generator = torch.Generator().manual_seed(0)
    size = (*SHAPE, vocabulary)
    student, teacher = (torch.randn(size, generator=generator, device="cpu", dtype=torch.float32) for _ in range(2))
    taught: Any = teacher
    if teacher_top_k is not None:
        best = torch.log_softmax(teacher, -1).topk(min(teacher_top_k, vocabulary))
        taught = TopKLogprobs(best.indices, best.values)
    elif isinstance(tried.get("divergence"), Extrapolated):
        tried["divergence"] = tried["divergence"].divergence
    if callable(tried.get("selector")):
        del tried["selector"]
    check_generator(tried.pop("generator", None))
    check_backend(tried.pop("backend", "auto"))
    score_dtype = tried.pop("score_dtype", None)
    if score_dtype is not None:
        check_choice("score_dtype", score_dtype, tuple(SCORE_DTYPES))
        check_threshold(tried.get("threshold"), score_dtype)
    tried.pop("inplace_backward", None)  # asks for a GPU
    for name in ("process_group", "selection_group"):  # other ranks need not be here
        tried.pop(name, None)
    if tried.get("scope") == "global":
        tried["scope"] = "batch"
    own = {"backend": "eager", "generator": generator} | {name: made for name, made in _made().items() if name in given}
    function(student, taught, **tried, **{name: value for name, value in own.items() if name in (*known, *given)})


def _made() -> dict[str, Any]:
    """What a host would pass, for the positions of the trial."""
    ones, zeros = torch.ones(SHAPE, device="cpu"), torch.zeros(SHAPE, dtype=torch.long, device="cpu")
    made: dict[str, Any] = dict.fromkeys(("labels", "shift_labels", "tokens"), zeros)
    made |= {"mask": ones, "weights": ones, "num_items_in_batch": ones.numel(), "temperature": 1.0}
    return made | {"cu_seqlens": torch.tensor([0, ones.numel()], device="cpu")}


def _vocabulary(options: Mapping[str, Any]) -> int:
    """Entries enough for every id and length that the options name."""
    divergence, ids = options.get("divergence"), options.get("eos_ids", ())
    support = divergence.support if isinstance(divergence, Divergence) else None
    asked = [plain(options.get("top_k")), plain(options.get("vocab_size")), None if support is None else support.length]
    if isinstance(ids, Sequence) or getattr(ids, "ndim", 0) == 1:  # NumPy's, too
        asked += [i + 1 for i in map(plain, ids) if isinstance(i, int)]
    sizes = [size for size in asked if isinstance(size, int)]
    return min(max(VOCABULARY, *sizes), LARGEST_VOCABULARY) if sizes else VOCABULARY

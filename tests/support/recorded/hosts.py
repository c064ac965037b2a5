"""Every integration, on its host's own types: TRL, Hugging Face's Trainer, verl, NeMo-RL, and the reference trainer.

Models, batches and runs are those that the tests of each integration make (tests/integrations, tests/trainer). A host is
imported when its first call runs.
Not here: the loss alone (calls.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_ops import Settings, selective_opd_loss
from tests.support.cases import generator, head_pair, leaf, logit_pair
from tests.support.recorded.case import Custom, as_leaf, gradients

DIVERGENCES_OF_LISTS = ("forward_kl_topk", "local_support", "tail_aware")


def cases() -> Iterator[Custom]:
    yield from trl_cases()
    yield from hf_cases()
    yield from verl_cases()
    yield from nemo_rl_cases()
    for label, more in {"default": {}, "jsd": {"divergence": "jsd", "selector": "random"}}.items():
        words = f"the reference trainer: 2 steps of 2 micro-batches, 2 evaluations, {more or 'default selection'}"
        yield Custom(f"trainer/{label}", words, partial(reference_trainer, more))


def parameters(model: torch.nn.Module) -> dict[str, Any]:
    return {f"parameter.{name}": x for name, x in model.named_parameters() if x.requires_grad}


def logged(rows: list[dict[str, Any]], among: tuple[str, ...]) -> dict[str, Any]:
    """What each step logged; no times."""
    numbers = ((f"log{i}.{name}", x) for i, row in enumerate(rows) for name, x in row.items())
    return {name: x for name, x in numbers if name.split(".", 1)[1] in among or "opd/" in name}


def forget_settings() -> None:
    """accelerate settles precision once a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_cases() -> Iterator[Custom]:
    for label, more in {
        "default": {},
        "all": {"fraction": 1.0},
        "sequence": {"fraction": 0.25, "scope": "sequence", "selector": "entropy"},
        "forward_kl": {"fraction": 0.3, "divergence": "forward_kl", "denominator": "valid"},
    }.items():
        for beta in (0.3, 1.0):
            words = f"TRL's loss hook of DistillationTrainer under patch_trl({more}), beta={beta}"
            yield Custom(f"trl/hook/{label}/{beta}", words, partial(trl_hook, beta, more))
        words = f"2 steps of TRL's trainer: SelectiveDistillationTrainer, {more or 'default selection'}"
        yield Custom(f"trl/trainer/{label}", words, partial(trl_trainer, more))
    for beta in (0.0, 0.3, 1.0):
        for label, more in {"mean": {}, "sum": {"reduction": "sum"}, "items": {"num_items_in_batch": 50}}.items():
            words = f"generalized_jsd_loss of GKD, beta={beta}, fraction=0.3, {more}"
            yield Custom(f"trl/generalized_jsd_loss/{beta}/{label}", words, partial(gkd, beta, more))


def trl_hook(beta: float, more: dict[str, Any]) -> dict[str, Any]:
    from trl.trainer import distillation_trainer

    from opd_ops.integrations.trl import patch_trl

    student, teacher = head_pair((2, 8), 64, bias=True)
    trained = as_leaf(student)
    mask = torch.ones(2, 8)
    mask[0, 6:] = 0
    metrics: list[dict[str, Any]] = []
    with patch_trl(on_metrics=metrics.append, **more):
        loss, entropy, n_valid = distillation_trainer._chunked_divergence_loss(
            trained.hidden,
            teacher.hidden,
            trained.weight,
            teacher.weight,
            mask,
            beta,
            num_items_in_batch=20,
            student_lm_head_bias=trained.bias,
            teacher_lm_head_bias=teacher.bias,
            student_logit_scale=0.9,
            teacher_final_logit_softcapping=30.0,
            temperature=0.8,
        )
    loss.backward()
    return {"loss": loss, "entropy": entropy, "n_valid": n_valid, "metrics": metrics[0], **gradients(trained)}


def trl_trainer(more: dict[str, Any]) -> dict[str, Any]:
    from opd_ops.integrations.trl import SelectiveDistillationConfig, SelectiveDistillationTrainer
    from tests.integrations.test_trl import train

    forget_settings()
    with tempfile.TemporaryDirectory() as folder:
        made = train(folder, trainer=SelectiveDistillationTrainer, config=SelectiveDistillationConfig, accumulation=2, **more)
    return logged(made.state.log_history, ("loss", "grad_norm", "entropy")) | parameters(made.model)


def gkd(beta: float, more: dict[str, Any]) -> dict[str, Any]:
    from opd_ops.integrations.trl import generalized_jsd_loss

    student, teacher = (x.view(3, 10, 97) for x in logit_pair(30, 97, scale=3.0))
    labels = torch.randint(0, 97, (3, 10), generator=generator(0))
    labels[torch.rand(3, 10, generator=generator(1)) < 0.3] = -100
    trained = leaf(student)
    loss = generalized_jsd_loss(trained, teacher, labels, beta=beta, temperature=0.7, fraction=0.3, **more)
    loss.backward()
    return {"loss": loss, "gradient": trained.grad}


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hf_cases() -> Iterator[Custom]:
    for label, more in {"default": {}, "sequence": {"fraction": 0.25, "scope": "sequence", "selector": "entropy"}}.items():
        words = f"2 steps of Trainer: hf.SelectiveDistillationTrainer, settings={more}; and an evaluation"
        yield Custom(f"hf/mixin/{label}", words, partial(hf_mixin, more))
        words = f"2 steps of Trainer with compute_loss_func=SelectiveComputeLoss(student, teacher, {more})"
        yield Custom(f"hf/compute_loss_func/{label}", words, partial(hf_function, more))
    for family in ("qwen2", "gemma2", "granite"):
        words = f"heads.last_hidden and head_of of a tiny {family}, and the loss over its head"
        yield Custom(f"hf/head/{family}", words, partial(hf_head, family))


TRAINER = ("loss", "grad_norm", "eval_loss")


def hf_mixin(more: dict[str, Any]) -> dict[str, Any]:
    from tests.integrations.models import language_model
    from tests.integrations.test_hf import run

    forget_settings()
    with tempfile.TemporaryDirectory() as folder:
        made = run(folder, batch=4, accumulation=2, steps=2, teacher=language_model(2, width=48), settings=Settings(**more))
        made.evaluate()
    return logged(made.state.log_history, TRAINER)


def hf_function(more: dict[str, Any]) -> dict[str, Any]:
    from transformers import Trainer

    from opd_ops.integrations.hf import SelectiveComputeLoss
    from tests.integrations.models import language_model
    from tests.integrations.test_hf import run

    forget_settings()
    student = language_model(1)
    function = SelectiveComputeLoss(student, language_model(2, width=48), **more)
    with tempfile.TemporaryDirectory() as folder:
        made = run(folder, batch=4, steps=2, trainer=Trainer, student=student, compute_loss_func=function)
    function.remove()
    return logged(made.state.log_history, TRAINER) | {"metrics": function.metrics}


def hf_head(family: str) -> dict[str, Any]:
    from opd_ops.integrations.heads import head_of, last_hidden
    from tests.integrations.models import VOCAB, language_model
    from tests.integrations.test_hf import model_of_family

    model = language_model(3).eval() if family == "qwen2" else model_of_family(family)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator(1))
    hidden, _ = last_hidden(model, model, {"input_ids": ids})
    head = head_of(model, hidden)
    teacher = logit_pair(14, VOCAB, seed=2)[1].view(2, 7, VOCAB)
    out = selective_opd_loss(head, teacher, fraction=0.4)
    out.loss.backward()
    trained = {f"gradient.{name}": x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"hidden": hidden, "scale": head.scale, "softcap": head.softcap, "loss": out.loss, **trained}


# --- verl and NeMo-RL ------------------------------------------------------------------------------------------------


def verl_cases() -> Iterator[Custom]:
    for divergence in DIVERGENCES_OF_LISTS:
        for scope in ("batch", "sequence"):
            for alone in (True, False):
                words = (
                    f"verl's distillation_ppo_loss both ways, patch_verl(divergence={divergence}, scope={scope}, fraction=0.25)"
                )
                words += "" if alone else ", log-probabilities share the logits"
                name = f"verl/{divergence}/{scope}/{'alone' if alone else 'shared'}"
                yield Custom(name, words, partial(verl, {"divergence": divergence, "scope": scope}, {}, alone))
    clamps = {"log_prob_min_clamp": -10.0, "loss_max_clamp": 10.0}
    for aggregation in ("token-mean", "seq-mean-token-sum"):
        words = f"the same, fraction=0.25, verl's default clamps, aggregation {aggregation}"
        yield Custom(f"verl/clamps/{aggregation}", words, partial(verl, {}, {"aggregation": aggregation, **clamps}, True))


def verl(more: dict[str, Any], settings: dict[str, Any], alone: bool) -> dict[str, Any]:
    from opd_ops.integrations.verl import patch_verl
    from tests.integrations import test_verl as host

    with patch_verl(fraction=0.25, **more):
        loss, gradient, metrics = host.run(*host.pair(), host.settings(**settings), distillation_only=alone)
    numbers = {name: x.aggregate() if hasattr(x, "aggregate") else x for name, x in metrics.items()}
    return {"loss": loss, "gradient": gradient, "metrics": numbers}


def nemo_rl_cases() -> Iterator[Custom]:
    for divergence in ("local_support", "forward_kl_topk"):
        for label, more in {"default": {}, "sequence": {"fraction": 0.25, "scope": "sequence", "selector": "entropy"}}.items():
            words = f"NeMo-RL's loss contract: SelectiveDistillationLossFn(divergence={divergence}, {more})"
            yield Custom(f"nemo_rl/{divergence}/{label}", words, partial(nemo_rl, {"divergence": divergence, **more}))


def nemo_rl(more: dict[str, Any]) -> dict[str, Any]:
    from tests.integrations import test_nemo_rl as host

    with pytest.MonkeyPatch.context() as patch:  # NeMo-RL itself is not installed: stand-ins of the two types it hands over
        loss, gradient, metrics = host.backward(host.stand_in(patch)(**more), *host.batch())
    return {"loss": loss, "gradient": gradient, "metrics": metrics}


# --- the reference trainer -------------------------------------------------------------------------------------------


def reference_trainer(more: dict[str, Any]) -> dict[str, Any]:
    from tests.trainer.runs import trainer

    forget_settings()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(Path(folder), steps=2, **more)
        last = made.train()
        log = (Path(folder) / "log.jsonl").read_text()
    forget_settings()
    return {"last": last, "log": log, **parameters(made.unwrapped)}

"""The on-policy loop: the student answers, the teacher reads its tokens, the best-scored share of them trains the student.

  loss of a step = sum over its micro-batches and processes of
      sum over selected tokens of the divergence / (n n_selected / n_valid)
  (arXiv 2605.26844, eqs. 6, 12, 13); n: valid tokens of the whole step; n_selected, n_valid: counts of the micro-batch.
  So neither accumulation, the number of processes nor selection changes the size of a step.

Answers are sampled once a step, with the weights that the step updates. A budget is per micro-batch (scope "batch"), per
answer ("sequence"), or over all processes ("global"). Both models run only to their hidden states; logits exist only in blocks
inside the loss, and in the sampler's last row.
Not here: the options (config.py), the prompts and seeds of a step (order.py), the loss (opd_ops/loss.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from transformers import get_scheduler

from opd_ops.call.reduce import SelectiveOPDOutput
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.trainer import evaluation
from opd_ops.trainer.blow_up import are_finite, blow_up
from opd_ops.trainer.checkpoints import FOLDER, TEACHER, TOKENS, Checkpoints, check_resume, choose, save_model
from opd_ops.trainer.config import PASSED_AS_OBJECT, SAME, OPDConfig
from opd_ops.trainer.lost_processes import LostProcesses
from opd_ops.trainer.model_card import describe_teacher, model_card
from opd_ops.trainer.models import load_tokenizer, location, with_padding
from opd_ops.trainer.order import seed_of
from opd_ops.trainer.prompts import Prompt, digest_of, held_out, load_prompts
from opd_ops.trainer.rollouts import Rollouts, context_digest, end_tokens, head_over, in_bf16, seeded
from opd_ops.trainer.runlog import FILE, RunLog, read_rows
from opd_ops.trainer.samplers import (
    LocalSampler,
    ServerSampler,
    check_rollout_server,
    prompts_by_step,
    rollout_server,
    sampling_options,
)
from opd_ops.trainer.self_teacher import SelfTeacher, check_sharded
from opd_ops.trainer.server_faults import JointTeacher, save_after_failure
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.stopping import Stopping
from opd_ops.trainer.student import load_student, make_trainable
from opd_ops.trainer.teachers import LocalTeacher, Teacher, check_teacher, make_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opd_ops.trainer.rollouts import GenerationOptions

MODEL = "model"  # in output_dir
EVAL = "eval_"
MEANS = {  # logged name: (sum of the metric, count that divides it)
    "kl": ("kl_all_sum", "n_valid"),
    "kl_selected": ("kl_selected_sum", "n_selected"),
    "entropy": ("entropy_sum", "n_valid"),
    "teacher_entropy": ("teacher_entropy_sum", "n_valid"),
    "support_mass": ("support_mass_sum", "n_valid"),
    "support_mass_lower_bound": ("support_mass_lower_bound_sum", "n_valid"),
    "kl_sampled": ("kl_sampled_sum", "n_selected"),
    "weight": ("weight_sum", "n_selected"),
}
COUNTS = ("n_valid", "n_selected", "n_infinite", "n_teacher_nonfinite")

_log = logging.getLogger("opd_ops")


class OPDTrainer:
    """A run, from its configuration. An object that is passed too replaces the one that the configuration names.

    Args:
        config: The options; checked here.
        student: A causal language model to train (LoRA and gradient checkpointing are still added by the options).
        tokenizer: The student's tokenizer. Without a padding token it is given its end token as one.
        teacher: `rollouts -> LinearHead (B, L, D) or TopKLogprobs (B, L, K)`, see inputs/teacher_lists.py.
        prompts, eval_prompts: Lists of `Prompt`.
    Raises (before any model loads): ValueError: an invalid option or prompt, a teacher with another vocabulary, a checkpoint of
        another run. ServerError: a server that cannot teach or sample.
    Example:
        >>> OPDTrainer(OPDConfig(student="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-4B", prompts="questions.jsonl")).train()
    """

    def __init__(
        self,
        config: OPDConfig,
        *,
        student: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher: Teacher | None = None,
        prompts: Sequence[Prompt] | None = None,
        eval_prompts: Sequence[Prompt] | None = None,
    ) -> None:
        self.config = config = dataclasses.replace(
            config,
            student=config.student or ("" if student is None else PASSED_AS_OBJECT),
            prompts=config.prompts or ("" if prompts is None else PASSED_AS_OBJECT),
        ).check()
        if config.student == PASSED_AS_OBJECT and tokenizer is None:
            raise ValueError(
                "tokenizer: got none, expected the tokenizer of the student, which is an object; pass tokenizer= too"
            )
        self.folder = Path(config.output_dir)
        holds_run = (self.folder / FILE).exists() or any((self.folder / FOLDER).glob("*")) or (self.folder / MODEL).exists()
        if holds_run and not config.resume:
            raise ValueError(f"output_dir: {self.folder} holds a run; pass resume to continue it, or another folder")
        self.prompts, self.held_out = self._read_prompts(prompts, eval_prompts)
        if teacher is None:
            config.privileged_context().check([*self.prompts, *self.held_out])
        is_student = teacher is None and config.teacher == SAME and not config.teacher_sends_lists
        told = config.privileged_context().prompts(self.prompts) if is_student else []
        if is_student and all(x.messages == prompt.messages for x, prompt in zip(told, self.prompts, strict=True)):
            raise ValueError(
                "teacher: got 'same' and no teacher_system, no teacher_prompt, so that student and teacher are one and there "
                "is nothing to learn; name another teacher, or tell it more"
            )
        self.taught_by = describe_teacher(config) if teacher is None else PASSED_AS_OBJECT

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir: got {config.output_dir!r}, expected a folder ({error.strerror})") from None
        trackers = config.trackers() or None
        # accelerate leaves out a timeout that equals its own default, 600 s, whatever the backend: gloo would then wait 1800 s.
        # So a microsecond is added, which torch rounds away.
        seconds = config.process_timeout
        timeout = None if seconds is None else timedelta(seconds=seconds, microseconds=1)
        # Precision and accumulation are the options' own: by itself accelerate reads both from the launcher's environment.
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=trackers,
            project_dir=str(self.folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
        self.is_sharded = self.accelerator.distributed_type == DistributedType.FSDP
        # An adapter names the folder of its base, and nothing can load a .gguf file by its folder.
        self.merges = config.lora_rank > 0 and "gguf_file" in location(config.student)
        if self.is_sharded:
            check_sharded(config.teacher_weights)
        if self.is_sharded and self.merges:
            raise ValueError(
                f"lora_rank: got {config.lora_rank} for the .gguf file of {config.student!r} under FSDP, which cannot merge "
                "the adapters at the end, expected 0; or save the student as a folder first (load_model, save_pretrained)"
            )
        self.tokenizer = load_tokenizer(config.student) if tokenizer is None else with_padding(tokenizer)
        asked = [*self.prompts, *self.held_out]
        lists = check_teacher(config, self.tokenizer, asked) if teacher is None else None
        contexts = asked if teacher is not None else [*asked, *config.privileged_context().prompts(asked)]
        digests = {"prompts": digest_of(self.prompts), "held-out prompts": digest_of(self.held_out)}
        digests[TOKENS] = context_digest(self.tokenizer, contexts)
        if lists is not None:
            digests[TEACHER] = lists.identity()
        self.start, self.damaged = choose(self.folder / FOLDER, self.accelerator) if config.resume else (None, {})
        n_processes = self.accelerator.num_processes
        self.changed = {} if self.start is None else check_resume(self.start, config, digests, n_processes)
        if (self.folder / FILE).exists():
            read_rows(self.folder / FILE)  # a damaged line is an error before a model loads
        check_rollout_server(config, n_processes, self.tokenizer, self.prompts)
        model = load_student(self.config) if student is None else make_trainable(student, self.config)
        if teacher is None:
            teacher = make_teacher(config, model, self.tokenizer, self.accelerator.device, lists)
        is_alone = n_processes == 1 or isinstance(teacher, (LocalTeacher, SelfTeacher))
        self.teacher = teacher if is_alone else JointTeacher(teacher, self.accelerator)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(parameter.element_size() < 4 for parameter in trained) and self.accelerator.is_main_process:
            _log.warning(
                "dtype: weights of 16 bits are trained, and an update of about learning_rate (%g) rounds to no change where a "
                "weight is large; load them as float32 (dtype float32, or student.float()), and pass mixed_precision bf16",
                config.learning_rate,
            )
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model.train(), optimizer)
        # transformers' "constant" has no warm-up.
        scheduler = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        self.schedule = get_scheduler(scheduler, self.optimizer, config.warmup_steps, config.steps)
        self.accelerator.register_for_checkpointing(self.schedule)
        if isinstance(teacher, SelfTeacher):
            teacher.begin(optimizer, self.accelerator)
        self.checkpoints = Checkpoints(
            self.folder / FOLDER,
            self.config,
            self.accelerator,
            self.unwrapped,
            digests,
            adapters_alone=config.lora_rank > 0 and not self.is_sharded,
        )
        # Sampling must not fail when weights have blown up: the step's own check, alike in all processes, raises the error.
        self.sampling = cast("GenerationOptions", {**sampling_options(config), "remove_invalid_values": True})
        if self.is_sharded:
            self.sampling["synced_gpus"] = True
        self.sampler = self._make_sampler()
        self.contexts: Rollouts | None = None
        self.done = 0  # updates

    def train(self) -> dict[str, float]:
        """Train to the end, or to SIGTERM. Returns the last held-out numbers, in nats per token.

        Raises: SystemExit(143): SIGTERM came; a checkpoint was saved first. FloatingPointError: a loss, a gradient or weights
            are not finite; the weights are not saved, and the message names the checkpoint to continue from. ServerError: a
            server failed for longer than `server_retry_seconds`; a checkpoint was saved. LostProcessError: another process
            did not take part for `process_timeout`; the message names it.
        """
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if value is not None}
        self.accelerator.init_trackers(self.config.run_name, config=settings)
        with (
            closing(self.sampler) if isinstance(self.sampler, ServerSampler) else nullcontext(),
            Stopping(self.accelerator) as stopping,
            RunLog(self.folder, self.accelerator, self.config.steps) as log,
            LostProcesses(self.accelerator),
        ):
            self.done = self._begin(log)
            try:
                after = self._updates(stopping, log)
            except ServerError as error:
                failure = save_after_failure(self.checkpoints, self.done, self.contexts, error)
                self.accelerator.end_training()
                raise failure from error
            card = model_card(self.config, self.taught_by, self._logged(0), after)
            save_model(self.folder / MODEL, self.accelerator, self.model, self.tokenizer, card, merges=self.merges)
            log.say(f"{self.folder}/{MODEL} is the student; {self.folder}/{FILE} has the numbers")
        self.accelerator.end_training()
        return after

    def _updates(self, stopping: Stopping, log: RunLog) -> dict[str, float]:
        """All updates that are left. Returns the last held-out numbers."""
        first = self.done
        after = self._logged(first) if self._is_evaluated(first) else self._evaluate(first, log)
        for step in range(first, self.config.steps):
            is_due = bool(self.config.save_every) and step > first and step % self.config.save_every == 0
            log.advance(self._step(step, log, saves=is_due))
            self.done = done = step + 1
            is_last = done == self.config.steps
            is_stopped = stopping.is_asked()
            if not is_stopped and (is_last or done % self.config.eval_every == 0):
                after = self._evaluate(done, log)
                is_stopped = stopping.is_asked()
            if is_last or is_stopped:
                # After a SIGTERM no next gradient has checked these weights, so older checkpoints are not deleted.
                self.checkpoints.save(done, self.contexts, prunes=not is_stopped)
            if is_stopped:
                log.say(f"SIGTERM: saved after step {done}; --resume continues")
                self.accelerator.end_training()
                raise SystemExit(143)
        return after

    @property
    def unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _begin(self, log: RunLog) -> int:
        """Load the checkpoint to continue from, if there is one. Returns the number of updates done."""
        first = 0
        if self.start is None:
            self.contexts = self._sample_contexts()
        else:
            first, contexts = self.checkpoints.load(self.start)
            self._set_rates()
            if self.held_out:
                device = self.accelerator.device
                self.contexts = Rollouts(self.held_out, contexts["tokens"].to(device), contexts["mask"].to(device))
        log.begin_at(first, is_new=self.start is None)
        for path, defect in self.damaged.items():
            aside = self.checkpoints.set_aside(path, "damaged")
            log.say(f"{path}: {defect}; it is now {aside.name}, and the run continues from {self.start}")
        if self.changed and first < self.config.steps:
            log.change(first + 1, self.changed)
        return first

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self, step: int, log: RunLog, *, saves: bool) -> str:
        """One update, logged. Returns its numbers as one line of text.

        With `saves`, the weights before the update are saved, once their gradient is known to be finite.
        """
        began = time.perf_counter()
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        micro_batches = [i * ranks + rank for i in range(self.config.gradient_accumulation_steps)]
        batches = [self.sampler(step, number) for number in micro_batches]
        n_items = self._sum(torch.stack([batch.mask.sum() for batch in batches]).sum())
        totals: dict[str, Tensor] = {}
        for number, batch in zip(micro_batches, batches, strict=True):
            is_last = number == micro_batches[-1]
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                out = self._loss(batch, n_items, step, number)
                # Gradients are averaged over the processes, but the denominator already counts the tokens of all processes.
                self.accelerator.backward(out.loss * ranks)
            for name, value in out.metrics.items():
                totals[name] = totals.get(name, 0) + value.double()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        numbers = self._numbers(totals) | {"grad_norm": float(norm), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        numbers |= self.config.scheduled(step)
        for name, value in (("gradient's norm", numbers["grad_norm"]), ("loss", numbers["loss"])):
            if not math.isfinite(value):
                what = f"step {step + 1}: the {name} is {value}, expected a finite number; nothing was updated"
                raise blow_up(self.checkpoints, step, what)
        if saves:
            paused = time.perf_counter()
            self.checkpoints.save(step, self.contexts)
            began += time.perf_counter() - paused
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not are_finite(self.model, self.accelerator):
            raise blow_up(self.checkpoints, step + 1, f"step {step + 1}: its update left weights that are not finite")
        speed = numbers["n_valid"] / (time.perf_counter() - began)
        log.add(step + 1, numbers, tokens_per_second=speed)
        kl = f", KL {numbers['kl']:.4f}" if "kl" in numbers else ""  # lists of a server do not determine it
        share = f"{numbers['n_selected'] / max(1, numbers['n_valid']):.1%} of {numbers['n_valid']:.0f} tokens"
        return f"loss {numbers['loss']:.4f}{kl}, {share}, {speed:.0f} tokens/s"

    def _set_rates(self) -> None:
        """Set learning rate and weight decay from the options: the checkpoint's optimizer state has its own values."""
        self.schedule.base_lrs = [self.config.learning_rate] * len(self.schedule.base_lrs)
        for group, scale in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["weight_decay"], group["initial_lr"] = self.config.weight_decay, self.config.learning_rate
            group["lr"] = self.config.learning_rate * scale(self.schedule.last_epoch)

    def _loss(self, batch: Rollouts, n_items: Tensor, step: int, number: int) -> SelectiveOPDOutput:
        seed = seed_of(self.config.seed, "loss", step, number)
        device = batch.tokens.device
        with seeded(seed, device):  # dropout draws inside
            student = head_over(self.model, self.tokenizer, batch, unwrapped=self.unwrapped)
        if self.config.mixed_precision == "bf16":  # the body computes in bf16 too; gradients are summed in fp32
            student = in_bf16(student)
        settings = dataclasses.replace(self.config.settings(step), generator=torch.Generator(device).manual_seed(seed))
        loss_fn = SelectiveOPDLoss(settings)
        return loss_fn(student, self.teacher(batch), mask=batch.mask, tokens=batch.tokens, num_items_in_batch=n_items)

    def _numbers(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """The numbers that a step logs, over all its micro-batches and processes."""
        names = sorted(name for name in totals if name.endswith("_sum") or name in (*COUNTS, "loss"))
        values = self._sum(torch.stack([totals[name] for name in names])).tolist()
        sums = dict(zip(names, values, strict=True))
        numbers = {name: sums[name] for name in ("loss", *COUNTS)}
        for name, (total, count) in MEANS.items():
            if total in sums and not math.isnan(sums[total]):
                numbers[name] = sums[total] / max(1, sums[count])
        return numbers

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        total: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum")
        return total

    # --- evaluation --------------------------------------------------------------------------------------------------

    def _sample_contexts(self) -> Rollouts | None:
        """The untrained student's answers to the held-out prompts; every checkpoint has a copy."""
        if not self.held_out:
            return None
        return evaluation.sample_contexts(
            self.unwrapped,
            self.tokenizer,
            self.held_out,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            **self.sampling,
        )

    def _evaluate(self, step: int, log: RunLog) -> dict[str, float]:
        config = self.config
        if self.contexts is None:
            return {}
        numbers = evaluation.held_out_metrics(
            self.model,
            self.tokenizer,
            self.teacher,
            self.contexts,
            batch_size=config.batch_size,
            unwrapped=self.unwrapped,
            settings=config.settings(),
        )
        loss = numbers.get("loss", 0.0)
        if not math.isfinite(loss):
            raise blow_up(self.checkpoints, step, f"step {step}: the held-out loss is {loss}, expected a finite number")
        with_answer = [prompt for prompt in self.held_out if prompt.answer is not None]
        completions = evaluation.greedy_completions(
            self.unwrapped,
            self.tokenizer,
            with_answer or self.held_out[: config.completions],
            batch_size=config.batch_size,
            pattern=config.answer_pattern,
            **self.sampling,
        )
        share = evaluation.accuracy(completions)
        if share is not None:
            numbers["accuracy"] = share
        log.add(step, {f"{EVAL}{name}": value for name, value in numbers.items()})
        log.say(f"step {step}: held out " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        log.show(step, completions[: config.completions])
        return numbers

    def _is_evaluated(self, step: int) -> bool:
        """Whether a run that begins after `step` updates needs no evaluation first.

        A run whose server failed during an evaluation has a log with this step's loss, and without its evaluation. Only the
        first process may have the log.
        """
        if self.start is None:
            return False
        is_due = step == self.config.steps or step % self.config.eval_every == 0
        path = self.folder / FILE
        rows = [row for row in read_rows(path) if row["step"] == step and "loss" in row] if path.is_file() else []
        lacks_it = bool(is_due and self.held_out and rows and not self._logged(step))
        return not self._sum(torch.tensor(float(lacks_it))).item()

    def _logged(self, step: int) -> dict[str, float]:
        """The held-out numbers of that step from the log. Only the first process writes a log, so others may get {}."""
        if not (self.folder / FILE).is_file():
            return {}
        items = (item for row in read_rows(self.folder / FILE) if row["step"] == step for item in row.items())
        return {
            name.removeprefix(EVAL): value for name, value in items if name.startswith(EVAL) and isinstance(value, (int, float))
        }

    # --- prompts and sampler -----------------------------------------------------------------------------------------

    def _read_prompts(
        self, prompts: Sequence[Prompt] | None, eval_prompts: Sequence[Prompt] | None
    ) -> tuple[list[Prompt], list[Prompt]]:
        config = self.config
        train_prompts = load_prompts(*dataclasses.astuple(config.train_source())) if prompts is None else list(prompts)
        if eval_prompts is not None:
            return train_prompts, list(eval_prompts)[: config.eval_size]
        source = config.eval_source()
        if source is not None:
            return train_prompts, load_prompts(*dataclasses.astuple(source))[: config.eval_size]
        return held_out(train_prompts, config.eval_size)

    def _make_sampler(self) -> LocalSampler | ServerSampler:
        config = self.config
        n_micro_batches = config.gradient_accumulation_steps * self.accelerator.num_processes
        prompts_of = prompts_by_step(self.prompts, config, n_micro_batches)
        if config.rollout_url is None:
            return LocalSampler(self.unwrapped, self.tokenizer, prompts_of, config.seed, **self.sampling)
        server = rollout_server(config, end_tokens(self.unwrapped, self.tokenizer))
        return ServerSampler(server, self.unwrapped, self.tokenizer, prompts_of, config, self.folder / "adapter")

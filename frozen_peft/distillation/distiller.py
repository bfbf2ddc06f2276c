# SPDX-License-Identifier: Apache-2.0
"""Lets TRL's loss be that of distillation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled

from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import ContextFiles, ContextStore, Decision, trained_base_weights
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.distillation.divergence import Answers, Divergence, join_answers, select_answers
from frozen_peft.distillation.head import LogitHead
from frozen_peft.distillation.teacher import AnswerStore, Teacher
from frozen_peft.utils.sizes import parse_size
from frozen_peft.utils.stopwatch import Mode, Stopwatch

__all__ = ["Distiller", "require_distillable"]

Batch = dict[str, Any]


class Distiller:
    """Makes of a batch the loss of distillation.

    Args:
        model: The student, a `PeftModel`; the teacher is the same with its adapters off.
        args: The configuration.
        check: Compares the teacher with plain forwards, for decisions that it is asked about.
        store: Keeps the teacher's contexts; None: nothing does.
    """

    def __init__(
        self,
        model: PeftModel,
        args: FrozenContextConfig,
        check: Callable[[Sequence[Decision]], None],
        store: ContextStore | None = None,
    ):
        self._model = model
        self._check = check
        self._likelihood_weight = args.distill_likelihood_weight
        self._divergence = Divergence(
            args.distill_divergence,
            args.distill_top_k,
            args.distill_temperature,
            args.distill_chunk_size,
            args.distill_beta,
        )
        folder = args.distill_cache_dir
        files = ContextFiles(Path(folder).expanduser(), field="distill_cache_dir") if folder is not None else None
        self.teacher = Teacher(
            model,
            self._divergence,
            AnswerStore(parse_size(args.distill_cache_size), files),
            chunk_size=args.prefill_chunk_size,
            store=store,
        )
        self._seconds: dict[Mode, Stopwatch] = {"train": Stopwatch(args.device), "eval": Stopwatch(args.device)}
        self._sums: torch.Tensor | None = None

    def target(self, teachers: Sequence[Decision], labels: torch.Tensor, mode: Mode) -> Answers | None:
        """What the teacher says about each label that a batch predicts, row by row; None where there is none.

        Args:
            teachers: Its decision for each row of the batch; none for a batch without labels.
            labels: Labels of the batch, shape `(rows, tokens)`.
            mode: Whose seconds these are.

        Raises:
            ValueError: Teacher and student have other decisions.
            ContextMismatchError: The teacher is not what plain forwards give.
        """
        with self._seconds[mode].running():
            wanted = [_predicted_labels(row) for row in labels]
            if not any(map(len, wanted)):
                return None
            if len(teachers) != len(wanted):
                raise ValueError(
                    f"A batch has {len(wanted)} decisions, and {len(teachers)} with their instructions. Do all "
                    "samples have the columns that `loss_type='distill'` prepares, and does the collator keep their "
                    "number?"
                )
            self._check(teachers)
            parts = []
            for decision, answers, own in zip(teachers, self.teacher.answer(teachers), wanted, strict=True):
                theirs = _predicted_labels(decision.labels)
                # Behind instructions a first token is predicted that without them is not.
                start = len(theirs) - len(own)
                if start < 0 or not torch.equal(theirs[start:], own):
                    raise ValueError(
                        f"A decision of {len(own)} supervised tokens is another one with its instructions, of "
                        f"{len(theirs)}. Let the trainer prepare the dataset, which names the sample."
                    )
                shared = select_answers(answers, slice(start, None))
                parts.append({name: tensor.to(labels.device) for name, tensor in shared.items()})
            return join_answers(parts)

    @contextmanager
    def distilled_loss(self, model: torch.nn.Module, target: Answers | None) -> Iterator[None]:
        """Lets `model(..., fused_lm_head=True)` give, for log-probabilities, what TRL makes this loss of.

        Args:
            model: The student.
            target: What the teacher says about each label of the batch.

        Raises:
            ValueError: Nobody asked the model for it.
        """
        pretrained = get_pretrained_model(model)
        forward = pretrained.forward
        is_asked = False

        def with_divergence(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_asked
            if not kwargs.get("fused_lm_head"):
                return forward(*args, **kwargs)
            is_asked = True
            states: list[torch.Tensor] = []
            handle = pretrained.base_model.register_forward_hook(
                lambda module, inputs, output: states.append(output.last_hidden_state)
            )
            try:
                output = forward(*args, **kwargs)
            finally:
                handle.remove()
            output.log_probs = self._log_probs(output, states[0], LogitHead.of(pretrained), target)
            return output

        pretrained.forward = with_divergence
        try:
            yield
        finally:
            # The one that TRL gave the model, its own too.
            pretrained.forward = forward
        if not is_asked:
            raise ValueError(
                "`loss_type='distill'` is the loss, and a `compute_loss` of your own computed another one. Begin it "
                "with `super().compute_loss(...)`, or set `loss_type: nll`."
            )

    def note_figures(self, metrics: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Adds figures of the last batch, of all processes, to those that are to be logged.

        - `distill/divergence`: mean divergence per supervised token, in nats (times the temperature's square).
        - `distill/nll`: mean negative log-likelihood of the decision as it is written.
        - `distill/reused`: share of decisions about which the teacher had been asked before.
        """
        assert self._sums is not None, "there was a batch before"
        own = torch.cat([self._sums, self._sums.new_tensor([self.teacher.num_asked, self.teacher.num_computed])])
        self.teacher.num_asked = self.teacher.num_computed = 0
        num_labels, divergence, nll, asked, computed = accelerator.gather_for_metrics(own[None]).sum(0).tolist()
        if num_labels:
            metrics["distill/divergence"].append(divergence / num_labels)
            metrics["distill/nll"].append(nll / num_labels)
        if asked:
            metrics["distill/reused"].append(1.0 - computed / asked)

    def read_seconds(self, mode: Mode) -> float:
        """Seconds that the teacher took, since the last call."""
        return self._seconds[mode].read()

    def _log_probs(self, output: Any, hidden: torch.Tensor, head: LogitHead, target: Answers | None) -> torch.Tensor:
        """What stands for the log-probability of each label, shape `(rows, tokens - 1)`, zero where there is none."""
        mask = output.label_mask
        predicting = hidden[:, :-1].to(mask.device)[mask]
        nll = -output.log_probs.detach().sum()
        if target is None:
            divergence = predicting.sum(-1).float()
        else:
            divergence = self._divergence.per_token(predicting, head, target, self.teacher.head)
        self._sums = torch.stack([mask.sum().float(), divergence.detach().sum().float(), nll.float()])
        # `masked_scatter` keeps a batch without labels a part of the graph.
        negative = -divergence.new_zeros(mask.shape).masked_scatter(mask, divergence)
        weight = self._likelihood_weight
        if weight == 0.0:
            return negative
        return weight * output.log_probs + (1.0 - weight) * negative


def require_distillable(model: torch.nn.Module, accelerator: Accelerator, *, has_loss_function: bool) -> None:
    """Refuses what cannot be distilled.

    Args:
        model: The student.
        accelerator: Which weights or sequences may be spread over processes by.
        has_loss_function: The trainer was given a `compute_loss_func`.

    Raises:
        ValueError: The model has no adapters, training changes the base model, there is another loss, or weights or
            sequences are spread over processes.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "`loss_type='distill'` has the model itself, with its adapters off, for a teacher, and this model has "
            f"none (it is a {type(model).__name__}). Pass `peft_config`, or set `loss_type: nll`."
        )
    if trained := trained_base_weights(model):
        raise ValueError(
            "`loss_type='distill'` has the base model for a teacher, and training changes "
            f"{', '.join(f'`{name}`' for name in trained[:3])} of it. Freeze it (in LoRA: `bias='none'`)."
        )
    if has_loss_function:
        raise ValueError(
            "`loss_type='distill'` is the loss, and `compute_loss_func` another one. Leave one of the two out."
        )
    sharding = accelerator.parallelism_config
    cuts_sequences = sharding is not None and (sharding.cp_enabled or sharding.sp_enabled)
    if cuts_sequences or accelerator.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled():
        raise ValueError(
            "`loss_type='distill'` reads the language-model head beside the model's forward and runs each sequence in "
            "one piece: not FSDP, not DeepSpeed ZeRO-3, not context or sequence parallelism. Use DDP."
        )


def _predicted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels of one row `(tokens,)` that an output predicts, in their order."""
    return labels[1:][labels[1:] != IGNORED_LABEL]

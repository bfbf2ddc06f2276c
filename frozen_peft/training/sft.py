# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: TRL's `SFTTrainer`, with contexts encoded once and read-only."""

import copy
import inspect
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import TAIL, Cut, stop_tokens_of
from frozen_peft.context.branches import BRANCHES
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.data import as_table, needs_python_rows, python_rows
from frozen_peft.distillation import (
    TEACHER_COLUMNS,
    Answers,
    Distiller,
    TeacherCollator,
    Writer,
    check_teacher,
    prepare_with_teacher,
    require_distillable,
    take_decisions,
)
from frozen_peft.training.batches import BatchCutter, DecisionBatch, SampleBatch, num_labels
from frozen_peft.training.checks import BatchChecks
from frozen_peft.training.frozen import make_base_store, make_store
from frozen_peft.training.mixin import FrozenContextMixin
from frozen_peft.training.model_setup import (
    check_model,
    given_invocation,
    make_config,
    make_cut,
    named_datasets,
    prepare_model,
    sample_base,
)
from frozen_peft.training.prompt_rows import check_prompts, prepare_prompts, require_completions
from frozen_peft.training.samples import SampleLimits, check_samples, limit_length, require_rows
from frozen_peft.training.sampling import require_groupable
from frozen_peft.training.turn_contexts import (
    ROW_NUMBER,
    BranchCollator,
    render_turns,
    require_branches,
    say_dropped_reasoning,
)
from frozen_peft.training.turn_rendering import TurnRenderer
from frozen_peft.training.written import OwnAnswers
from frozen_peft.utils.compat.trl import count_tokens, logged_metrics, passing_loss_type, trainer_tokenizer
from frozen_peft.utils.stopwatch import Mode

__all__ = ["FrozenContextTrainer"]


class FrozenContextTrainer(FrozenContextMixin, SFTTrainer):
    """`SFTTrainer` that encodes each sample's context without gradient and trains the decision behind it.

    Takes what `SFTTrainer` takes, in the same order; `args` may be a `FrozenContextConfig`, or a plain `SFTConfig` or
    `TrainingArguments`, which is converted. Everything is inherited but the hooks of `FrozenContextMixin` and these,
    which add to the parent's:

    - `_prepare_dataset` cuts contexts where TRL would cut decisions, and checks every sample. With
      `turn_contexts="inference"` it renders conversations turn by turn before.
    - `_train_parts` weighs what the model writes itself, with `distill_on_policy`.
    - `_set_signature_columns_if_needed` keeps the teacher's columns with `loss_type="distill"`, and `branches`.

    A sample without context is a plain SFT sample. With `gradient_horizon=-1` (tiers 1 and 3) nothing is frozen, and
    every batch goes to TRL as it is.

    Raises:
        ValueError: A field or a sample cannot be trained as asked; the message names it.
        ContextMismatchError: The model's decision over a frozen context is not what a plain forward gives.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    # What TRL adds to it in a later version is taken, too.
    __signature__ = inspect.signature(SFTTrainer)
    _tag_names: ClassVar[list[str]] = ["trl", "sft", "frozen-context"]
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: FrozenContextConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        *positional: Any,
        **kwargs: Any,
    ):
        args = make_config(model, args, FrozenContextConfig)
        for name, dataset in {"train": train_dataset, **named_datasets(eval_dataset)}.items():
            require_rows(dataset, name)
        if args.group_by_context:
            require_groupable(train_dataset)
        peft_config = kwargs.get("peft_config")
        check_model(model, args, adapters_come=peft_config is not None or bool(positional), peft_config=peft_config)
        base_before = sample_base(model, args)
        self._invocation = given_invocation(model, peft_config, args)
        # While TRL makes the trainer, `loss_type` is another one.
        self._distills, self._writes, self._needs_no_completions = (
            args.loss_type == "distill",
            args.writes,
            args.needs_no_completions,
        )
        self._cut, self._max_positions = TAIL, None

        with passing_loss_type(args, "distill"):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, *positional, **kwargs)

        text_config = get_pretrained_model(self.model).config.get_text_config()
        self._max_positions = getattr(text_config, "max_position_embeddings", None)
        self._cut = make_cut(self.args, trainer_tokenizer(self), self._invocation)
        for name, dataset in {"train": self.train_dataset, **named_datasets(self.eval_dataset)}.items():
            if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
                self._check_samples(dataset, name, self.args, says_cuts=True)
                if self._writes:
                    check_prompts(dataset, self.model, self._cut, self.args.max_completion_length, name)
        prepare_model(self, self._cut, base_before)
        self._own_components()

    def _own_components(self) -> None:
        checks = BatchChecks(self.args)
        self._distiller = self._make_distiller(checks) if self._distills else None
        several = self._cut.mode == "turns" or self._writes
        cutter = BatchCutter(
            self._cut,
            self.args.max_decisions_per_forward if several else None,
            trainer_tokenizer(self).pad_token_id or 0,
            take_teachers=partial(take_decisions, mode=self._cut.mode) if self._distills else None,
            always=self._writes,
        )
        self._train_over(cutter, checks, self._distiller, store=make_store(self.args))
        self._own_answers = self._make_own_answers() if self._writes else None
        if self.args.renders_turns:
            self.data_collator = BranchCollator(self.data_collator)
        if self._distiller is not None:
            self.data_collator = TeacherCollator(self.data_collator)

    def _make_distiller(self, checks: BatchChecks) -> Distiller:
        require_distillable(self.model, self.accelerator, has_loss_function=self.compute_loss_func is not None)
        # Not on disk where what is said over a context is kept, which takes a thousandth of it.
        folder = self.args.context_cache_dir if self._writes else None
        store = make_base_store(self.args.context_cache_size, folder)
        return Distiller(self.model, self.args, partial(checks.check_teacher, self.model), store)

    def _make_own_answers(self) -> OwnAnswers:
        stops = stop_tokens_of(trainer_tokenizer(self), get_pretrained_model(self.model).generation_config)
        writer = Writer(self.model, self.args, stops, num_start_tokens=max(len(self._cut.invocation), 1))
        return OwnAnswers(self.model, self.args, writer, self._frozen, self.accelerator)

    @property
    def own_answers(self) -> list[dict[str, Any]]:
        """Some of what the model wrote in training, as text, with `distill_on_policy`; otherwise none."""
        shown = self._own_answers.shown if self._own_answers is not None else []
        return [answer.as_text(trainer_tokenizer(self)) for answer in shown]

    @property
    def cut(self) -> Cut:
        """Where samples are cut."""
        return self._cut

    # Data

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: FrozenContextConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        # TRL would cut at the end of a sample, where the decision is.
        self._cut = make_cut(args, getattr(processing_class, "tokenizer", processing_class), self._invocation)
        uncut = copy.copy(args)
        uncut.max_length = args.max_length if packing else None
        tokens_only = copy.copy(uncut)
        tokens_only.max_length, tokens_only.shuffle_dataset = None, False
        exactly = needs_python_rows(dataset)
        stop_token = getattr(processing_class, "tokenizer", processing_class).eos_token_id or 0
        renderer = TurnRenderer(processing_class) if args.renders_turns or self._needs_no_completions else None
        if self._writes and not self._needs_no_completions:
            require_completions(dataset, args.distill_on_policy, dataset_name)

        def prepare(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
            if renderer is not None and self._needs_no_completions:
                rows = prepare_prompts(rows, renderer, stop_token, dataset_name, args.dataset_num_proc)
            elif renderer is not None:
                rows = render_turns(rows, renderer, dataset_name, args.dataset_num_proc)
            first = exactly and isinstance(rows, IterableDataset)
            return super(FrozenContextTrainer, self)._prepare_dataset(
                rows,
                processing_class,
                tokens_only if first else uncut,
                packing and not first,
                formatting_func if first or not exactly else None,
                dataset_name,
            )

        if renderer is None and args.decision_mode == "turns":
            rows = python_rows(dataset) if exactly else dataset
            say_dropped_reasoning(rows, processing_class, self.chat_template, dataset_name)
        if exactly:
            # Rows that no table holds as they are written become token ids first, and are a table from there on.
            rows = python_rows(dataset, args.dataset_num_proc, ROW_NUMBER if renderer is not None else None)
            tokens = prepare_with_teacher(rows, prepare, dataset_name, None) if self._distills else prepare(rows)
            dataset = as_table(tokens, dataset, ("input_ids", "labels", BRANCHES, *TEACHER_COLUMNS))
        if self._distills:
            dataset = prepare_with_teacher(dataset, prepare, dataset_name, args.dataset_num_proc)
        else:
            dataset = prepare(dataset)
        if args.max_length is not None and not packing and self._cut.mode == "tail":
            dataset = limit_length(dataset, args.max_length, dataset_name, args.dataset_num_proc, self._cut)
        return self._check_samples(dataset, dataset_name, args, packing)

    def _check_samples(
        self,
        dataset: Dataset | IterableDataset,
        name: str,
        args: FrozenContextConfig,
        packing: bool = False,
        *,
        says_cuts: bool = False,
    ) -> Dataset | IterableDataset:
        if not packing:
            require_branches(dataset, name, wanted=args.renders_turns)
        limits = SampleLimits(
            frozen=args.gradient_horizon != -1,
            flattened=packing or self.padding_free,
            max_positions=self._max_positions,
            max_length=args.max_length,
            cut=self._cut,
        )
        dataset = check_samples(dataset, name, limits, says_cuts=says_cuts)
        if self._distills:
            dataset = check_teacher(dataset, name, self._cut.mode, self._max_positions)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        own = TEACHER_COLUMNS if self._distills else ()
        self._signature_columns = list({*(self._signature_columns or ()), BRANCHES, *own})

    # What TRL and the mixin leave to a trainer

    def _expect(self, batches: list[SampleBatch]) -> None:
        super()._expect(batches)
        if self._distiller is not None:
            self._distiller.teacher.expect([decision for batch in batches for decision in batch.told_teachers])

    def _settled(self, batches: list[SampleBatch], mode: Mode) -> list[SampleBatch]:
        if self._own_answers is None:
            return batches
        return self._own_answers.settled(batches, step=self.state.global_step, mode=mode)

    def _answered(self, batch: SampleBatch, mode: Mode) -> SampleBatch:
        if self._own_answers is None:
            return batch
        if not batch.prompts:
            (batch,) = self._settled([batch], mode)
            self._expect([batch])
        return self._own_answers.written(batch, logged_metrics(self, mode), step=self.state.global_step, mode=mode)

    def _train_parts(
        self, model: torch.nn.Module, parts: list[DecisionBatch], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        if self._own_answers is not None:
            # How many tokens a step has is known when its last answer is written, and not before. So each micro-batch
            # weighs as much as the next, on each process, and in it each token.
            num_items_in_batch = sum(map(num_labels, parts)) * self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                num_items_in_batch *= self.accelerator.num_processes
        return super()._train_parts(model, parts, num_items_in_batch)

    def _target(self, part: DecisionBatch, inputs: dict[str, Any]) -> Answers | None:
        if self._distiller is None:
            return None
        return self._distiller.target(part.teachers, inputs["labels"], self._mode)

    def _count_tokens(self, part: DecisionBatch) -> None:
        count_tokens(self, part.num_context_tokens)

    def _figures(self, seconds_elsewhere: float = 0.0) -> dict[str, float]:
        teacher = self._distiller.read_seconds(self._mode) if self._distiller is not None else 0.0
        writing = self._own_answers.read_seconds(self._mode) if self._own_answers is not None else 0.0
        seconds = {"distill/teacher_seconds": teacher, "distill/writing_seconds": writing}
        return {name: value for name, value in seconds.items() if value} | super()._figures(teacher + writing)

# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's `SFTTrainer`, with contexts encoded once and read-only."""

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from frozen_peft.adapters import keep_linear4bit_trainable, log_quantization, restrict_adapter_rows
from frozen_peft.config import FrozenContextConfig, make_store
from frozen_peft.context import TAIL, ContextEncoder, ContextTokens, Cut, FrozenContext, use_segmented_attention
from frozen_peft.context.kernels.choice import choose_kernels
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.data import as_table, needs_python_rows, python_rows
from frozen_peft.distillation import (
    TEACHER_COLUMNS,
    Distiller,
    TeacherCollator,
    check_teacher,
    known_loss_type,
    prepare_with_teacher,
    require_distillable,
)
from frozen_peft.gradient import group_checkpoints
from frozen_peft.merging import require_repeated_change, save_base_record
from frozen_peft.training.batches import (
    CONTEXTS,
    NUM_CONTEXT_TOKENS,
    TEACHERS,
    BatchCutter,
    from_first_label,
    num_labels,
)
from frozen_peft.training.checks import BatchChecks
from frozen_peft.training.engines import adding_up, as_many_everywhere, check_engine, require_same_machines
from frozen_peft.training.forwards import DecisionForwards, LiveBatch
from frozen_peft.training.metrics import ContextMetrics, Mode
from frozen_peft.training.model_setup import (
    check_model,
    check_parts,
    complete_head,
    given_invocation,
    has_auxiliary_loss,
    make_config,
    make_cut,
    named_datasets,
    require_kept_base,
    sample_base,
    settle_context_adapters,
)
from frozen_peft.training.predictions import SampleRows, join_predictions
from frozen_peft.training.samples import SampleLimits, check_samples, limit_length, require_rows
from frozen_peft.training.sampling import GroupingTrainer, require_groupable
from frozen_peft.utils.cache_argument import as_cache_argument, given_cache

__all__ = ["FrozenContextTrainer"]


class FrozenContextTrainer(GroupingTrainer):
    """`SFTTrainer` that encodes each sample's context without gradient and trains the decision behind it.

    Takes what `SFTTrainer` takes, in the same order; `args` may be a `FrozenContextConfig`, or a plain `SFTConfig` or
    `TrainingArguments`, which is converted. Everything is inherited but these hooks and those of `GroupingTrainer`,
    `TimedTrainer` and `DistributedTrainer`, which add to the parent's:

    - `training_step` and `prediction_step` cut a batch into decisions, a conversation's in bounded numbers, and hand
      each part to TRL. The former makes activation checkpoints span `checkpoint_every` layers.
    - `_prepare_inputs` gives a part its frozen context, as the cache that a model can be called with: what reaches
      `compute_loss`, TRL's or one that overrides it, is what the loss is to be computed from.
    - `compute_loss_context_manager` has the model's forwards run as such a batch needs it.
    - `compute_loss` takes batches of samples too, as `SFTTrainer`'s does.
    - `get_batch_samples` and `get_train_dataloader` tell the encoder which contexts an optimizer step needs, and the
      store which ones are next.
    - `_prepare_dataset` cuts contexts where TRL would cut decisions, and checks every sample.
    - `_set_signature_columns_if_needed` keeps the teacher's columns with `loss_type="distill"`.
    - `log` adds what became of the contexts.
    - `_write_model` adds what is known of an adapter's base, for merging, and `_load_from_checkpoint` compares it
      where an adapter has changed its base.
    - `_forget_history` drops encoded contexts that go stale, which a run that goes on from a checkpoint does not have;
      `_history` and `_restore_history` tell it which others there were.

    A sample without context is a plain SFT sample. With `gradient_horizon=-1` (tiers 1 and 3) nothing is frozen, and
    every batch goes to TRL as it is.

    Raises:
        ValueError: A field or a sample cannot be trained as asked; the message names it.
        ContextMismatchError: The model's decision over a frozen context is not what a plain forward gives.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    __signature__ = inspect.signature(SFTTrainer)
    _tag_names: ClassVar[list[str]] = ["trl", "sft", "frozen-context"]

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
        args = make_config(model, args)
        for name, dataset in {"train": train_dataset, **named_datasets(eval_dataset)}.items():
            require_rows(dataset, name)
        if args.group_by_context:
            require_groupable(train_dataset)
        peft_config = kwargs.get("peft_config")
        check_model(model, args, adapters_come=peft_config is not None or bool(positional), peft_config=peft_config)
        base_before = sample_base(model, args)
        self._max_positions: int | None = None
        self._distills = args.loss_type == "distill"
        self._distiller: Distiller | None = None
        self._checks = BatchChecks(args.verify_context)
        self._invocation = given_invocation(model, peft_config, args)
        self._cut = TAIL
        self.data_collator: Any
        self.current_gradient_accumulation_steps: int
        # Contexts of the micro-batches to come: of this step, and as far as it is known of the next.
        self._upcoming: list[list[ContextTokens]] = []
        # The batch that was prepared last, until its loss is computed.
        self._prepared: LiveBatch | None = None
        self._next_contexts: list[ContextTokens] = []
        self.aux_loss_enabled: bool
        self._signature_columns: list[str] | None

        with known_loss_type(args):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, *positional, **kwargs)

        pretrained = get_pretrained_model(self.model)
        complete_head(self.model)
        require_same_machines(self.accelerator, self.args.device, pretrained.dtype)
        check_engine(self.accelerator, self.model, self.args)
        check_parts(self.model, self.args)
        self._freezes_context = self.args.gradient_horizon != -1
        self._max_positions = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None)
        self._cut = make_cut(self.args, self._tokenizer, self._invocation)
        in_turns = self._cut.mode == "turns"
        max_decisions = self.args.max_decisions_per_forward if in_turns else None
        self._cutter = BatchCutter(self._cut, max_decisions, self._tokenizer.pad_token_id or 0)
        for name, dataset in {"train": self.train_dataset, **named_datasets(self.eval_dataset)}.items():
            if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
                self._check_samples(dataset, name, says_cuts=True)
        if self.aux_loss_enabled:
            self.aux_loss_enabled = has_auxiliary_loss(pretrained.config.get_text_config())
        restrict_adapter_rows(self.model)
        if getattr(pretrained, "is_loaded_in_4bit", False):
            keep_linear4bit_trainable(self.model)
            log_quantization(pretrained)
        choose_kernels(pretrained)
        if self._freezes_context:
            settle_context_adapters(self.model, active=self.args.context_adapters, invocation=self._cut.invocation)
        require_kept_base(self.model, self.args, base_before)
        if self._freezes_context or self.args.sequence_chunk_size is not None:
            use_segmented_attention(self.model)
        if self._freezes_context:
            self._encoder = ContextEncoder(
                self.model,
                chunk_size=self.args.prefill_chunk_size,
                adapters=self.args.context_adapters,
                store=make_store(self.args),
            )
            self._context_metrics = ContextMetrics(self._encoder, self.args.device)
        self._compile_layers()
        if self._distills:
            require_distillable(self.model, self.accelerator, has_loss_function=self.compute_loss_func is not None)
            self._distiller = Distiller(self.model, self.args, self._cut, self._checks)
            self.data_collator = TeacherCollator(self.data_collator)
        self._forwards = DecisionForwards(
            self.model, self.args, self._checks, self.accelerator, self._distiller, self._pending_stretches
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of the decisions in a batch, over their frozen contexts."""
        live = self._forwards.live
        if live is None or not live.is_of(inputs):
            return self._loss_of_samples(model, inputs, return_outputs, num_items_in_batch)
        self._require_own_model(self.accelerator.unwrap_model(model), inputs)
        stretching = live.stretching
        if stretching is not None and not return_outputs:
            inputs, stretching.first_output = from_first_label(inputs)
        try:
            loss = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        finally:
            if stretching is not None:
                stretching.first_output = 0
        if self._distiller is not None:
            self._distiller.note_figures(self._metrics[self._mode], self.accelerator)
        return loss

    def compute_loss_context_manager(self) -> ExitStack:
        """TRL's, and what forwards of the batch that `_prepare_inputs` made last have to run in."""
        stack: ExitStack = super().compute_loss_context_manager()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            stack.enter_context(self._forwards.of(prepared))
        return stack

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """TRL's, on decisions, which become one row per sample again; see `predictions`."""
        self._require_own_model(self.accelerator.unwrap_model(model), inputs)
        batch = self._prepare_inputs(inputs)
        own = self._parts(batch)
        if len(own) > 1:
            contexts = [context for part in own for context in part.get(CONTEXTS, ())]
            self._encoder.expect(contexts, step=self.state.global_step)
        with self._context_metrics.step("eval") if self._freezes_context else nullcontext():
            steps = [
                super(FrozenContextTrainer, self).prediction_step(
                    model, part, prediction_loss_only, ignore_keys=ignore_keys
                )
                for part in as_many_everywhere(self.accelerator, own, self._cut)
            ]
        num_decisions = self._cutter.num_decisions(batch)
        if num_decisions is None:
            return steps[0]
        rows = SampleRows.of(own, num_decisions)
        if "inputs" in self.args.include_for_metrics:
            # From here the evaluation loop takes a metric's inputs, once a batch is predicted.
            inputs.update(rows.inputs(own, self._cutter.pad_token_id))
        return join_predictions(steps[: len(own)], own, rows)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """TRL's, once for each part of the batch, with checkpoints over `checkpoint_every` layers."""
        if self.args.checkpoint_every > 1:
            # They exist from the first step on.
            group_checkpoints(get_decoder(get_pretrained_model(self.model)), self.args.checkpoint_every)
        with self._context_metrics.step("train") if self._freezes_context else nullcontext():
            if self._freezes_context:
                self._read_ahead()
            parts = self._parts(self._prepare_inputs(inputs))
            parts = as_many_everywhere(self.accelerator, parts, self._cut)
            self._count_context_tokens(parts[0])
            if len(parts) == 1:
                return super().training_step(model, parts[0], num_items_in_batch)
            return self._train_parts(model, parts, num_items_in_batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, whose contexts are announced to the encoder."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._freezes_context and batches:
            self._upcoming = [self._cutter.contexts(batch) for batch in batches]
            self._encoder.expect(list(itertools.chain(*self._upcoming)), step=self.state.global_step)
            self._upcoming.append(self._next_contexts)
        if self._distiller is not None and batches:
            self._distiller.expect(batches)
        return batches, num_items_in_batch

    def get_train_dataloader(self) -> DataLoader:
        """TRL's, whose collator notes the contexts of the batch it made last.

        accelerate makes a batch ahead of the one it yields, so that is the first batch of the next step. With worker
        processes, which have a collator of their own, nothing is known ahead of a step.
        """
        if not self._freezes_context or self._encoder.store is None or self.args.dataloader_num_workers:
            return super().get_train_dataloader()
        collator = self.data_collator

        def noting_contexts(samples: list[Any]) -> Any:
            batch = collator(samples)
            self._next_contexts = self._cutter.contexts(batch)
            return batch

        self.data_collator = noting_contexts
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the figures of `ContextMetrics`."""
        teacher_seconds = self._distiller.read_seconds(self._mode) if self._distiller is not None else 0.0
        figures = {"distill/teacher_seconds": teacher_seconds} if teacher_seconds else {}
        if self._freezes_context:
            figures |= self._context_metrics.read(self._mode, seconds_elsewhere=teacher_seconds)
        for name, value in figures.items():
            self._metrics[self._mode][name] = [value]
        super().log(logs, start_time)

    def _write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        super()._write_model(folder, state_dict)
        if self.args.should_save:
            save_base_record(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(unwrapped := self.accelerator.unwrap_model(self.model), PeftModel):
            require_repeated_change(unwrapped, Path(resume_from_checkpoint))

    def _forget_history(self) -> None:
        if self._freezes_context:
            self._encoder.forget()
        if self._distiller is not None:
            self._distiller.forget()

    def _history(self) -> dict[str, Any]:
        contexts = self._encoder.record() if self._freezes_context else None
        teacher = self._distiller.teacher.record() if self._distiller is not None else None
        records = {"contexts": contexts, "teacher": teacher}
        return {name: record for name, record in records.items() if record is not None}

    def _restore_history(self, history: dict[str, Any]) -> None:
        if self._freezes_context and "contexts" in history:
            self._encoder.restore(history["contexts"])
        if self._distiller is not None and "teacher" in history:
            self._distiller.teacher.restore(history["teacher"])

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

        def prepare(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
            first = exactly and isinstance(rows, IterableDataset)
            return super(FrozenContextTrainer, self)._prepare_dataset(
                rows,
                processing_class,
                tokens_only if first else uncut,
                packing and not first,
                formatting_func if first or not exactly else None,
                dataset_name,
            )

        if exactly:
            # Rows that no table holds as they are written become token ids first, and are a table from there on.
            rows = python_rows(dataset, args.dataset_num_proc)
            tokens = prepare_with_teacher(rows, prepare, dataset_name, None) if self._distills else prepare(rows)
            dataset = as_table(tokens, dataset, ("input_ids", "labels", *TEACHER_COLUMNS))
        if self._distills:
            dataset = prepare_with_teacher(dataset, prepare, dataset_name, args.dataset_num_proc)
        else:
            dataset = prepare(dataset)
        if args.max_length is not None and not packing and self._cut.mode == "tail":
            dataset = limit_length(dataset, args.max_length, dataset_name, args.dataset_num_proc, self._cut)
        return self._check_samples(dataset, dataset_name, args, packing)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._distills:
            self._signature_columns = list({*(self._signature_columns or ()), *TEACHER_COLUMNS})

    def _check_samples(
        self,
        dataset: Dataset | IterableDataset,
        name: str,
        args: FrozenContextConfig | None = None,
        packing: bool = False,
        *,
        says_cuts: bool = False,
    ) -> Dataset | IterableDataset:
        args = args or self.args
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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if CONTEXTS not in inputs:
            return inputs
        contexts = inputs[CONTEXTS]
        inputs = self._freeze_contexts(inputs)
        teachers = inputs.pop(TEACHERS, ())
        target = None
        if self._distiller is not None:
            with self.accelerator.autocast():
                target = self._distiller.target(teachers, inputs["labels"], self._mode)
        encode_again = partial(self._encode_as_now, contexts) if self.args.context_adapters else None
        self._prepared = LiveBatch(inputs, target, encode_again)
        return inputs

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Batches of decisions, whose contexts are still to be encoded, of a batch of samples."""
        parts = self._cutter.parts(inputs if self._distiller is None else self._distiller.attach(inputs))
        return [{CONTEXTS: [], **part} for part in parts]

    def _loss_of_samples(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        """The loss of a batch as the collator made it, which did not come through `training_step`."""
        if self._forwards.live is not None and self.args.sequence_chunk_size is not None:
            raise ValueError(
                "`sequence_chunk_size` runs the batch of a step alone, and `compute_loss` was called with another one "
                "inside of it. Leave `sequence_chunk_size` out, or mix what is in the other batch into the dataset."
            )
        self._require_own_model(self.accelerator.unwrap_model(model), inputs)
        parts = self._parts(self._prepare_inputs(inputs))
        if len(parts) > 1:
            if return_outputs:
                raise ValueError(
                    f"A batch of more than `max_decisions_per_forward={self.args.max_decisions_per_forward}` "
                    "decisions has no outputs in one piece. Raise it, or pass fewer samples."
                )
            if num_items_in_batch is None:
                num_items_in_batch = sum(map(num_labels, parts))
        losses = []
        for part in parts:
            batch = self._prepare_inputs(part)
            with self.compute_loss_context_manager():
                losses.append(
                    FrozenContextTrainer.compute_loss(self, model, batch, return_outputs, num_items_in_batch)
                )
        return losses[0] if len(losses) == 1 else sum(losses)

    @property
    def cut(self) -> Cut:
        """Where samples are cut."""
        return self._cut

    @property
    def _mode(self) -> Mode:
        """Under which TRL keeps the metrics of what runs now."""
        return "train" if self.model.training else "eval"

    def _require_own_model(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Refuses to compute over contexts that another model encodes."""
        if not self._freezes_context or get_pretrained_model(model) is get_pretrained_model(self._encoder.model):
            return
        if given_cache(inputs) is not None or self._cutter.contexts(inputs):
            raise ValueError(
                "The decisions' model is not the one that encodes their contexts, which is the one that this trainer "
                "was made with. Make a trainer for the other model."
            )

    def _freeze_contexts(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of decisions with a frozen context in place of their contexts."""
        kept = {name: value for name, value in inputs.items() if name not in (CONTEXTS, NUM_CONTEXT_TOKENS)}
        if not self._freezes_context:
            return kept
        contexts = inputs[CONTEXTS]
        with self.accelerator.autocast():
            self._checks.check_contexts(
                self._encoder.model,
                contexts,
                lambda row: inputs["input_ids"][row][inputs["attention_mask"][row].bool()],
                chunk_size=self.args.prefill_chunk_size,
                adapters=self.args.context_adapters,
                rounded=self.args.context_cache_dtype == "int8",
            )
        with self._context_metrics.prefill(self._mode), self.accelerator.autocast():
            now = {"step": self.state.global_step, "stale": self.model.training}
            if contexts:
                frozen = self._encoder.encode(contexts, **now)
                kept |= as_cache_argument(get_pretrained_model(self._encoder.model), frozen)
            else:
                self._encoder.encode_elsewhere(**now)
        return kept

    def _encode_as_now(self, contexts: list[ContextTokens]) -> FrozenContext:
        """Contexts for a forward in which the adapters are not what they are in training."""
        with self.accelerator.autocast():
            return ContextEncoder(self.model, chunk_size=self.args.prefill_chunk_size).encode(contexts)

    def _train_parts(
        self, model: torch.nn.Module, parts: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Forward and backward of one part after the other; gradients and loss are those of all of them together."""
        if num_items_in_batch is None:
            num_items_in_batch = sum(map(num_labels, parts))
        steps = self.current_gradient_accumulation_steps
        losses = []
        for index, part in enumerate(parts):
            # TRL averages the auxiliary loss of a mixture of experts over this many forwards, and transformers a loss
            # of the user's own that is a mean.
            is_mean = self.aux_loss_enabled or self.loss_is_scaled_for_ga is False
            self.current_gradient_accumulation_steps = steps * (len(parts) if is_mean else 1)
            is_last = index == len(parts) - 1
            try:
                with nullcontext() if is_last else adding_up(self.accelerator, model):
                    losses.append(super().training_step(model, part, num_items_in_batch))
            finally:
                self.current_gradient_accumulation_steps = steps
        return torch.stack(losses).sum()

    def _read_ahead(self) -> None:
        """Lets the store fetch what the next micro-batch needs, while the one that begins is computed."""
        current, *following = self._upcoming or [[]]
        self._upcoming = following
        self._encoder.read_ahead([*current, *itertools.chain(*following[:1])])

    def _count_context_tokens(self, batch: dict[str, Any]) -> None:
        """Adds contexts to `num_tokens`, which TRL counts from the attention mask and so from decisions only."""
        num_tokens = torch.tensor(batch.get(NUM_CONTEXT_TOKENS, 0), device=batch["input_ids"].device)
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(num_tokens).sum()) // self._tp_size

# SPDX-License-Identifier: Apache-2.0
"""What stands before a trainer of TRL so that it trains decisions over frozen contexts, whatever its loss is."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import TorchDynamoPlugin
from peft import PeftModel
from torch.utils.data import DataLoader

from frozen_peft.config import ContextFields
from frozen_peft.context import Carried, ContextEncoder, ContextStore, EncodeAgain
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.distillation import Answers, Distiller, Teacher
from frozen_peft.gradient import finish_stretches, group_checkpoints
from frozen_peft.merging import require_repeated_change, save_base_record
from frozen_peft.training.batches import BatchCutter, DecisionBatch, SampleBatch, from_first_label, num_labels
from frozen_peft.training.checkpoints import (
    checkpoint_to_resume,
    read_history,
    require_no_way_out,
    save_whole_checkpoint,
    whole_files,
)
from frozen_peft.training.checks import BatchChecks
from frozen_peft.training.engines import adding_up, as_many_everywhere, evaluated_as_trained
from frozen_peft.training.forwards import DecisionForwards, LiveBatch
from frozen_peft.training.frozen import FrozenContexts
from frozen_peft.training.memory_advice import advice_on_memory
from frozen_peft.training.metrics import Part, StepTimes
from frozen_peft.training.predictions import Prediction, SampleRows, join_predictions
from frozen_peft.training.sampling import GroupByContextSampler, make_sampler
from frozen_peft.utils.cache_argument import as_cache_argument
from frozen_peft.utils.compat.trl import logged_metrics, micro_batch_size
from frozen_peft.utils.stopwatch import Mode

# Any trainer of TRL; a type checker is told of the one whose hooks they have in common.
if TYPE_CHECKING:
    from trl import SFTTrainer as Trainer
else:
    Trainer = object

__all__ = ["FrozenContextMixin"]


class FrozenContextMixin(Trainer):
    """Trains decisions over frozen contexts. It stands before a trainer of TRL, whose hooks these are.

    Every hook calls the parent's:

    - `training_step` and `prediction_step` cut a batch into decisions, a conversation's in bounded numbers, and hand
      each part to TRL.
    - `_prepare_inputs` gives a part its frozen context, as the cache that a model can be called with: what reaches
      `compute_loss`, TRL's or one that overrides it, is what the loss is to be computed from.
    - `compute_loss_context_manager` has the model's forwards run as such a batch needs it, and `compute_loss` takes
      batches of samples too.
    - `get_train_dataloader` has batches cut where they are made, and `get_batch_samples` announces them.
    - `_get_train_sampler` orders samples by their contexts, with `group_by_context`.
    - `train` and `_load_from_checkpoint` go on from whole checkpoints; `_save_checkpoint`, with `_get_output_dir`,
      `_push_from_checkpoint` and `_save`, writes them; `_run_epoch` does not train a run further that had ended.
    - `evaluate`, `evaluation_loop` and `log` leave training as it was, and say where time went.
    - `_build_accelerator_args` keeps accelerate from compiling the model as one, since a compiler would trace how
      contexts are handed over, and compile each of their lengths; layers are compiled one by one.

    A trainer calls `_train_over` when it has been made.
    """

    args: ContextFields
    model: torch.nn.Module
    data_collator: Any
    current_gradient_accumulation_steps: int
    aux_loss_enabled: bool

    _frozen: FrozenContexts
    _forwards: DecisionForwards
    # What is kept of earlier steps, by its name in a checkpoint.
    _memories: dict[str, ContextEncoder | Teacher]
    # What accelerate was to compile with.
    _compiler: TorchDynamoPlugin
    _context_sampler: GroupByContextSampler | None = None
    # The batch that was prepared last, until its loss is computed.
    _prepared: LiveBatch | None = None
    # Made when training begins; what runs before that is not counted.
    _step_times: StepTimes | None = None
    # Where a checkpoint is being written; None: nowhere.
    _part_dir: Path | None = None

    def _train_over(
        self,
        cutter: BatchCutter,
        checks: BatchChecks,
        distiller: Distiller | None = None,
        *,
        store: ContextStore | None = None,
    ) -> None:
        """Settles what becomes of batches, once model and engine are known.

        Args:
            cutter: Cuts them.
            checks: Of what is computed of them.
            distiller: Makes the loss, with distillation.
            store: Keeps contexts; None: nothing does.
        """
        encoder = None
        if self.args.gradient_horizon != -1:
            encoder = ContextEncoder(
                self.model,
                chunk_size=self.args.prefill_chunk_size,
                adapters=self.args.context_adapters,
                store=store,
            )
        self._frozen = FrozenContexts(self.model, self.args, cutter, checks, self.accelerator, encoder)
        self._forwards = DecisionForwards(
            self.model, self.args, checks, self.accelerator, distiller, partial(logged_metrics, self)
        )
        self._memories = {}
        if encoder is not None:
            self._memories["contexts"] = encoder
        if distiller is not None:
            self._memories["teacher"] = distiller.teacher

    def _settled(self, batches: list[SampleBatch], mode: Mode) -> list[SampleBatch]:
        """Batches of one step, in which it is settled what the model is to answer itself."""
        return batches

    def _answered(self, batch: SampleBatch, mode: Mode) -> SampleBatch:
        """A batch with what the model answers to its samples, where it is to write that itself."""
        return batch

    def _completed(self, part: DecisionBatch) -> DecisionBatch:
        """A part with what else its loss takes from it, before its contexts are encoded."""
        return part

    def _target(self, part: DecisionBatch, inputs: dict[str, Any]) -> Answers | None:
        """What a teacher says about a batch, where there is one."""
        return None

    def _carried(self, contexts: FrozenContexts, part: DecisionBatch) -> list[Carried]:
        """The decisions of a part over their frozen contexts."""
        step, mode = self.state.global_step, self._mode
        return contexts.carried(part, step=step, mode=mode, is_training=self.model.training)

    def _carrying(self, part: DecisionBatch, carried: list[Carried]) -> dict[str, Any]:
        """What the model can be called with."""
        if not carried:
            return dict(part)
        own = carried[0]
        cache = as_cache_argument(get_pretrained_model(self.model), own.frozen)
        return {**part, "position_ids": own.position_ids, **cache}

    def _encode_again(self, part: DecisionBatch, carried: list[Carried]) -> EncodeAgain | None:
        """How contexts are encoded for forwards in which adapters are not what they are in training."""
        if not self.args.context_adapters:
            return None
        return lambda each: self._frozen.encode_as_now(each.contexts)

    def _encode_elsewhere(self, part: DecisionBatch, carried: list[Carried]) -> EncodeAgain | None:
        """The same for another model that a loss calls, where there is one."""
        return None

    def _read_ahead(self) -> None:
        self._frozen.read_ahead()

    def _count_tokens(self, part: DecisionBatch) -> None:
        """Counts what TRL does not see of a batch."""

    @property
    def _mode(self) -> Mode:
        """Under which TRL keeps the metrics of what runs now."""
        return "train" if self.model.training else "eval"

    def _timed(self, part: Part) -> AbstractContextManager[None]:
        return nullcontext() if self._step_times is None else self._step_times.running(part)

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        """TRL's, whose batches are cut where they are made."""
        collator = self.data_collator
        self.data_collator = self._frozen.cutting(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[SampleBatch], torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, which are announced."""
        with self._timed("data"):
            batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
            batches = self._settled([self._frozen.cutter.cut(batch) for batch in batches], "train")
            if batches:
                self._expect(batches)
        return batches, num_items_in_batch

    def _expect(self, batches: list[SampleBatch]) -> None:
        self._frozen.expect(batches, step=self.state.global_step)

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
        batch = self._frozen.cutter.cut(inputs)
        with self._timed("compute"), self._frozen.timed("train"), advice_on_memory(self.args):
            self._read_ahead()
            parts = self._frozen.cutter.parts(self._answered(batch, "train"))
            parts = as_many_everywhere(self.accelerator, parts, self._frozen.cutter)
            self._count_tokens(parts[0])
            return self._train_parts(model, parts, num_items_in_batch)

    def _train_parts(
        self, model: torch.nn.Module, parts: list[DecisionBatch], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Forward and backward of one part after the other; gradients and loss are those of all of them together."""
        if num_items_in_batch is None and len(parts) > 1:
            num_items_in_batch = sum(map(num_labels, parts))
        # TRL averages the auxiliary loss of a mixture of experts over this many forwards, and transformers a loss of
        # the user's own that is a mean.
        is_mean = self.aux_loss_enabled or self.loss_is_scaled_for_ga is False
        steps = self.current_gradient_accumulation_steps
        losses = []
        for index, part in enumerate(parts):
            self.current_gradient_accumulation_steps = steps * (len(parts) if is_mean else 1)
            is_last = index == len(parts) - 1
            try:
                with nullcontext() if is_last else adding_up(self.accelerator, model):
                    losses.append(super().training_step(model, part, num_items_in_batch))
                    # Where weights are in shards, these run backward by themselves.
                    finish_stretches(self._forwards.pending)
            finally:
                self.current_gradient_accumulation_steps = steps
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Prediction:
        """TRL's, on decisions, which become one row per sample again; see `predictions`."""
        self._frozen.require_own_model(self.accelerator.unwrap_model(model), inputs)
        batch = self._frozen.cutter.cut(inputs)
        if self._frozen.cutter.max_decisions is not None:
            self._frozen.expect([batch], step=self.state.global_step)
        steps = []
        with advice_on_memory(self.args, evaluation=True), self._frozen.timed("eval"):
            batch = self._answered(batch, "eval")
            own = self._frozen.cutter.parts(batch)
            for part in as_many_everywhere(self.accelerator, own, self._frozen.cutter):
                steps.append(super().prediction_step(model, part, prediction_loss_only, ignore_keys=ignore_keys))
        if not batch.samples:
            return steps[0]
        rows = SampleRows.of(own, list(map(len, batch.samples)))
        if "inputs" in self.args.include_for_metrics:
            # From here the evaluation loop takes a metric's inputs, once a batch is predicted.
            inputs.update(rows.inputs(own, self._frozen.cutter.pad_token_id))
        return join_predictions(steps[: len(own)], own, rows)

    # Losses

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, DecisionBatch):
            return super()._prepare_inputs(inputs)
        part = self._completed(inputs.with_inputs(super()._prepare_inputs(dict(inputs))))
        carried = self._carried(self._frozen, part)
        ready = self._carrying(part, carried)
        with self.accelerator.autocast():
            target = self._target(part, ready)
        again, elsewhere = self._encode_again(part, carried), self._encode_elsewhere(part, carried)
        self._prepared = LiveBatch(ready, target, carried, again, elsewhere)
        return ready

    def compute_loss_context_manager(self) -> ExitStack:
        """TRL's, and what forwards of the batch that `_prepare_inputs` made last have to run in."""
        stack: ExitStack = super().compute_loss_context_manager()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            stack.enter_context(self._forwards.of(prepared))
        return stack

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
        self._frozen.require_own_model(self.accelerator.unwrap_model(model), inputs)
        stretching = live.stretching
        if stretching is not None and not return_outputs:
            inputs, stretching.first_output = from_first_label(inputs)
        try:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        finally:
            if stretching is not None:
                stretching.first_output = 0

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
        self._frozen.require_own_model(self.accelerator.unwrap_model(model), inputs)
        parts = self._frozen.cutter.parts(self._answered(self._frozen.cutter.cut(inputs), self._mode))
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
                # Not `self.compute_loss`, which may be a user's own and has called this.
                losses.append(FrozenContextMixin.compute_loss(self, model, batch, return_outputs, num_items_in_batch))
        return losses[0] if len(losses) == 1 else sum(losses)

    # Runs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's, from the checkpoint that `checkpoint_to_resume` chooses, timed from here."""
        self._step_times = StepTimes(self.args.device)
        require_no_way_out(self.args.output_dir)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            read_history(Path(checkpoint), self.args.process_index, self._memories)
        return super().train(checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if not self.args.group_by_context:
            return super()._get_train_sampler(train_dataset)
        steps, size = self.args.gradient_accumulation_steps, micro_batch_size(self)
        num_processes = self.get_total_train_batch_size(self.args) // (size * steps)
        self._context_sampler = make_sampler(
            self.train_dataset if train_dataset is None else train_dataset,
            self.args,
            batch_size=size // (num_processes if self.accelerator.split_batches else 1),
            num_processes=num_processes,
            start=self._frozen.cutter.cut_at.start,
        )
        return self._context_sampler

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> Any:
        # transformers 5.23 takes one more step when it goes on from the last checkpoint of a run whose `max_steps` end
        # within an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        # Behind the batches that a resumed run skips, with several processes, neither transformers 5.23 nor
        # accelerate 1.15 reaches a sampler to tell it the epoch.
        if self._context_sampler is not None:
            self._context_sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's, timed."""
        with self._timed("evaluation"):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, of a model that is put in shards first, or that training prepares anew."""
        with evaluated_as_trained(self):
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the figures of `ContextMetrics`, and of `StepTimes` for training, the last log included."""
        for name, value in self._figures().items():
            logged_metrics(self)[name] = [value]
        if self._step_times is not None and ("loss" in logs or "train_runtime" in logs):
            logs |= self._step_times.read()
        super().log(logs, start_time)

    def _figures(self, seconds_elsewhere: float = 0.0) -> dict[str, float]:
        return self._frozen.figures(self._mode, seconds_elsewhere=seconds_elsewhere)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        # By `torch_compile`, or by the file that `accelerate launch` was given.
        self._compiler, arguments["dynamo_plugin"] = arguments["dynamo_plugin"], TorchDynamoPlugin(backend="no")
        return arguments

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._part_dir is None else str(self._part_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        save = super()._save_checkpoint
        with self._timed("saving"):
            # The run that goes on from this checkpoint has no more than what is in it; so neither has this one.
            for memory in self._memories.values():
                memory.forget()
            final = save_whole_checkpoint(self, partial(save, model, trial), Path(super()._get_output_dir(trial)))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # It uploads in the background, so not from a folder that is about to be renamed.
        if self._part_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        in_place = self._part_dir is not None or not self.args.should_save
        with nullcontext(folder) if in_place else whole_files(folder) as part:
            super()._save(str(part), state_dict)
            if self.args.should_save:
                # What is known of an adapter's base, for merging.
                save_base_record(self.accelerator.unwrap_model(self.model), part)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(unwrapped := self.accelerator.unwrap_model(self.model), PeftModel):
            require_repeated_change(unwrapped, Path(resume_from_checkpoint))

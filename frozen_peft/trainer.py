# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's `SFTTrainer`, with contexts encoded once and read-only."""

import copy
import inspect
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl import SFTTrainer

from frozen_peft.adapters import keep_linear4bit_trainable, log_quantization, restrict_adapter_rows
from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import (
    FrozenContext,
    SplitBatch,
    decision_forward,
    encode_context,
    split_batch,
    use_segmented_attention,
    verify_context,
)
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.models import get_decoder, get_pretrained_model, require_exact_continuation
from frozen_peft.gradient import group_checkpoints
from frozen_peft.samples import SampleLimits, check_samples, limit_length, require_rows
from frozen_peft.sampling import GroupByContextSampler, group_by_shared_prefix, require_groupable

__all__ = ["FrozenContextTrainer"]

logger = logging.get_logger(__name__)

# What a collator may put into a batch for samples that have a context.
TOKEN_KEYS = {"input_ids", "labels", "attention_mask"}
# What a collator adds that flattens samples into one row.
FLATTENED_KEYS = {"position_ids", "cu_seq_lens_q", "seq_idx"}


class FrozenContextTrainer(SFTTrainer):
    """`SFTTrainer` that encodes each sample's context without gradient and trains the decision behind it.

    Takes what `SFTTrainer` takes, in the same order; `args` may be a `FrozenContextConfig`, or a plain `SFTConfig` or
    `TrainingArguments`, which is converted. Everything is inherited but these hooks, which add to the parent's:

    - `compute_loss` and `prediction_step` turn a batch into a batch of decisions that carries its frozen context as
      `past_key_values`, and let TRL compute the loss, the metrics and the logits from that.
    - `training_step` makes activation checkpoints span `checkpoint_every` layers.
    - `_prepare_dataset` cuts contexts where TRL would cut decisions, and checks every sample.
    - `_get_train_sampler` and `_run_epoch` order the samples with `group_by_context`.

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
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = FrozenContextConfig(f"{name.rstrip('/').rsplit('/', 1)[-1]}-FrozenContext")
        elif not isinstance(args, FrozenContextConfig):
            args = FrozenContextConfig.from_training_arguments(args)
        require_rows(train_dataset, "train")
        for name, dataset in _named(eval_dataset).items():
            require_rows(dataset, name)
        if args.group_by_context:
            require_groupable(train_dataset)
        if args.gradient_horizon != -1 and not isinstance(model, str):
            require_exact_continuation(get_pretrained_model(model))
        self._max_positions: int | None = None
        self._context_verified = False
        self._context_sampler: GroupByContextSampler | None = None
        self.aux_loss_enabled: bool

        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *positional, **kwargs)

        pretrained = get_pretrained_model(self.model)
        self._freezes_context = self.args.gradient_horizon != -1
        self._max_positions = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None)
        for name, dataset in {"train": self.train_dataset, **_named(self.eval_dataset)}.items():
            if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
                self._check_samples(dataset, name)
        self._settle_auxiliary_loss(pretrained.config.get_text_config())
        restrict_adapter_rows(self.model)
        if getattr(pretrained, "is_loaded_in_4bit", False):
            keep_linear4bit_trainable(self.model)
            log_quantization(pretrained)
        choose_kernels(pretrained)
        if self._freezes_context:
            require_exact_continuation(pretrained)
            self._require_adapters_to_switch()
            use_segmented_attention(self.model)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of the decisions in a batch, over their frozen contexts."""
        inputs = self._freeze_contexts(model, inputs)
        frozen = isinstance(inputs.get("past_key_values"), FrozenContext)
        with decision_forward(self.accelerator.unwrap_model(model)) if frozen else nullcontext():
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """TRL's, on decisions, so that the logits and labels it returns belong to each other."""
        inputs = self._freeze_contexts(model, self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's, with checkpoints over `checkpoint_every` layers; they exist from the first step on."""
        if self.args.checkpoint_every > 1:
            group_checkpoints(get_decoder(get_pretrained_model(self.model)), self.args.checkpoint_every)
        return super().training_step(*args, **kwargs)

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
        uncut = copy.copy(args)
        uncut.max_length = args.max_length if packing else None
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, packing, formatting_func, dataset_name)
        if args.max_length is not None and not packing:
            dataset = limit_length(dataset, args.max_length, dataset_name, args.dataset_num_proc)
        return self._check_samples(dataset, dataset_name, args, packing)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if not self.args.group_by_context:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        accumulation_steps = self.args.gradient_accumulation_steps
        num_processes = self.get_total_train_batch_size(self.args) // (self._train_batch_size * accumulation_steps)
        groups = group_by_shared_prefix(
            dataset, decision_mode=self.args.decision_mode, max_context_length=self.args.max_context_length
        )
        num_groups = len(set(groups[:, 0].tolist()))
        if num_groups == len(dataset):
            logger.warning("`group_by_context=True` has no effect: no two contexts begin alike for long enough.")
        else:
            logger.info(f"`group_by_context`: {len(dataset)} samples in {num_groups} groups.")
        self._context_sampler = GroupByContextSampler(
            groups,
            batch_size=self._train_batch_size // (num_processes if self.accelerator.split_batches else 1),
            accumulation_steps=accumulation_steps,
            num_processes=num_processes,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        return self._context_sampler

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> Any:
        # Behind the batches that a resumed run skips, with several processes, neither transformers 5.23 nor
        # accelerate 1.15 reaches a sampler to tell it the epoch.
        if self._context_sampler is not None:
            self._context_sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _check_samples(
        self,
        dataset: Dataset | IterableDataset,
        name: str,
        args: FrozenContextConfig | None = None,
        packing: bool = False,
    ) -> Dataset | IterableDataset:
        args = args or self.args
        limits = SampleLimits(
            frozen=args.gradient_horizon != -1,
            flattened=packing or self.padding_free,
            max_positions=self._max_positions,
            max_length=args.max_length,
            max_context_length=args.max_context_length,
        )
        return check_samples(dataset, name, limits)

    def _settle_auxiliary_loss(self, config: PretrainedConfig) -> None:
        """Lets TRL find the number of experts, and asks for no auxiliary loss where there are none.

        trl 1.16 reads `num_experts` off every mixture-of-experts configuration. Granite calls it `num_local_experts`,
        and its dense models (0 experts) declare an auxiliary loss all the same. It can go when TRL knows both.
        """
        if not self.aux_loss_enabled:
            return
        if not hasattr(config, "num_experts"):
            config.num_experts = config.num_local_experts
        if not config.num_experts:
            self.aux_loss_enabled = config.output_router_logits = False

    def _require_adapters_to_switch(self) -> None:
        if not self.args.context_adapters and not isinstance(self.model, PeftModel):
            raise ValueError(
                "`context_adapters=False` encodes contexts with the adapters switched off, and this model has none. "
                "Pass `peft_config`, or leave `context_adapters=True`."
            )

    def _freeze_contexts(self, model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Turns a batch of samples into a batch of decisions that carries its frozen context.

        Args:
            model: The model as it is trained, wrapped or not.
            inputs: What the collator made: `input_ids`, `labels` and `attention_mask` of shape `(samples, tokens)`.

        Returns:
            The same where nothing is to be frozen, or was already.
        """
        nothing_to_cut = not self._freezes_context and self.args.max_context_length is None
        if nothing_to_cut or "labels" not in inputs or "past_key_values" in inputs:
            return inputs
        if FLATTENED_KEYS & inputs.keys():
            self._require_no_context(inputs)
            return inputs
        batch = split_batch(
            inputs["input_ids"],
            inputs["labels"],
            inputs.get("attention_mask"),
            gradient_horizon=self.args.gradient_horizon,
            max_context_length=self.args.max_context_length,
            pad_token_id=self._tokenizer.pad_token_id or 0,
        )
        if self._freezes_context and self.model.training:
            self._count_context_tokens(batch.num_context_tokens, inputs["input_ids"].device)
        decisions = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
        if not batch.num_context_tokens:
            return {**inputs, **decisions} if self.args.max_context_length is not None else inputs
        unknown = inputs.keys() - TOKEN_KEYS
        if unknown:
            raise ValueError(
                f"The collator put {', '.join(f'`{key}`' for key in sorted(unknown))} into a batch whose samples have "
                f"contexts; only {', '.join(f'`{key}`' for key in sorted(TOKEN_KEYS))} can be cut at a boundary. Use "
                "another `data_collator`, or train with `tier: 1`."
            )
        frozen = self._encode(self.accelerator.unwrap_model(model), batch)
        return {**decisions, "position_ids": batch.position_ids, "past_key_values": frozen}

    def _encode(self, model: torch.nn.Module, batch: SplitBatch) -> FrozenContext:
        options = {"chunk_size": self.args.prefill_chunk_size, "adapters": self.args.context_adapters}
        with self.accelerator.autocast():
            if self.args.verify_context == "always" or (
                self.args.verify_context == "first_batch" and not self._context_verified
            ):
                row = max(range(len(batch.contexts)), key=lambda index: len(batch.contexts[index]))
                decision = batch.input_ids[row][batch.attention_mask[row].bool()]
                input_ids = torch.cat([batch.contexts[row], decision])
                check = verify_context(model, input_ids, len(batch.contexts[row]), **options)
                logger.info(f"The decision over a frozen context agrees with a plain forward: {check}")
                self._context_verified = True
            return encode_context(model, batch.contexts, **options)

    def _count_context_tokens(self, num_tokens: int, device: torch.device) -> None:
        """Adds to `num_tokens`, which TRL counts from the attention mask and so from decisions only."""
        counted = self.accelerator.gather_for_metrics(torch.tensor(num_tokens, device=device)).sum().item()
        self._total_train_tokens += int(counted) // self._tp_size

    def _require_no_context(self, inputs: dict[str, Any]) -> None:
        starts = inputs["position_ids"][0] == 0 if "position_ids" in inputs else None
        supervised = inputs["labels"][0] != -100
        if starts is not None and not bool(supervised[1:][~starts[1:] & starts[:-1]].all()):
            raise ValueError(
                "A flattened batch (`packing`, `padding_free` or a collator that does the same) holds a sample with a "
                "context, and contexts cannot be told apart there. Set both to False, or train with `tier: 1`."
            )


def _named(datasets: Any) -> dict[str, Any]:
    """Datasets by name, given as one, a dictionary or None."""
    if datasets is None:
        return {}
    return dict(datasets) if isinstance(datasets, dict) else {"eval": datasets}

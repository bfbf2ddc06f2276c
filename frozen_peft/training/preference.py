# SPDX-License-Identifier: Apache-2.0
"""What trainers of preferences share: answers behind one frozen context, and a reference with contexts of its own."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments

from frozen_peft.adapters import BaseSamples, active_everywhere
from frozen_peft.context import TAIL, Carried, Cut, EncodeAgain, FrozenContext, carried_context
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.sharding import are_sharded
from frozen_peft.data import as_table, needs_python_rows, python_rows
from frozen_peft.training.batches import BatchCutter, DecisionBatch, SampleBatch
from frozen_peft.training.checks import BatchChecks
from frozen_peft.training.frozen import FrozenContexts, make_store
from frozen_peft.training.mixin import FrozenContextMixin
from frozen_peft.training.model_setup import (
    check_model,
    check_parts,
    given_invocation,
    make_config,
    make_cut,
    named_datasets,
    prepare_model,
    sample_base,
)
from frozen_peft.training.pairs import PROMPT, AnswerLimits, check_answers, limit_prompts, require_columns
from frozen_peft.training.preference_fields import PreferenceFields
from frozen_peft.training.reference import Reference
from frozen_peft.training.samples import require_rows
from frozen_peft.training.sampling import require_groupable
from frozen_peft.utils.compat.trl import count_tokens, precomputed_for, trainer_tokenizer

__all__ = ["PreferenceMixin"]


class PreferenceMixin(FrozenContextMixin):
    """Stands before a trainer of TRL that compares a policy with a reference.

    Beside the hooks of `FrozenContextMixin`, these:

    - `_prepare_dataset` cuts prompts where TRL would cut answers, and checks every row.
    - `_precompute_ref_logps` and `compute_ref_log_probs` run over frozen contexts too.
    - `_compute_loss` is told what the reference says, whose contexts are gone before the policy's are encoded.
    - `get_train_dataloader` has the reference's contexts read ahead as well.
    """

    # Set by each trainer: its configuration, columns of answers, of which the first two may have to differ, what
    # `compute_ref_log_probs` gives, what else of a row a batch holds, and what the keys of further answers to its
    # prompts begin with.
    _config_class: ClassVar[type[PreferenceFields]]
    _answers: ClassVar[tuple[str, ...]]
    _must_differ: ClassVar[bool] = False
    _said: ClassVar[tuple[str, ...]]
    _row_keys: ClassVar[frozenset[str]] = frozenset()
    _beside: ClassVar[tuple[str, ...]] = ()

    ref_model: PreTrainedModel | None
    precompute_ref_logps: bool
    _reference: Reference
    # Contexts as the reference encodes them; None: it has the policy's.
    _reference_contexts: FrozenContexts | None = None
    # What it says of the batch prepared last.
    _compared: Mapping[str, Any] = MappingProxyType({})
    _is_settled = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceFields | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        *positional: Any,
        **kwargs: Any,
    ):
        args = make_config(model, args, self._config_class)
        for name, dataset in {"train": train_dataset, **named_datasets(eval_dataset)}.items():
            require_rows(dataset, name)
        if args.group_by_context:
            require_groupable(train_dataset)
        given = (model, ref_model, args, data_collator, train_dataset, eval_dataset, *positional)
        peft_config = type(self).__signature__.bind_partial(*given, **kwargs).arguments.get("peft_config")
        check_model(model, args, adapters_come=peft_config is not None or bool(positional), peft_config=peft_config)
        Reference.require_plain(ref_model)
        if ref_model is not None:
            check_parts(ref_model, args)
        self._base_before = sample_base(model, args)
        # PEFT's initialisations may change the model that adapters are put on.
        self._reference_before = None
        if isinstance(model, PreTrainedModel) and peft_config is not None and ref_model is None:
            self._reference_before = BaseSamples(model)
        self._invocation = given_invocation(model, peft_config, args)
        self._cut = TAIL

        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *positional, **kwargs)

        self._settle()
        text_config = get_pretrained_model(self.model).config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        for name, dataset in {"train": self.train_dataset, **named_datasets(self.eval_dataset)}.items():
            if isinstance(dataset, Dataset) and PROMPT in dataset.column_names:
                check_answers(dataset, name, self._limits(self.args, positions))

    def _settle(self) -> None:
        """Makes what trains over contexts, once TRL has made model, engine and reference."""
        if self._is_settled:
            return
        self._is_settled = True
        args, tokenizer = self.args, trainer_tokenizer(self)
        self._cut = make_cut(args, tokenizer, self._invocation)
        prepare_model(self, self._cut, self._base_before)
        self._reference = Reference.of(self)
        self._reference.require_kept(self._reference_before, beforehand=self.precompute_ref_logps)
        checks = BatchChecks(args)
        cutter = BatchCutter(
            self._cut,
            None,
            tokenizer.pad_token_id or 0,
            supervision="completion_mask",
            kept_keys=self._row_keys | {*self._said},
            beside=self._beside,
        )
        freezes = args.gradient_horizon != -1
        has_own = freezes and self._reference.has_own_contexts(args)
        # Of what is kept in memory: a policy that learns in contexts too has nothing to keep beyond a step.
        keeps = has_own and not self.precompute_ref_logps and not self._reference.is_synced
        lasting = not args.context_adapters or bool(args.max_context_staleness)
        share = (0.5 if lasting else 0.0) if keeps else 1.0
        self._train_over(cutter, checks, store=make_store(args, share))
        self._forwards.other_model = None if self._reference.is_policy_model else self._reference.model
        if has_own:
            encoder = self._reference.encoder(args, make_store(args, 1.0 - share))
            model = self._reference.model
            self._reference_contexts = FrozenContexts(
                model, args, cutter, checks, self.accelerator, encoder, "reference"
            )
            self._memories["reference"] = encoder

    @property
    def cut(self) -> Cut:
        """Where prompts and answers are cut."""
        return self._cut

    # Data

    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset, processing_class: Any, args: PreferenceFields, dataset_name: str
    ) -> Dataset | IterableDataset:
        self._cut = make_cut(args, getattr(processing_class, "tokenizer", processing_class), self._invocation)
        # TRL would cut at the end of a sequence, where the answer is, and drop prompts that are as long.
        uncut = copy.copy(args)
        uncut.max_length = None
        first = next(iter(dataset))
        if PROMPT in first:
            require_columns(first, self._required(args), dataset_name)
        else:
            exactly = needs_python_rows(dataset)
            rows = python_rows(dataset, args.dataset_num_proc) if exactly else dataset
            prepared = super()._prepare_dataset(rows, processing_class, uncut, dataset_name)
            names = (PROMPT, *self._answers, *self._said, *self._row_keys)
            dataset = as_table(prepared, dataset, names) if exactly else prepared
        limits = self._limits(args)
        dataset = limit_prompts(dataset, dataset_name, args.dataset_num_proc, limits)
        return check_answers(dataset, dataset_name, limits)

    def _required(self, args: PreferenceFields) -> tuple[str, ...]:
        """Columns that a prepared row has."""
        return self._answers

    def _limits(self, args: PreferenceFields, max_positions: int | None = None) -> AnswerLimits:
        return AnswerLimits(self._answers, self._must_differ, max_positions, args.max_length, self._cut)

    # The reference

    @property
    def _contexts_to_compare(self) -> FrozenContexts | None:
        """The contexts over which a step's loss runs the reference; None: the policy's, or it is not run."""
        return None if self.precompute_ref_logps else self._reference_contexts

    def _expect(self, batches: list[SampleBatch]) -> None:
        super()._expect(batches)
        if (contexts := self._contexts_to_compare) is not None:
            contexts.expect(batches, step=self.state.global_step)

    def _read_ahead(self) -> None:
        super()._read_ahead()
        if (contexts := self._contexts_to_compare) is not None:
            contexts.read_ahead()

    def get_train_dataloader(self) -> DataLoader:
        """The mixin's, whose batches both kinds of contexts are read ahead for."""
        dataloader = super().get_train_dataloader()
        if self._reference_contexts is not None:
            self._reference_contexts.follow(self._frozen)
        return dataloader

    @property
    def _compares_beforehand(self) -> bool:
        """Whether a step's loss is told what the reference says, and does not run it.

        Not with stretches, which run a loss's forwards alone, nor with weights in shards, where a loss of one's own
        that runs it could not have contexts encoded by then, which all processes do together.
        """
        runs = self.args.sequence_chunk_size is not None or are_sharded(self.model)
        return self._contexts_to_compare is not None and not runs

    def _completed(self, part: DecisionBatch) -> DecisionBatch:
        self._compared = {}
        if not self._compares_beforehand:
            return part
        said = zip(self._said, self._said_by_reference(self.ref_model or self.model, part), strict=True)
        self._compared = {name: log_probs for name, log_probs in said if log_probs is not None}
        return part.with_inputs({**part, **self._compared})

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's, which takes what the reference says from a batch that holds it."""
        compared, beforehand = self._compared, self.precompute_ref_logps
        is_told = bool(compared) and all(inputs.get(name) is value for name, value in compared.items())
        self.precompute_ref_logps = beforehand or is_told
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = beforehand

    def _encoded_by_reference(self, part: DecisionBatch) -> EncodeAgain | None:
        """A batch's contexts as the reference encodes them, for a loss that runs it."""
        contexts = self._contexts_to_compare
        if contexts is None:
            return None

        @cache
        def encoded() -> dict[int, FrozenContext]:
            with self._reference.active():
                return {id(own.input_ids): own.frozen for own in self._carried(contexts, part)}

        if not self._compares_beforehand:
            # Now, and not when they are asked for: processes that share weights in shards do so together.
            encoded()
        return lambda each: encoded()[id(each.input_ids)]

    def _encode_again(self, part: DecisionBatch, carried: list[Carried]) -> EncodeAgain | None:
        otherwise = super()._encode_again(part, carried)
        if not self._reference.is_policy_model or otherwise is None:
            return otherwise
        by_reference = self._encoded_by_reference(part)
        if by_reference is None:
            return otherwise
        return lambda each: by_reference(each) if self._reference.is_active() else otherwise(each)

    def _encode_elsewhere(self, part: DecisionBatch, carried: list[Carried]) -> EncodeAgain | None:
        return None if self._reference.is_policy_model else self._encoded_by_reference(part)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # TRL calls it before it is done.
        self._settle()
        args = self.args
        start = args.keep_context_start if args.max_context_length is not None else None
        # TRL's file of log-probabilities depends on these, `ld_alpha` included, and does not say so.
        facts = Hasher.hash((args.max_context_length, start, args.context_adapters, getattr(args, "ld_alpha", None)))
        with precomputed_for(self, facts):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, of the decisions in a batch over their contexts as the reference encodes them."""
        self._settle()
        (part,) = self._frozen.cutter.parts(self._frozen.cutter.cut(inputs))
        return self._said_by_reference(model, part)

    def _said_by_reference(self, model: Any, part: DecisionBatch) -> Any:
        """Log-probabilities of answers, by the names of `_said`."""
        with self._reference.active():
            carried = self._carried(self._reference_contexts or self._frozen, part)
        ready, of_reference = self._carrying(part, carried), self._reference.model
        with ExitStack() as stack:
            if not self.args.context_adapters:
                stack.enter_context(active_everywhere(self.model))
            stack.enter_context(carried_context(of_reference, carried, of_another=True))
            stack.enter_context(self._forwards.whole(of_reference, ready))
            return super().compute_ref_log_probs(model, ready)

    # Figures

    def _count_tokens(self, part: DecisionBatch) -> None:
        count_tokens(self, part.num_context_tokens)

    def _figures(self, seconds_elsewhere: float = 0.0) -> dict[str, float]:
        contexts = self._reference_contexts
        of_reference = contexts.figures(self._mode) if contexts is not None else {}
        seconds = of_reference.get("reference/prefill_seconds", 0.0)
        return of_reference | super()._figures(seconds_elsewhere + seconds)

# SPDX-License-Identifier: Apache-2.0
"""What the trainer settles about its model and its data before the first step."""

from typing import Any, TypeAlias, TypeVar

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from frozen_peft.adapters import (
    BaseSamples,
    activate_at_invocation,
    find_invocation,
    keep_linear4bit_trainable,
    require_always_active,
    require_base,
    restrict_adapter_rows,
)
from frozen_peft.config import ContextFields
from frozen_peft.context import Cut, require_untouched_base, use_segmented_attention
from frozen_peft.context.adapter_kinds import require_adapter_by_position, require_adapters_by_position
from frozen_peft.context.dropout import require_all_layers
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.models import get_pretrained_model, require_exact_continuation, require_weights_at_hand
from frozen_peft.context.start import NO_START, find_start
from frozen_peft.training.engines import check_engine, compile_as_asked, describe_machine, require_same
from frozen_peft.utils.compat.trl import complete_head, has_auxiliary_loss

__all__ = [
    "check_model",
    "check_parts",
    "given_invocation",
    "make_config",
    "make_cut",
    "named_datasets",
    "prepare_model",
    "sample_base",
]

Model: TypeAlias = str | PreTrainedModel | PeftModel
Configuration = TypeVar("Configuration", bound=ContextFields)


def make_config(model: Model, args: TrainingArguments | None, kind: type[Configuration]) -> Configuration:
    """The configuration that was given, converted or, without one, named after the model."""
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        return kind(f"{name.rstrip('/').rsplit('/', 1)[-1]}-FrozenContext")
    return args if isinstance(args, kind) else kind.from_training_arguments(args)


def check_model(
    model: Model, args: ContextFields, *, adapters_come: bool, peft_config: PeftConfig | None = None
) -> None:
    """Refuses, before data is prepared, a model that cannot be trained as asked.

    Args:
        model: The model, or its name, of which nothing is known yet.
        args: The configuration.
        adapters_come: The model is, or may be, given adapters.
        peft_config: Those adapters, as far as they are known.
    """
    if not args.context_adapters:
        _require_adapters(isinstance(model, PeftModel) or adapters_come)
    if needed_for := args.base_needed_for:
        comes = {"default": peft_config} if peft_config is not None else {}
        require_base(model.peft_config if isinstance(model, PeftModel) else comes, needed_for)
    if peft_config is not None and args.runs_in_parts:
        require_adapter_by_position(peft_config)
    if not isinstance(model, str):
        check_parts(model, args)


def check_parts(model: torch.nn.Module, args: ContextFields) -> None:
    """Refuses a model that does not compute for the parts of a sample what it computes for the whole.

    Raises:
        ContextMismatchError: The architecture is known to continue inexactly.
        UnsupportedArchitectureError: The architecture has no cache to continue from.
        ValueError: Its weights are offloaded, its adapters act on the sequence as a whole, or whole layers are dropped
            at random.
    """
    pretrained = get_pretrained_model(model)
    require_weights_at_hand(pretrained)
    if not args.runs_in_parts:
        return
    require_exact_continuation(pretrained)
    require_all_layers(pretrained)
    require_adapters_by_position(model)


def sample_base(model: Model, args: ContextFields) -> BaseSamples | None:
    """What to compare a model with that PEFT has put adapters into; None where it has them, or nothing needs that."""
    return BaseSamples(model) if isinstance(model, PreTrainedModel) and args.base_needed_for else None


def given_invocation(model: Model, peft_config: Any, args: ContextFields) -> tuple[int, ...]:
    """Tokens that the adapter comes with and is switched on by; none where `invocation` says other ones."""
    adapter = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    given = getattr(adapter, "alora_invocation_tokens", None) if args.invocation is None else None
    return tuple(given or ())


def make_cut(args: ContextFields, tokenizer: PreTrainedTokenizerBase, invocation: tuple[int, ...]) -> Cut:
    """Where samples are cut, as the configuration says.

    Args:
        args: The configuration.
        tokenizer: Where the invocation is found when there is none yet, and the start of a context that stays.
        invocation: Tokens that the adapter is switched on by; empty: none are known.

    Raises:
        ValueError: There is no invocation, or no system message that could stay.
    """
    horizon = args.gradient_horizon
    assert horizon is not None, "the configuration resolves it"
    cuts = args.max_context_length is not None or args.max_length is not None
    start = find_start(tokenizer, args.keep_context_start) if cuts else NO_START
    if horizon == -1 and not args.renders_turns:
        # Nothing is frozen, and decisions in one sequence have the gradient of one each.
        return Cut("tail", -1, args.max_context_length, start=start)
    tokens = () if args.context_adapters else invocation or find_invocation(tokenizer, args.invocation)
    max_length = args.max_length if args.decision_mode == "turns" else None
    return Cut(args.decision_mode, horizon, args.max_context_length, max_length, tokens, start)


def _require_adapters(present: bool) -> None:
    """Refuses a model without adapters where contexts are encoded with them switched off."""
    if not present:
        raise ValueError(
            "`context_adapters=False` encodes contexts with the adapters switched off, and this model has none. "
            "Pass `peft_config`, or leave `context_adapters=True`."
        )


def prepare_model(trainer: Trainer, cut: Cut, base_before: BaseSamples | None) -> None:
    """Makes of a trainer's model, whose adapters and engine are known, one that contexts can be frozen for.

    Args:
        trainer: Made by TRL.
        cut: Where samples are cut.
        base_before: What `sample_base` returned before the model had adapters.

    Raises:
        ValueError: Model, engine and configuration do not go together.
    """
    model, args, pretrained = trainer.model, trainer.args, get_pretrained_model(trainer.model)
    freezes = args.gradient_horizon != -1
    complete_head(model, pretrained)
    if trainer.accelerator.num_processes > 1:
        # All of them compare, and refuse together.
        require_same(gather_object([describe_machine(args.device, pretrained.dtype)]))
    check_engine(trainer.accelerator, model, args)
    check_parts(model, args)
    if trainer.aux_loss_enabled:
        trainer.aux_loss_enabled = has_auxiliary_loss(pretrained.config.get_text_config())
    restrict_adapter_rows(model)
    if getattr(pretrained, "is_loaded_in_4bit", False):
        keep_linear4bit_trainable(model)
    choose_kernels(pretrained)
    if freezes and args.context_adapters:
        require_always_active(model)
    elif freezes:
        _require_adapters(isinstance(model, PeftModel))
        require_untouched_base(model)
        activate_at_invocation(model, cut.invocation)
    # With its adapters off it has to be its base, where the configuration needs that.
    if needed_for := args.base_needed_for:
        require_base(model, needed_for)
        if base_before is not None:
            base_before.require_kept(model, needed_for)
    if freezes or args.sequence_chunk_size is not None:
        use_segmented_attention(model)
    compile_as_asked(model, trainer.accelerator, trainer._compiler)


def named_datasets(datasets: Any) -> dict[str, Any]:
    """Datasets by name, given as one, a dictionary or None."""
    if datasets is None:
        return {}
    return dict(datasets) if isinstance(datasets, dict) else {"eval": datasets}

# SPDX-License-Identifier: Apache-2.0
"""What the trainer settles about its model and its data before the first step."""

from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from frozen_peft.adapters import (
    BaseSamples,
    activate_at_invocation,
    find_invocation,
    require_always_active,
    require_base,
)
from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import Cut, require_untouched_base
from frozen_peft.context.adapter_kinds import require_adapter_by_position, require_adapters_by_position
from frozen_peft.context.dropout import require_all_layers
from frozen_peft.context.models import get_pretrained_model, require_exact_continuation
from frozen_peft.context.start import NO_START, find_start

__all__ = [
    "base_needed_for",
    "check_model",
    "check_parts",
    "complete_head",
    "given_invocation",
    "has_auxiliary_loss",
    "make_config",
    "make_cut",
    "named_datasets",
    "require_kept_base",
    "sample_base",
    "settle_context_adapters",
]

Model: TypeAlias = str | PreTrainedModel | PeftModel


def make_config(model: Model, args: TrainingArguments | None) -> FrozenContextConfig:
    """The configuration that was given, converted or, without one, named after the model."""
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return FrozenContextConfig(f"{name.rstrip('/').rsplit('/', 1)[-1]}-FrozenContext")
    return args if isinstance(args, FrozenContextConfig) else FrozenContextConfig.from_training_arguments(args)


def check_model(
    model: Model, args: FrozenContextConfig, *, adapters_come: bool, peft_config: PeftConfig | None = None
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
    if needed_for := base_needed_for(args):
        comes = {"default": peft_config} if peft_config is not None else {}
        require_base(model.peft_config if isinstance(model, PeftModel) else comes, needed_for)
    if peft_config is not None and args.runs_in_parts:
        require_adapter_by_position(peft_config)
    if not isinstance(model, str):
        check_parts(model, args)


def check_parts(model: torch.nn.Module, args: FrozenContextConfig) -> None:
    """Refuses a model that does not compute for the parts of a sample what it computes for the whole.

    Raises:
        ContextMismatchError: The architecture is known to continue inexactly.
        UnsupportedArchitectureError: The architecture has no cache to continue from.
        ValueError: Its adapters act on the sequence as a whole, or whole layers are dropped at random.
    """
    if not args.runs_in_parts:
        return
    pretrained = get_pretrained_model(model)
    require_exact_continuation(pretrained)
    require_all_layers(pretrained)
    require_adapters_by_position(model)


def base_needed_for(args: FrozenContextConfig) -> str | None:
    """What a configuration has the model without its adapters for; None: nothing."""
    if not args.context_adapters:
        return "`context_adapters=False` encodes contexts by the base model"
    return "`loss_type='distill'` has the base model for a teacher" if args.loss_type == "distill" else None


def sample_base(model: Model, args: FrozenContextConfig) -> BaseSamples | None:
    """What to compare a model with that PEFT has put adapters into; None where it has them, or nothing needs that."""
    return BaseSamples(model) if isinstance(model, PreTrainedModel) and base_needed_for(args) else None


def require_kept_base(model: torch.nn.Module, args: FrozenContextConfig, before: BaseSamples | None) -> None:
    """Refuses a model that with its adapters off is not its base, where the configuration needs it to be.

    Args:
        model: The model with its adapters.
        args: The configuration.
        before: What `sample_base` returned before it had them.

    Raises:
        ValueError: It is another model.
    """
    needed_for = base_needed_for(args)
    if needed_for is None:
        return
    require_base(model, needed_for)
    if before is not None:
        before.require_kept(model, needed_for)


def given_invocation(model: Model, peft_config: Any, args: FrozenContextConfig) -> tuple[int, ...]:
    """Tokens that the adapter comes with and is switched on by; none where `invocation` says other ones."""
    adapter = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    given = getattr(adapter, "alora_invocation_tokens", None) if args.invocation is None else None
    return tuple(given or ())


def make_cut(args: FrozenContextConfig, tokenizer: PreTrainedTokenizerBase, invocation: tuple[int, ...]) -> Cut:
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
    if horizon == -1:
        # Nothing is frozen, and decisions in one sequence have the gradient of one each.
        return Cut("tail", -1, args.max_context_length, start=start)
    tokens = () if args.context_adapters else invocation or find_invocation(tokenizer, args.invocation)
    max_length = args.max_length if args.decision_mode == "turns" else None
    return Cut(args.decision_mode, horizon, args.max_context_length, max_length, tokens, start)


def settle_context_adapters(model: torch.nn.Module, *, active: bool, invocation: tuple[int, ...]) -> None:
    """Makes an adapter that is off in contexts one that is switched on by the invocation tokens.

    Raises:
        ValueError: The model's adapters cannot be on, or off, in contexts as asked.
    """
    if active:
        require_always_active(model)
        return
    _require_adapters(isinstance(model, PeftModel))
    require_untouched_base(model)
    activate_at_invocation(model, invocation)


def complete_head(model: torch.nn.Module) -> None:
    """Lets TRL read a head whose rows are trained together with the embedding's (`trainable_token_indices`, tied).

    trl 1.16 asks every head for its `bias`, and PEFT's wrapper of it (0.21) passes on the weight alone. It can go when
    either does without.

    Raises:
        ValueError: The head is trained as a whole, and some of its rows with the embedding's.
    """
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer) and isinstance(module.get_base_layer(), AuxiliaryTrainingWrapper):
            raise ValueError(
                f"`{name}` is trained as a whole (`modules_to_save`) and row by row (`trainable_token_indices`), and "
                "PEFT cannot run that. TRL asks for both where `chat_template_path` brings tokens and embedding and "
                "head are one matrix. Add the tokens yourself (`trl.clone_chat_template`), pass the model and the "
                "tokenizer that it returns without `chat_template_path`, and train the rows alone "
                "(`lora_config(model, trainable_token_indices=added_tokens)`)."
            )
    head = get_pretrained_model(model).get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
        head.bias = None


def _require_adapters(present: bool) -> None:
    """Refuses a model without adapters where contexts are encoded with them switched off."""
    if not present:
        raise ValueError(
            "`context_adapters=False` encodes contexts with the adapters switched off, and this model has none. "
            "Pass `peft_config`, or leave `context_adapters=True`."
        )


def has_auxiliary_loss(config: PretrainedConfig) -> bool:
    """Whether a configuration that declares an auxiliary loss has experts, whose number TRL can find afterwards.

    trl 1.16 reads `num_experts` off every mixture-of-experts configuration. Granite calls it `num_local_experts`, and
    its dense models (0 experts) declare an auxiliary loss all the same. It can go when TRL knows both.
    """
    if not hasattr(config, "num_experts"):
        config.num_experts = config.num_local_experts
    if not config.num_experts:
        config.output_router_logits = False
    return bool(config.num_experts)


def named_datasets(datasets: Any) -> dict[str, Any]:
    """Datasets by name, given as one, a dictionary or None."""
    if datasets is None:
        return {}
    return dict(datasets) if isinstance(datasets, dict) else {"eval": datasets}

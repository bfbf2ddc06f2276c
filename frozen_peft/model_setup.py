# SPDX-License-Identifier: Apache-2.0
"""What the trainer settles about its model and its data before the first step."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from frozen_peft.adapters import activate_at_invocation, find_invocation, require_always_active
from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import Cut, require_untouched_base

__all__ = ["has_auxiliary_loss", "make_cut", "named_datasets", "require_adapters", "settle_context_adapters"]


def make_cut(args: FrozenContextConfig, tokenizer: PreTrainedTokenizerBase, invocation: tuple[int, ...]) -> Cut:
    """Where samples are cut, as the configuration says.

    Args:
        args: The configuration.
        tokenizer: Where the invocation is found when there is none yet.
        invocation: Tokens that the adapter is switched on by; empty: none are known.
    """
    horizon = args.gradient_horizon
    assert horizon is not None, "the configuration resolves it"
    if horizon == -1:
        # Nothing is frozen, and decisions in one sequence have the gradient of one each.
        return Cut("tail", -1, args.max_context_length)
    tokens = () if args.context_adapters else invocation or find_invocation(tokenizer, args.invocation)
    max_length = args.max_length if args.decision_mode == "turns" else None
    return Cut(args.decision_mode, horizon, args.max_context_length, max_length, tokens)


def settle_context_adapters(model: torch.nn.Module, *, active: bool, invocation: tuple[int, ...]) -> None:
    """Makes an adapter that is off in contexts one that is switched on by the invocation tokens.

    Raises:
        ValueError: The model's adapters cannot be on, or off, in contexts as asked.
    """
    if active:
        require_always_active(model)
        return
    require_adapters(isinstance(model, PeftModel))
    require_untouched_base(model)
    activate_at_invocation(model, invocation)


def require_adapters(present: bool) -> None:
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

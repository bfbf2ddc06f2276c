# SPDX-License-Identifier: Apache-2.0
"""Adapters that are off in the context and on from the invocation tokens: PEFT's activated LoRA (arXiv 2504.12397).

Trained on frozen contexts, such an adapter never meets a context token: the context was encoded without it, and a
decision begins at the invocation tokens. Its layers therefore run as plain LoRA in the decision's forward. Everywhere
else they run as PEFT's own activated LoRA, which looks for the last invocation in each row: in the forward of a
trained model over a whole sequence, in generation, and wherever the saved adapter is loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from frozen_peft.adapters.lora import is_lora
from frozen_peft.utils.compat.peft import ALoraLinearVariant, set_variant

__all__ = ["activate_at_invocation", "active_everywhere", "find_invocation", "require_always_active"]

CANNOT_MERGE = (
    "An adapter trained with `context_adapters=False` cannot be merged: contexts were encoded by the base model, and "
    "merged weights would encode them with the adapter. Serve it as an activated LoRA (`alora_invocation_tokens`), or "
    "train with `context_adapters=True`."
)


class _ActivatedLora(ALoraLinearVariant):
    """PEFT's activated LoRA, which a forward without offsets runs at every token."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise ValueError(CANNOT_MERGE)

    merge_unsafe = merge_safe

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if kwargs.get("alora_offsets") is not None:
            return ALoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropped = module.lora_dropout[active_adapter](x.to(down.weight.dtype))
        return result + up(down(dropped)) * module.scaling[active_adapter]


def find_invocation(tokenizer: PreTrainedTokenizerBase, text: str | None) -> tuple[int, ...]:
    """Token ids of the invocation.

    Args:
        tokenizer: The model's.
        text: The invocation; None: what the chat template adds for the assistant to begin.

    Raises:
        ValueError: There is no text and no chat template to take it from, or it has no tokens.
    """
    if text is None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "`context_adapters=False` switches the adapter on at the chat template's generation prompt, and the "
                "tokenizer has no chat template. Set `invocation` to the text that every decision begins with, or "
                "`context_adapters=True`."
            )
        message = [{"role": "user", "content": "."}]
        before, prompt = (
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=added)
            for added in (False, True)
        )
        text = prompt.removeprefix(before)
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise ValueError(
            f"`context_adapters=False` needs invocation tokens, and {text!r} has none. Set `invocation` to the text "
            "that every decision begins with, or `context_adapters=True`."
        )
    return tokens


def activate_at_invocation(model: PeftModel, invocation: Sequence[int]) -> None:
    """Turns a model's LoRA adapter into one that is switched on by the invocation tokens.

    Its configuration, and so the saved adapter, carries them as `alora_invocation_tokens`.

    Args:
        model: A model with one active LoRA adapter.
        invocation: Token ids.

    Raises:
        ValueError: The adapter is of a kind that PEFT cannot activate by tokens.
    """
    config = model.peft_config[model.active_adapter]
    if not is_lora(config):
        raise ValueError(
            f"`context_adapters=False` needs a LoRA adapter, and `peft_config` is a {type(config).__name__}: PEFT has "
            "no other adapter that is switched on by tokens. Set `context_adapters=True`, or use `lora_config`."
        )
    config.alora_invocation_tokens = list(invocation)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and model.active_adapter in layer.scaling:
            _require_linear(layer, config, name)
            set_variant(layer, model.active_adapter, _ActivatedLora())


def require_always_active(model: torch.nn.Module) -> None:
    """Refuses an adapter that PEFT switches on by tokens, which a decision without them would not switch on.

    Raises:
        ValueError: An active adapter has `alora_invocation_tokens`.
    """
    if not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        tokens = getattr(model.peft_config[name], "alora_invocation_tokens", None)
        if tokens:
            raise ValueError(
                f"Adapter `{name}` is switched on by `alora_invocation_tokens={list(tokens)}`, and "
                "`context_adapters=True` has it on everywhere. Set `context_adapters=False`, or remove "
                "`alora_invocation_tokens` from its configuration."
            )


@contextmanager
def active_everywhere(model: torch.nn.Module) -> Iterator[None]:
    """Runs the forward of decisions, of which all tokens see the adapter. The backward pass may run outside.

    PEFT would look for the invocation in each row, and hang the result on hooks that a second forward before a
    backward (in evaluation with gradient checkpointing) refuses.
    """
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    activated = [config for config in configs if getattr(config, "alora_invocation_tokens", None)]
    tokens = [config.alora_invocation_tokens for config in activated]
    for config in activated:
        config.alora_invocation_tokens = None
    try:
        yield
    finally:
        for config, invocation in zip(activated, tokens, strict=True):
            config.alora_invocation_tokens = invocation


def _require_linear(layer: LoraLayer, config: LoraConfig, name: str) -> None:
    try:
        variant = layer.resolve_lora_variant(config=config)
    except ValueError as error:
        raise ValueError(
            f"`context_adapters=False` needs an adapter that PEFT can switch on by tokens, and that on `{name}` is "
            f"not one ({error}). Use plain LoRA on linear modules, or set `context_adapters=True`."
        ) from error
    if not isinstance(variant, ALoraLinearVariant):
        raise ValueError(
            f"`context_adapters=False` needs adapters on linear modules, and `{name}` is a "
            f"{type(layer.get_base_layer()).__name__}. Leave it without adapter, or set `context_adapters=True`."
        )

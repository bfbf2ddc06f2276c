# SPDX-License-Identifier: Apache-2.0
"""What this side needs to know about a model: its parts, and whether its cache can be trusted."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.utils.cache_argument import CACHE_ARGUMENTS, cache_argument, takes_unknown_cache

__all__ = [
    "counts_from_longest",
    "get_decoder",
    "get_pretrained_model",
    "latent_expansions",
    "require_exact_continuation",
    "require_known_positions",
    "require_separable_adapters",
    "require_weights_at_hand",
]

# Architectures that transformers itself continues inexactly from a cache, with the error seen in the decision's
# log-probabilities of a tiny random model (transformers 5.23.0). An entry goes when transformers continues it exactly.
INEXACT_ARCHITECTURES = {"jamba": 1e-1, "moshi": 4e-1, "recurrent_gemma": 5e-2, "zamba": 1e-1}
_ONE_MASK = "masks what it computes for the tokens at hand with the mask of the whole sequence"
# Architectures whose cache is another, or is used in another way, than a frozen context can stand in for.
UNSUPPORTED_ARCHITECTURES = {
    "cpmant": "puts its prompt tokens in front of every forward, of a decision too",
    "doge": "computes its attention mask from the cached values of the whole sequence again in each forward, with "
    "weights that are trained (`dt_proj`)",
    "falcon_mamba": _ONE_MASK,
    "mamba": _ONE_MASK,
    "minimax": "takes no other cache than one of a class of its own (MiniMaxCache)",
    "roformer": "counts positions from the length of its cache, in a batch from the longest context",
    "xlm": "masks the tokens at hand alone, whatever its cache holds before them",
    "xlstm": "takes no other cache than one of a class of its own (xLSTMCache)",
}
# What a frozen context can hold of a layer.
KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
# Modules that expand cached latents into keys and values (multi-head latent attention) in each forward, at context
# positions too.
LATENT_EXPANSIONS = ("kv_b_proj",)


def get_pretrained_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped by PEFT."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedArchitectureError(
            f"Expected a transformers `PreTrainedModel` or a `PeftModel` of one, found {type(base).__name__}."
        )
    return base


def get_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder below the language-model head (and below a vision-language wrapper)."""
    decoder = model.get_decoder()
    # That of Llama 4 (transformers 5.23, 5.24) has the head.
    return decoder.model if decoder.get_output_embeddings() is not None else decoder


def require_exact_continuation(model: PreTrainedModel) -> None:
    """Refuses models that cannot continue a context.

    Raises:
        UnsupportedArchitectureError: The model has no cache that a decision could continue from.
        ContextMismatchError: The architecture is known to continue inexactly.
    """
    model_type = model.config.get_text_config().model_type
    ways_out = "Train it with `tier: 1` (or `gradient_horizon: -1`), which needs no cache, or use another architecture"
    decoder = get_decoder(model)
    if takes_unknown_cache(decoder):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} (model type `{model_type}`) keeps a cache, and takes it under none of the names "
            f"known here ({', '.join(CACHE_ARGUMENTS)}). {ways_out}, or a version of transformers that was tested."
        )
    if model.config.is_encoder_decoder or cache_argument(decoder) is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} (model type `{model_type}`) takes no cache that a frozen context could "
            f"live in. {ways_out}."
        )
    if model_type in UNSUPPORTED_ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"`{model_type}` {UNSUPPORTED_ARCHITECTURES[model_type]}, so it cannot continue from a frozen context. "
            f"{ways_out}."
        )
    unknown = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {
        known.__name__ for known in KNOWN_LAYERS
    }
    if unknown:
        raise UnsupportedArchitectureError(
            f"`{model_type}` has layers that keep a `{', '.join(sorted(unknown))}` of what is before them, which a "
            f"frozen context cannot hold. {ways_out}."
        )
    if model_type in INEXACT_ARCHITECTURES:
        raise ContextMismatchError(
            f"transformers does not continue `{model_type}` exactly from a cache: the decision's log-probabilities "
            f"are off by {INEXACT_ARCHITECTURES[model_type]:.0e}, where 1e-05 is expected. {ways_out}, or a newer "
            "transformers."
        )


def latent_expansions(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that compute the context's keys and values again in each forward, from latents."""
    return [module for name, module in decoder.named_modules() if name.rsplit(".", 1)[-1] in LATENT_EXPANSIONS]


def counts_from_longest(model: PreTrainedModel) -> bool:
    """Whether a model counts positions from the longest context of a batch, whatever positions it is given.

    Llama 4 (transformers 5.23, 5.24) scales the attention of its layers without rope by positions that it counts from
    the length of the cache, which is one for all rows.
    """
    config = model.config.get_text_config()
    return config.model_type == "llama4_text" and bool(config.attn_temperature_tuning)


def require_known_positions(model: PreTrainedModel, context_lengths: Sequence[int], num_tokens: int) -> None:
    """Refuses a batch whose rows' positions a model would not tell from those of the longest.

    Args:
        model: The transformers model.
        context_lengths: Context tokens of each row.
        num_tokens: Tokens of a row behind them.

    Raises:
        ValueError: Rows differ in length where that counts.
    """
    if len(set(context_lengths)) == 1 or not counts_from_longest(model):
        return
    config = model.config.get_text_config()
    longest = max(context_lengths) + num_tokens
    if longest >= config.floor_scale:
        raise ValueError(
            f"A batch of `{config.model_type}` has contexts of {min(context_lengths)} to {max(context_lengths)} "
            f"tokens and reaches {longest}: from {config.floor_scale} (`floor_scale`) on, attention in layers without "
            "rope is scaled by position, and transformers counts positions from the longest context of a batch. Run "
            "one row at a time: `per_device_train_batch_size: 1` and `per_device_eval_batch_size: 1` (with "
            "`decision_mode: turns` also `max_decisions_per_forward: 1`), and a batch size of 1 in other commands."
        )


def require_separable_adapters(model: PreTrainedModel) -> None:
    """Refuses adapters that would act on a context which was encoded without them.

    Raises:
        ValueError: A latent expansion has an adapter.
    """
    if any(isinstance(module, BaseTunerLayer) for module in latent_expansions(get_decoder(model))):
        raise ValueError(
            "`context_adapters=False` encodes contexts without adapters, but the adapter on `kv_b_proj` would expand "
            "the context's latents in every decision. Leave `kv_b_proj` without adapter (preset `response` does), or "
            "set `context_adapters=True`."
        )


def require_weights_at_hand(model: PreTrainedModel) -> None:
    """Refuses a model whose weights accelerate keeps elsewhere, and brings in for a module's forward alone.

    The backward pass finds no weight there, and decisions over a frozen context came out as NaN.

    Raises:
        ValueError: A weight is on the meta device, in a model that was loaded with a device map.
    """
    if not hasattr(model, "hf_device_map"):
        return
    away = [name for name, weight in model.named_parameters() if weight.is_meta]
    if away:
        raise ValueError(
            f"{len(away)} weights of {type(model).__name__}, such as `{away[0]}`, are offloaded to host memory or "
            "a disk by its `device_map`. From there they cannot be trained, nor continue a frozen context. Load it "
            "without a device map, or with one of GPUs alone; `load_in_4bit` takes a quarter of the memory."
        )

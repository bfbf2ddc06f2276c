# SPDX-License-Identifier: Apache-2.0
"""What a model's configuration drops out at random, under the many names that architectures have for it.

Attention: `attention_dropout`, `attn_pdrop` (GPT-2), `attention_probs_dropout_prob` (BERT), `attn_config.attn_pdrop`
(MPT). Elsewhere: `resid_pdrop`, `embd_pdrop`, `hidden_dropout`, `residual_dropout`, `dropout` and more. Whole layers:
`layerdrop` (OPT, XGLM, BioGPT). All have "drop" in them; heads for classification have theirs, which a causal language
model is without.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["attention_dropout", "has_dropout", "require_all_layers"]

OF_OTHER_HEADS = ("classifier", "summary")
OF_ATTENTION = ("attention", "attn")
OF_LAYERS = ("layerdrop", "layer_drop")


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the configuration asks for dropout anywhere."""
    return bool(_dropouts(model.config.get_text_config()))


def attention_dropout(config: PretrainedConfig) -> str | None:
    """What a configuration says of dropout in attention, as `name is value`; None where it says nothing of it."""
    found = _dropouts(config).items()
    return next((f"{name} is {value}" for name, value in found if any(word in name for word in OF_ATTENTION)), None)


def require_all_layers(model: PreTrainedModel) -> None:
    """Refuses a model that skips whole layers at random: other ones in a decision than in its context.

    Raises:
        ValueError: The configuration asks for it.
    """
    config = model.config.get_text_config()
    for name, value in _dropouts(config).items():
        if any(word in name for word in OF_LAYERS):
            raise ValueError(
                f"`{name}={value}` of `{config.model_type}` skips whole layers at random, and a decision that skips a "
                "layer has lost its context in it (as a stretch of a sequence has what lies before it). Set "
                f"`{name}` to 0 in the model's configuration, or train with `tier: 1`, or `tier: 3` without "
                "`sequence_chunk_size`."
            )


def _dropouts(config: PretrainedConfig) -> dict[str, float]:
    """Every probability above 0, by its name; those of a part of the configuration as `part.name`."""
    return {
        name: value
        for name, value in _flat(config.to_dict())
        if "drop" in name.rpartition(".")[2]
        and not name.rpartition(".")[2].startswith(OF_OTHER_HEADS)
        and type(value) in (int, float)
        and value > 0
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

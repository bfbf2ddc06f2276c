# SPDX-License-Identifier: Apache-2.0
"""Adapters of a model whose vocabulary was resized before they were put on it.

`resize_token_embeddings`, or TRL with a `chat_template_path` that brings tokens, changes how many rows the embedding
and the head have. The base on the disk knows nothing of that; the adapter's file holds matrices with other rows (PEFT
saves them with it). An adapter is taken for one of a resized vocabulary only where it says so for both matrices, and
holds all rows that the base lacks: else it belongs to another model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["resize_vocabulary", "resized_vocabulary", "vocabulary_parameters", "without_copies"]

# Values that went through a 16-bit type differ by its rounding.
_ROUNDING = 2.0**-7
_TRAINED_ROWS = ".trainable_tokens_delta"
# The matrices as they were before training, by what their names end in.
_UNTRAINED = (".original_module.weight", ".token_adapter.base_layer.weight", ".base_layer.weight")


def without_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's weights without those that are there a second time under a name that nothing loads.

    Where the vocabulary was resized, peft 0.21 writes what it has trained of embedding and head under the name that it
    loads and under the model's own, and rows of tied ones for both.
    """
    kept: dict[str, torch.Tensor] = {}
    # Of tied ones the embedding's are loaded, whose names come first.
    for name, tensor in sorted(tensors.items(), key=lambda item: ("lm_head" in item[0], item[0])):
        module, wrapper, leaf = name.rpartition(".modules_to_save.")
        is_copy = bool(wrapper) and f"{module}.{leaf}" in tensors
        if name.endswith(_TRAINED_ROWS):
            is_copy = any(torch.equal(tensor, kept[other]) for other in kept if other.endswith(_TRAINED_ROWS))
        if not is_copy:
            kept[name] = tensor
    return kept


def vocabulary_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the weights of the embedding and, where there is one, of the head."""
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{names[id(module)]}.weight" for module in _matrices(model))


def resized_vocabulary(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> int | None:
    """Rows of embedding and head in training, where the base has another number of them; None where it has as many.

    Args:
        model: The base, with weights or without.
        tensors: The adapter's, by their names in the file.
        config: Its configuration.

    Raises:
        ValueError: The adapter is of another vocabulary, and does not hold all that the base lacks of it.
    """
    num_before = _num_rows(model.get_input_embeddings())
    homes = [name.removesuffix(".weight").rpartition(".")[2] for name in vocabulary_parameters(model)]
    rows = [_rows_of(tensors, home) for home in homes]
    counts = set().union(*(found.values() for found in rows))
    if counts <= {num_before}:
        return None
    head = model.get_output_embeddings()
    if len(counts) > 1 or (head is not None and _num_rows(head) != num_before):
        raise _other_vocabulary(f"its embeddings have {sorted(counts)} rows", num_before)
    (num_tokens,) = counts
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    for home, found in zip(homes, rows, strict=True):
        trained = _trained_tokens(config, home, is_embedding=home == homes[0])
        trained |= _trained_tokens(config, homes[0], is_embedding=True) if is_tied else set()
        are_new_trained = num_tokens > num_before and set(range(num_before, num_tokens)) <= trained
        if not are_new_trained and not any(name.endswith("weight") and "lora_" not in name for name in found):
            raise _other_vocabulary(f"it was trained with {num_tokens} and holds no `{home}` of so many", num_before)
    return num_tokens


def resize_vocabulary(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Gives a loaded base as many rows of embedding and head as it had when an adapter was trained on it.

    Args:
        model: The base.
        tensors: The adapter's, by their names in the file.
        config: Its configuration.

    Raises:
        ValueError: The adapter is of another vocabulary, and does not hold all that the base lacks of it; or what it
            holds of the base's own rows is another model's.
    """
    num_tokens = resized_vocabulary(model, tensors, config)
    if num_tokens is None:
        return
    num_before = _num_rows(model.get_input_embeddings())
    for module, name in zip(_matrices(model), vocabulary_parameters(model), strict=True):
        _require_same_rows(module, tensors, name.removesuffix(".weight").rpartition(".")[2])
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for module in _matrices(model):
            # Where transformers' own new rows lie, up to noise of a thousandth of their spread.
            module.weight[num_before:] = module.weight[:num_before].mean(0)


def _matrices(model: PreTrainedModel) -> list[Any]:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in modules if module is not None]


def _num_rows(module: nn.Module) -> int:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight.shape[0]


def _rows_of(tensors: Mapping[str, torch.Tensor], home: str) -> dict[str, int]:
    """How many rows a matrix has by each tensor of an adapter that says so; `home` is the last part of its name."""
    found = {}
    for name, tensor in tensors.items():
        _, is_there, own = f".{name}".rpartition(f".{home}.")
        if not is_there or tensor.ndim != 2:
            continue
        if own.endswith("lora_embedding_A"):
            found[name] = tensor.shape[1]
        elif own == "lora_B.weight" or (own.endswith("weight") and "lora_" not in own):
            found[name] = tensor.shape[0]
    return found


def _trained_tokens(config: Mapping[str, Any], home: str, *, is_embedding: bool) -> set[int]:
    """Tokens whose rows were trained in place of the whole matrix."""
    tokens = config.get("trainable_token_indices") or {}
    if not isinstance(tokens, Mapping):
        # A list without names is the embedding's.
        return set(tokens) if is_embedding else set()
    return {token for name, own in tokens.items() if name.rpartition(".")[2] == home for token in own}


def _require_same_rows(module: Any, tensors: Mapping[str, torch.Tensor], home: str) -> None:
    for name in _rows_of(tensors, home):
        if not name.endswith(_UNTRAINED):
            continue
        own = module.weight
        shared = min(len(own), len(tensors[name]))
        theirs = tensors[name][:shared].to(own.device, torch.float32)
        if not torch.allclose(own[:shared].float(), theirs, rtol=_ROUNDING, atol=1e-6):
            raise ValueError(
                f"The adapter was trained on another model: rows of `{home}` that it holds as they were before "
                "training are not those of this base."
            )


def _other_vocabulary(found: str, num_rows: int) -> ValueError:
    return ValueError(
        f"The adapter is of another vocabulary: {found}, and the base has {num_rows} tokens. Use the base that it was "
        "trained on, with the same vocabulary; or save the adapter with `save_embedding_layers=True`."
    )

# SPDX-License-Identifier: Apache-2.0
"""The model to measure: loaded as training loads it, adapter and all, and what it must be for frozen contexts."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from frozen_peft.adapters import (
    keep_linear4bit_trainable,
    load_tokenizer,
    quantization_config,
    require_embeddings,
    require_no_pickle,
    resize_vocabulary,
    without_copies,
)
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.merging import find_folder, require_repeatable, require_repeated_change

__all__ = ["load_model", "num_positions", "put_adapter_weights", "require_adapters_on_weights"]


def load_model(
    name: str,
    adapter: str | None = None,
    *,
    tokenizer: str | None = None,
    revision: str = "main",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Loads a model, and the tokenizer that counts (`adapters.tokenizers`).

    Args:
        name: Hub id or folder of the base model.
        adapter: Hub id or folder of an adapter; None: the base model alone.
        tokenizer: Hub id or folder of a tokenizer, in place of the adapter's or the model's.
        revision: Branch, tag or commit of a model on the hub.
        dtype: Type of the loaded weights; `auto`: the checkpoint's own.
        load_in_4bit: Quantize the base to 4 bit.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_pickle: Read weights that are pickles; tensors alone are read from them.

    Returns:
        The model in evaluation mode, nothing of it to be trained, on the machine's accelerator where it has one, and
        the tokenizer.

    Raises:
        ValueError: The adapter or the tokenizer does not fit the model, or weights are pickles.
        OSError: There is no such model or adapter.
    """
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if adapter is not None:
        # Of the hub's files, a pickle is downloaded where it is allowed.
        adapter = str(find_folder(adapter, what="the adapter", allow_pickle=allow_pickle))
        require_repeatable(PeftConfig.from_pretrained(adapter), Path(adapter), in_4_bit=load_in_4bit)
    for folder in (name, adapter):
        if folder is not None and not allow_pickle:
            require_no_pickle(folder)
    options: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}
    if load_in_4bit:
        options["quantization_config"] = quantization_config(AutoConfig.from_pretrained(name, **origin))
    # The class that the configuration names, as the trainer has it: an adapter's weights are named after it.
    model: torch.nn.Module = create_model_from_path(name, dtype=dtype, **origin, **options)
    if load_in_4bit:
        keep_linear4bit_trainable(model)
    # Nothing is trained, so that what the base encodes is good for ever.
    model.requires_grad_(False)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    found = load_tokenizer(name, adapter, tokenizer=tokenizer, **origin)
    if adapter is not None or tokenizer is not None:
        embeddings = get_pretrained_model(model).get_input_embeddings().weight
        require_embeddings(found, len(embeddings), tokenizer or adapter or name)
    return model.eval(), found


def _with_adapter(model: torch.nn.Module, adapter: str) -> PeftModel:
    tensors = without_copies(load_peft_weights(adapter, device="cpu"))
    resize_vocabulary(get_pretrained_model(model), tensors, vars(PeftConfig.from_pretrained(adapter)))
    with warnings.catch_warnings():
        # Of keys that are missing, which are an error below.
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter)
    put_adapter_weights(adapted, adapter)
    require_repeated_change(adapted, Path(adapter))
    return adapted


def put_adapter_weights(adapted: PeftModel, adapter: str) -> None:
    """Puts the weights of a saved adapter where a model has adapters of the same configuration.

    Args:
        adapted: The model.
        adapter: Hub id or folder of the adapter.

    Raises:
        ValueError: The weights are not those that the model has a place for, all of them.
        OSError: There is no such adapter.
    """
    architecture = type(adapted.get_base_model()).__name__
    tensors = without_copies(load_peft_weights(adapter, device="cpu"))
    missing = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(tensors)
    try:
        unexpected = set(set_peft_model_state_dict(adapted, tensors).unexpected_keys)
    except RuntimeError as error:
        raise ValueError(
            f"adapter {adapter} does not fit {architecture}: {error}. Was it trained on this model, with this "
            "vocabulary?"
        ) from error
    for problem, names in (
        (f"lacks weights that {architecture} has a place for", missing),
        (f"has weights that nothing of {architecture} asks for", unexpected),
    ):
        if names:
            raise ValueError(
                f"adapter {adapter} {problem}: {len(names)} of {len(tensors)}, such as {min(names)}. Was it trained "
                "on this model?"
            )


def require_adapters_on_weights(model: torch.nn.Module) -> None:
    """Refuses adapters that stand before a context, which would be left out where contexts are encoded below them.

    Raises:
        ValueError: An active adapter is no change of weights.
    """
    if not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning:
            raise ValueError(
                f"Adapter `{name}` is a {type(config).__name__}, which puts tokens of its own before a context; only "
                "adapters on weights (LoRA and its kin) can be sampled with or scored over frozen contexts."
            )


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model has positions for; None where there is no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)

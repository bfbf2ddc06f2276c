# SPDX-License-Identifier: Apache-2.0
"""The model that is merged onto: its weights, its configuration, and its vocabulary."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from frozen_peft.adapters.roles import model_on_meta
from frozen_peft.adapters.tokenizers import has_tokenizer, require_embeddings
from frozen_peft.adapters.vocabulary import resized_vocabulary
from frozen_peft.merging.adapter import AdapterFolder
from frozen_peft.merging.source import Checkpoint, find_folder, open_checkpoint

__all__ = ["Base", "open_base", "require_tokens", "with_vocabulary"]


@dataclass(frozen=True)
class Base:
    """The model that is merged onto.

    Attributes:
        name: As the caller, or the adapter, named it.
        checkpoint: Its weights.
        config: Its configuration.
        trust_remote_code: Whether its own code may run.
        allow_pickle: Whether its weights may be a pickle.
    """

    name: str
    checkpoint: Checkpoint
    config: PretrainedConfig
    trust_remote_code: bool
    allow_pickle: bool

    def model(self) -> PreTrainedModel:
        """The class that the checkpoint names, without weights, in float32; a new one.

        Raises:
            ValueError: transformers has no such class, or cannot make it of this configuration.
        """
        try:
            return model_on_meta(self.config, dtype=torch.float32, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # whatever sizes that anyone may have written lead to
            kind = type(self.config).__name__
            raise ValueError(f"transformers makes no model of this {kind}: {type(error).__name__}: {error}") from error


def open_base(
    name: str | Path | None,
    adapters: Sequence[AdapterFolder],
    *,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> Base:
    """Reads a base's configuration and the headers of its files.

    Args:
        name: Its folder or hub id; None: the one that the adapters name.
        adapters: What is merged.
        revision: Branch, tag or commit of a base on the hub.
        trust_remote_code: Whether its own code may run.
        allow_pickle: Whether its weights may be a pickle.

    Raises:
        ValueError: The adapters name none, or several, or it cannot be read.
        FileNotFoundError: There is no such base.
    """
    if name is None:
        named = {item.config.get("base_model_name_or_path") or "" for item in adapters}
        if len(named) > 1 or "" in named:
            raise ValueError(f"The adapters name {sorted(named)} as base models; say which with `base`.")
        (name,) = named
        revision = revision or adapters[0].config.get("revision")
    folder = find_folder(name, revision, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers makes of a configuration that anyone may have written
        raise ValueError(f"{path} cannot be read by transformers: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} holds quantized weights, to which no update can be added exactly. Give the 16-bit checkpoint "
            "that they were made from as `base`."
        )
    return Base(str(name), checkpoint, config, trust_remote_code, allow_pickle)


def with_vocabulary(base: Base, adapters: Sequence[AdapterFolder]) -> tuple[Base, int | None]:
    """The base with as many tokens as it had in training, and their number where it has others; else None.

    Raises:
        ValueError: One of several adapters was trained with another vocabulary.
    """
    model = base.model()
    sizes = {item.name: resized_vocabulary(model, item.tensors, item.config) for item in adapters}
    resized = {name: size for name, size in sizes.items() if size is not None}
    if not resized:
        return base, None
    if len(adapters) > 1:
        raise ValueError(
            f"{', '.join(resized)} was trained with another vocabulary than {base.name} has, and such an adapter is "
            "not combined with others. Merge it alone, and the others onto what comes out."
        )
    (size,) = resized.values()
    config = copy.deepcopy(base.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "vocab_size"):
            part.vocab_size = size
    return replace(base, config=config), size


def require_tokens(base: Base, adapters: Sequence[AdapterFolder]) -> None:
    """Refuses an adapter whose tokenizer has tokens that the base has no embedding for.

    Raises:
        ValueError: One has, or has a tokenizer that cannot be read.
    """
    for item in adapters:
        if not has_tokenizer(item.folder):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(item.folder, trust_remote_code=base.trust_remote_code)
        except Exception as error:  # whatever transformers makes of files that anyone may have written
            raise ValueError(f"The tokenizer in {item.folder} cannot be read by transformers: {error}") from error
        require_embeddings(tokenizer, base.config.get_text_config().vocab_size, item.folder)

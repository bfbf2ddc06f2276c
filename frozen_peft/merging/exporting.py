# SPDX-License-Identifier: Apache-2.0
"""Adapters written anew: for plain PEFT, and under the names of the class that a server loads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from frozen_peft.adapters.tokenizers import TOKENIZER_FILES
from frozen_peft.merging.adapter import open_adapter
from frozen_peft.merging.base_record import RECORD
from frozen_peft.merging.layout import Layout, change_layout, layout_of_keys
from frozen_peft.merging.output import require_space, whole_folder

__all__ = ["export_adapter", "write_adapter"]


def export_adapter(
    adapter: str | Path, output: str | Path, layout: Layout | None = None, *, allow_pickle: bool = False
) -> Layout:
    """Writes an adapter for plain `PeftModel.from_pretrained`, whole or not at all.

    An adapter that was trained with `context_adapters=False` keeps its `alora_invocation_tokens`, with which PEFT's
    own forward is the trained one.

    Args:
        adapter: Its folder or hub id.
        output: The folder to write; it must not exist, or be empty.
        layout: The class whose names it gets: `text` (`Qwen3_5ForCausalLM`) or `wrapper`
            (`Qwen3_5ForConditionalGeneration`); by default the one it was trained on.
        allow_pickle: Whether its weights may come as a pickle.

    Returns:
        The layout written.

    Raises:
        ValueError: The adapter is not whole, or adapts what the text class does not have.
        FileNotFoundError: There is no such adapter.
        FileExistsError: The output holds something.
    """
    if layout not in (None, "text", "wrapper"):
        raise ValueError(f"`layout` must be 'text' or 'wrapper', got {layout!r}.")
    found = open_adapter(adapter, allow_pickle=allow_pickle, activated=True)
    needed = layout or layout_of_keys(found.tensors)
    config, tensors = change_layout(found.config, found.tensors, needed)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    require_space(Path(output).absolute().parent, size)
    with whole_folder(Path(output)) as part:
        write_adapter(part, config, tensors)
        for name in (*TOKENIZER_FILES, RECORD):
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, part / name)
    return needed


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the two files that make an adapter."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

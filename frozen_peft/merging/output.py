# SPDX-License-Identifier: Apache-2.0
"""The folder that is written, which appears under its name when it is whole.

What lies in it beside a merged model's weights; and adapters written anew, for plain PEFT and under the names of the
class that a server loads.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from frozen_peft.adapters.tokenizers import TEMPLATE_FILES, TOKENIZER_FILES, has_tokenizer, own_template
from frozen_peft.merging.adapter import open_adapter
from frozen_peft.merging.base_record import RECORD
from frozen_peft.merging.layout import Layout, change_layout, layout_of_keys
from frozen_peft.utils.files import read_json, sync

__all__ = [
    "REPORT",
    "copy_files",
    "export_adapter",
    "require_free",
    "require_space",
    "whole_folder",
    "write_adapter",
    "write_config",
]

REPORT = "merge_report.json"
# Weights in any form, and what describes the base only.
_LEFT_OUT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite"}
)
_LEFT_OUT = frozenset({"config.json", "README.md", REPORT, "adapter_config.json"})
# Beyond this a file is no configuration.
_MAX_FILE_BYTES = 512 << 20


def require_free(output: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        FileExistsError: It is there and not an empty folder.
        FileNotFoundError: The folder it is to be in is not there.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise FileExistsError(f"{output} is there already and not an empty folder. Remove it or name another one.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.absolute().parent} to write {output.name} to.")


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        OSError: Fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are to be written. Free some, or "
            "write elsewhere."
        )


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` to write to, which gets its name when the block ends.

    It is removed where the block fails. One that a killed process has left is removed first; so nothing that is
    found under `output` is ever a part of something.

    Raises:
        FileExistsError: `output` holds something, another process is writing it, or what has the hidden folder's name
            is no folder.
    """
    output = output.absolute()
    require_free(output)
    part = output.parent / f".{output.name}.unfinished"
    # The lock of a process that is killed goes with it.
    lock = FileLock(f"{part}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FileExistsError(f"Another process is writing {output} just now.") from error
    try:
        if part.is_symlink() or part.is_file():
            raise FileExistsError(f"{part} is in the way: it is no folder. Remove it.")
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        yield part
        for path in part.rglob("*"):
            sync(path)
        sync(part)
        require_free(output)
        part.rename(output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def copy_files(base: Path, adapter: Path, target: Path) -> None:
    """Copies what lies beside the base's weights, with the tokenizer and the chat template that count.

    Folders, weights and what is not a file are left out.
    """
    sources = {
        path.name: path
        for path in base.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith((".index.json", *_LEFT_OUT_SUFFIXES))
        and path.name not in _LEFT_OUT
        and path.stat().st_size <= _MAX_FILE_BYTES
    }
    template = own_template(adapter)
    if has_tokenizer(adapter):
        sources = {name: path for name, path in sources.items() if name not in TOKENIZER_FILES}
        sources |= {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
        template = own_template(base) if template is None else None
    if template is not None:
        # Beside a tokenizer of another folder, in the file that wins over its configuration.
        sources = {name: path for name, path in sources.items() if name not in TEMPLATE_FILES}
        (target / TEMPLATE_FILES[0]).write_text(template, encoding="utf-8")
    for name, path in sources.items():
        shutil.copyfile(path, target / name)


def write_config(base: Path, target: Path, *, dtype: str | None, untied: bool, vocab_size: int | None) -> None:
    """Writes the base's configuration with what the merge has changed of it.

    Args:
        base: The base's folder.
        target: Where to.
        dtype: The type of the weights by torch's name; None: as before.
        untied: Whether embedding and head are no longer one tensor.
        vocab_size: Number of tokens; None: as before.
    """
    config = read_json(base / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        is_whole = part is config
        if dtype is not None and (is_whole or "dtype" in part or "torch_dtype" in part):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
        if untied and (is_whole or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocab_size is not None and ("vocab_size" in part or (is_whole and "text_config" not in config)):
            part["vocab_size"] = vocab_size
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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

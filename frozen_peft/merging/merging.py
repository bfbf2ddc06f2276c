# SPDX-License-Identifier: Apache-2.0
"""Merge adapters into a checkpoint, shard by shard.

1. The adapter is read, and PEFT puts it on the base model without weights: which parameter it changes, and how.
2. transformers' own conversions say which tensors of the checkpoint those parameters are. A tensor of the adapter
   without a home is an error, as is a home that does not fit.
3. Every shard is written anew: most tensors as bytes, the others updated in float32 and cast once.
4. All of it goes to a hidden folder, with config, tokenizer and report, and gets its name at the end.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from frozen_peft.merging.adapter import open_adapter, updates_of
from frozen_peft.merging.base import open_base, require_tokens, with_vocabulary
from frozen_peft.merging.base_record import read_record, require_same_base
from frozen_peft.merging.comparison import fits, verify_merge
from frozen_peft.merging.merge_plan import plan_shards
from frozen_peft.merging.output import REPORT, copy_files, require_free, require_space, whole_folder, write_config
from frozen_peft.merging.quantized import Requantizer, training_config
from frozen_peft.merging.updates import COMBINATIONS, Combination, Combined, combine
from frozen_peft.merging.writing import write_index, write_shards
from frozen_peft.utils.installed import installed_version

__all__ = ["merge_adapter"]

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REPORTED_VERSIONS = ("torch", "transformers", "peft")


def merge_adapter(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    base: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: Literal["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"] | torch.dtype | None = None,
    onto: Literal["original", "quantized"] = "original",
    weights: Sequence[float] | None = None,
    combination: Combination = "linear",
    density: float | None = None,
    seed: int = 0,
    verify: bool | None = None,
    samples: Sequence[dict[str, Any]] = (),
    prompts: Sequence[Any] = (),
    any_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Writes the model that base and adapter are together, as a checkpoint of the base's layout.

    Peak memory of the merge is the adapter and one matrix; verifying takes that of one model. The output holds
    safetensors, index, configuration, tokenizer, chat template and generation configuration, and `merge_report.json`;
    it appears whole or not at all.

    Args:
        adapter: A PEFT adapter's folder or hub id, or several.
        output: The folder to write; it must not exist, or be empty.
        base: The model's folder or hub id, in 16 or 32 bit; by default the one that the adapter's configuration names.
        revision: Branch, tag or commit of a base on the hub.
        dtype: Type of the weights, `bf16` or `bfloat16`, `fp16`, `float32`, `torch.float32`, ...; by default each
            keeps its own.
        onto: Of an adapter that was trained on a 4-bit base: whether to add it to the base's own weights, or to the
            de-quantized ones that it saw in training.
        weights: A factor for each adapter; 1 by default.
        combination: How several are combined: `linear` adds the weighted updates; `ties`, `dare_linear` and
            `dare_ties` are PEFT's functions on the updates of each matrix.
        density: Share of each update that `ties` and DARE keep, above 0 and at most 1.
        seed: Decides what DARE drops.
        verify: Whether to compare the merged model with the unmerged adapter; None: where one model fits in memory.
        samples: Rows of prompt and completion, or conversations, that recovery is measured on.
        prompts: Texts or messages to verify decisions on; by default those of the samples, else four of its own.
        any_base: Whether a base may differ from what training recorded of its own.
        trust_remote_code: Whether code that comes with the base may run.
        allow_pickle: Whether weights may come as pickles; they are read with `weights_only=True`.

    Returns:
        The report.

    Raises:
        ValueError: Adapter and base do not fit, a file is not whole, or the adapter has no exact merged weights.
        MergeMismatchError: The merged model is not what the unmerged one is; nothing is written.
        FileNotFoundError: There is no such adapter, base, or folder for the output.
        FileExistsError: The output holds something.
        OSError: The disk cannot hold it.
    """
    output = Path(output)
    names = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    written = None if dtype is None else _short_name(dtype)
    weights = _check_choices(names, weights, combination, density, onto)
    require_free(output)
    adapters = [open_adapter(name, allow_pickle=allow_pickle) for name in names]
    found = open_base(
        base, adapters, revision=revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    found, vocab_size = with_vocabulary(found, adapters)
    model = found.model()
    records = [read_record(item.folder) for item in adapters]
    compared = None
    if not any_base:
        same = (require_same_base(record, model, found.checkpoint) for record in records if record is not None)
        compared = min(same, default=None)
    require_tokens(found, adapters)
    quantized = Requantizer(records[0], model) if onto == "quantized" else None
    updates = combine([updates_of(item, found.model) for item in adapters], weights, combination, density or 1.0, seed)
    shards, untied = plan_shards(found.checkpoint, model, updates, _DTYPES[written] if written else None, quantized)
    num_bytes = sum(shard.num_bytes for shard in shards)
    require_space(output.absolute().parent, num_bytes)
    report: dict[str, Any] = {
        "base": found.name,
        "base_tensors_compared": compared,
        "adapters": [{"name": item.name, "weight": weight} for item, weight in zip(adapters, weights, strict=True)],
        "combination": combination if len(adapters) > 1 else None,
        "density": density,
        "seed": seed if combination.startswith("dare") else None,
        "onto": onto if quantized is None or quantized.recorded else "quantized, by this package's own settings",
        "dtype": written,
        "merged_parameters": len(updates),
        "tensors": sum(len(shard.tensors) for shard in shards),
        "bytes": num_bytes,
        "untied_embeddings": untied,
        "versions": {name: installed_version(name) for name in _REPORTED_VERSIONS},
        "verification": None,
    }
    with whole_folder(output) as part:
        copy_files(found.checkpoint.folder, adapters[0].folder, part)
        torch_name = str(_DTYPES[written]).removeprefix("torch.") if written else None
        write_config(found.checkpoint.folder, part, dtype=torch_name, untied=untied, vocab_size=vocab_size)
        write_shards(shards, part, updates, model)
        if found.checkpoint.indexed:
            write_index(part, shards)
        if verify is None and not fits(num_bytes):
            logger.warning("The merged model is not verified: it does not fit in memory here.")
        elif verify or verify is None:
            in_4_bit = training_config(records[0], model, assume=onto == "quantized")
            # PEFT adds up adapters that are plain LoRA, each with a factor, and has no model of others together.
            combined = [update for update in updates.values() if isinstance(update, Combined)]
            is_in_peft = all(update.combination == "linear" and update.is_linear for update in combined)
            report["verification"] = verify_merge(
                part,
                found,
                adapters if is_in_peft else (),
                weights,
                in_4_bit,
                onto=onto,
                samples=samples,
                prompts=prompts,
            )
        (part / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _check_choices(
    names: Sequence[Any],
    weights: Sequence[float] | None,
    combination: str,
    density: float | None,
    onto: str,
) -> list[float]:
    """The weights, where all choices are possible ones."""
    if not names:
        raise ValueError("`adapter` names none.")
    if onto not in ("original", "quantized"):
        raise ValueError(f"`onto` must be 'original' or 'quantized', got {onto!r}.")
    if combination not in COMBINATIONS:
        raise ValueError(f"`combination` must be one of {list(COMBINATIONS)}, got {combination!r}.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"`weights` needs one number for each of {len(names)} adapters, got {list(weights)}.")
    if combination == "linear":
        if density is not None:
            raise ValueError(f"`density` has no effect with `combination='linear'`, got {density}.")
    elif density is None or not 0 < density <= 1:
        raise ValueError(f"`combination={combination!r}` needs a `density` above 0 and at most 1, got {density}.")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be finite, got {list(weights)}.")
    return [1.0] * len(names) if weights is None else [float(weight) for weight in weights]


def _short_name(dtype: str | torch.dtype) -> str:
    """The key in `_DTYPES` of a type, by that name or by torch's and transformers'."""
    text = str(dtype).removeprefix("torch.")
    for short, known in _DTYPES.items():
        if text in (short, str(known).removeprefix("torch.")):
            return short
    known_names = [*_DTYPES, "bfloat16", "float16", "float32"]
    raise ValueError(f"`dtype` must be one of {known_names} or a dtype of torch of that name, got {dtype!r}.")

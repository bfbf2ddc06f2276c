# SPDX-License-Identifier: Apache-2.0
"""Merge adapters into a checkpoint, shard by shard.

1. The adapter is read, and PEFT puts it on the base model without weights: which parameter it changes, and how.
2. transformers' own conversions say which tensors of the checkpoint those parameters are. A tensor of the adapter
   without a home is an error, as is a home that does not fit.
3. Every shard is written anew: most tensors as bytes, the others updated in float32 and cast once.
4. All of it goes to a hidden folder, with config, tokenizer and report, and gets its name at the end.
"""

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from frozen_peft.adapters.vocabulary import resized_vocabulary
from frozen_peft.merging.adapter import AdapterFolder, open_adapter, updates_of
from frozen_peft.merging.base_record import read_record, require_same_base
from frozen_peft.merging.comparison import Reference, fits, verify_merge
from frozen_peft.merging.homes import load_config, make_meta_model, parameters_of_tensors, require_layers
from frozen_peft.merging.layout import layout_of_model
from frozen_peft.merging.merge_plan import DTYPES, dtype_name, plan_shards
from frozen_peft.merging.output import require_free, require_space, whole_folder
from frozen_peft.merging.quantized import requantizer, training_config
from frozen_peft.merging.source import INDEX, Checkpoint, find_folder, open_checkpoint
from frozen_peft.merging.source_files import copy_files, highest_token, write_config
from frozen_peft.merging.updates import COMBINATIONS, Combination, Combined, Update, seed_of
from frozen_peft.merging.writing import OutputShard, write_shards
from frozen_peft.utils.installed import installed_version

__all__ = ["REPORT", "merge_adapter"]

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"
_REPORTED_VERSIONS = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class _Base:
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
        """The model without weights, a new one."""
        return make_meta_model(self.config, trust_remote_code=self.trust_remote_code)


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
    written = None if dtype is None else dtype_name(dtype)
    if dtype is not None and written is None:
        known = [*DTYPES, "bfloat16", "float16", "float32"]
        raise ValueError(f"`dtype` must be one of {known} or a dtype of torch of that name, got {dtype!r}.")
    weights = _check_choices(names, weights, combination, density, onto)
    require_free(output)
    adapters = [open_adapter(name, allow_pickle=allow_pickle) for name in names]
    found = _open_base(adapters, base, revision, trust_remote_code, allow_pickle)
    found, vocab_size = _with_vocabulary(adapters, found)
    model = found.model()
    compared = None if any_base else _require_same_base(adapters, found, model)
    _require_same_vocabulary(adapters, found)
    quantized = requantizer(read_record(adapters[0].folder), model) if onto == "quantized" else None
    updates = _combine(adapters, found, weights, combination, density or 1.0, seed)
    shards, untied = plan_shards(found.checkpoint, model, updates, written, quantized)
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
        write_config(found.checkpoint.folder, part, dtype=written, untied=untied, vocab_size=vocab_size)
        write_shards(shards, part, updates, model)
        if found.checkpoint.indexed:
            _write_index(part, shards)
        if verify is None and not fits(num_bytes):
            logger.warning("The merged model is not verified: it does not fit in memory here.")
        elif verify or verify is None:
            exact, trained = _references(adapters, weights, found, model, updates, onto)
            report["verification"] = verify_merge(
                part, found.config, exact, trained, samples, prompts, trust_remote_code=trust_remote_code
            )
        (part / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _references(
    adapters: Sequence[AdapterFolder],
    weights: Sequence[float],
    base: _Base,
    model: PreTrainedModel,
    updates: Mapping[str, Update],
    onto: str,
) -> tuple[Reference | None, Reference | None]:
    """What the merged model is to equal, and what its adapters were trained as; None where PEFT has no such model."""
    combined = [update for update in updates.values() if isinstance(update, Combined)]
    # PEFT adds up adapters that are plain LoRA, each with a factor.
    if any(update.combination != "linear" or not update.is_linear for update in combined):
        return None, None
    original = Reference(
        base=base.checkpoint.folder,
        config=base.config,
        adapters=adapters,
        weights=weights,
        layout=layout_of_model(model),
        trust_remote_code=base.trust_remote_code,
        allow_pickle=base.allow_pickle,
    )
    record = read_record(adapters[0].folder)
    in_4_bit = training_config(record, model, assume=onto == "quantized")
    if in_4_bit is None:
        return original, original
    trained = replace(original, quantization=in_4_bit, dtype=in_4_bit.bnb_4bit_compute_dtype)
    return (trained if onto == "quantized" else original), trained


def _require_same_base(adapters: Sequence[AdapterFolder], base: _Base, model: PreTrainedModel) -> int | None:
    """Number of tensors of which values were compared with what training recorded; None where it recorded nothing."""
    loaded = parameters_of_tensors(model, [entry.name for _, entry in base.checkpoint.tensors()])
    stored = {parameter: name for name, (parameter, is_converted) in loaded.items() if not is_converted}
    records = [record for item in adapters if (record := read_record(item.folder)) is not None]
    counts = [require_same_base(record, model, base.checkpoint, stored) for record in records]
    return min(counts) if counts else None


def _with_vocabulary(adapters: Sequence[AdapterFolder], base: _Base) -> tuple[_Base, int | None]:
    """The base with as many tokens as it had in training, and their number where it has others; else None."""
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


def _require_same_vocabulary(adapters: Sequence[AdapterFolder], base: _Base) -> None:
    """Refuses an adapter whose tokenizer has tokens that the base has no embedding for."""
    vocab_size = base.config.get_text_config().vocab_size
    for item in adapters:
        highest = highest_token(item.folder)
        if highest is not None and highest >= vocab_size:
            raise ValueError(
                f"The tokenizer in {item.folder} has a token {highest}, and {base.name} has embeddings of "
                f"{vocab_size} tokens. Merge onto the model that the adapter was trained on, resized as it was then."
            )


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


def _open_base(
    adapters: Sequence[AdapterFolder],
    base: str | Path | None,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> _Base:
    named = {item.config.get("base_model_name_or_path") for item in adapters}
    if base is None:
        if len(named) != 1 or not isinstance(name := next(iter(named)), str) or not name:
            raise ValueError(f"The adapters name {sorted(map(str, named))} as base models; say which with `base`.")
        base, revision = name, revision or adapters[0].config.get("revision")
    folder = find_folder(base, revision, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} holds quantized weights, to which no update can be added exactly. Give the 16-bit checkpoint "
            "that they were made from as `base`."
        )
    require_layers(config, checkpoint)
    return _Base(str(base), checkpoint, config, trust_remote_code, allow_pickle)


def _combine(
    adapters: Sequence[AdapterFolder],
    base: _Base,
    weights: Sequence[float],
    combination: Combination,
    density: float,
    seed: int,
) -> dict[str, Update]:
    """What all adapters together change of the model, by the name of the parameter."""
    each = [updates_of(item, base.model) for item in adapters]
    if len(each) == 1 and weights[0] == 1.0 and combination == "linear":
        return each[0]
    names = dict.fromkeys(name for own in each for name in own)
    return {
        name: Combined(
            [own[name] for own in each if name in own],
            [weight for own, weight in zip(each, weights, strict=True) if name in own],
            combination,
            density,
            seed_of(name, seed),
        )
        for name in names
    }


def _write_index(folder: Path, shards: Sequence[OutputShard]) -> None:
    """The index, last of the weights, as transformers writes it."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    sizes = [tensor.num_bytes for shard in shards for tensor in shard.tensors]
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

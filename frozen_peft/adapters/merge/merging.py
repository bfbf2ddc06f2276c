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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel

from frozen_peft.adapters.merge.adapter import AdapterFolder, open_adapter, updates_of
from frozen_peft.adapters.merge.checkpoint import INDEX, Checkpoint, find_folder, open_checkpoint
from frozen_peft.adapters.merge.files import copy_files, write_config
from frozen_peft.adapters.merge.homes import load_config, make_meta_model
from frozen_peft.adapters.merge.output import require_free, require_space, whole_folder
from frozen_peft.adapters.merge.plan import DTYPES, plan_shards
from frozen_peft.adapters.merge.updates import COMBINATIONS, Combination, Combined, Update, seed_of
from frozen_peft.adapters.merge.writing import OutputShard, write_shards

__all__ = ["merge_adapter"]

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"


@dataclass(frozen=True)
class _Base:
    """The model that is merged onto.

    Attributes:
        name: As the caller, or the adapter, named it.
        checkpoint: Its weights.
        config: Its configuration.
        trust_remote_code: Whether its own code may run.
    """

    name: str
    checkpoint: Checkpoint
    config: PretrainedConfig
    trust_remote_code: bool

    def model(self) -> PreTrainedModel:
        """The model without weights, a new one."""
        return make_meta_model(self.config, trust_remote_code=self.trust_remote_code)


def merge_adapter(
    adapter: str | Path | Sequence[str | Path],
    output: str | Path,
    base: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    weights: Sequence[float] | None = None,
    combination: Combination = "linear",
    density: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Writes the model that base and adapter are together, as a checkpoint of the base's layout.

    Peak memory is the adapter and one matrix. The output holds safetensors, index, configuration, tokenizer, chat
    template and generation configuration, and `merge_report.json`; it appears whole or not at all.

    Args:
        adapter: A PEFT adapter's folder or hub id, or several.
        output: The folder to write; it must not exist, or be empty.
        base: The model's folder or hub id; by default the one that the adapter's configuration names.
        revision: Branch, tag or commit of a base on the hub.
        dtype: Type of the weights; by default each keeps its own.
        weights: A factor for each adapter; 1 by default.
        combination: How several are combined: `linear` adds the weighted updates; `ties`, `dare_linear` and
            `dare_ties` are PEFT's functions on the updates of each matrix.
        density: Share of each update that `ties` and DARE keep, above 0 and at most 1.
        seed: Decides what DARE drops.
        trust_remote_code: Whether code that comes with the base may run.
        allow_pickle: Whether weights may come as pickles; they are read with `weights_only=True`.

    Returns:
        The report.

    Raises:
        ValueError: Adapter and base do not fit, a file is not whole, or the adapter has no exact merged weights.
        FileNotFoundError: There is no such adapter, base, or folder for the output.
        FileExistsError: The output holds something.
        OSError: The disk cannot hold it.
    """
    output = Path(output)
    names = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    weights = _check_combination(names, weights, combination, density, dtype)
    require_free(output)
    adapters = [open_adapter(name, allow_pickle=allow_pickle) for name in names]
    found = _open_base(adapters, base, revision, trust_remote_code, allow_pickle)
    model = found.model()
    updates = _combine(adapters, found, weights, combination, density or 1.0, seed)
    shards, untied = plan_shards(found.checkpoint, model, updates, dtype)
    require_space(output.absolute().parent, sum(shard.num_bytes for shard in shards))
    report = {
        "base": found.name,
        "adapters": [{"name": item.name, "weight": weight} for item, weight in zip(adapters, weights, strict=True)],
        "combination": combination if len(adapters) > 1 else None,
        "density": density,
        "dtype": dtype,
        "merged_parameters": len(updates),
        "tensors": sum(len(shard.tensors) for shard in shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "untied_embeddings": untied,
    }
    with whole_folder(output) as part:
        copy_files(found.checkpoint.folder, adapters[0].folder, part)
        write_config(found.checkpoint.folder, part, dtype=dtype, untied=untied)
        write_shards(shards, part, updates, model)
        if found.checkpoint.indexed:
            _write_index(part, shards)
        (part / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _check_combination(
    names: Sequence[Any], weights: Sequence[float] | None, combination: str, density: float | None, dtype: str | None
) -> list[float]:
    if not names:
        raise ValueError("`adapter` names none.")
    if combination not in COMBINATIONS:
        raise ValueError(f"`combination` must be one of {list(COMBINATIONS)}, got {combination!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {dtype!r}.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"`weights` needs one number for each of {len(names)} adapters, got {list(weights)}.")
    if combination == "linear":
        if density is not None:
            raise ValueError(f"`density` has no effect with `combination='linear'`, got {density}.")
    elif density is None or not 0 < density <= 1:
        raise ValueError(f"`combination={combination!r}` needs a `density` above 0 and at most 1, got {density}.")
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
    folder = find_folder(base, revision)
    checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} holds quantized weights, to which no update can be added exactly. Give the 16-bit checkpoint "
            "that they were made from as `base`."
        )
    return _Base(str(base), checkpoint, config, trust_remote_code)


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

# SPDX-License-Identifier: Apache-2.0
"""`demo`, the name of a model and of a dataset wherever one is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from frozen_peft.demo.data import write_demo_files

if TYPE_CHECKING:
    from frozen_peft.training.recipe import DataArguments, ModelArguments

__all__ = ["CHECKPOINT", "DEMO_DIR", "model_source", "resolve_names"]

# The pretrained model with its tokenizer, as any checkpoint of transformers; `scripts/demo_pretraining` made it.
CHECKPOINT = Path(__file__).parent / "checkpoint"
# Where the demo writes, and where its conversations are looked for and written on first use.
DEMO_DIR = Path("outputs/demo")
# `demo-short`: the conversations again, without what makes their contexts long; `demo-pairs`: with what their
# instruction is against.
DATASETS = {"demo": "stripped", "demo-short": "short", "demo-pairs": "pairs"}


def model_source(name: str) -> str:
    """Returns where a model is loaded from: the one that the package ships for `demo`, else what was named.

    Raises:
        ValueError: It is `demo`, and a model of that name lies here too.
    """
    if name != "demo":
        return name
    if Path(name, "config.json").exists():
        raise ValueError(f"{name} is the model that ships, and a folder {name} with another lies here: write ./{name}")
    return str(CHECKPOINT)


def resolve_names(model: "ModelArguments", data: "DataArguments") -> None:
    """Puts the paths of the demo's model and data where its names stand.

    Raises:
        ValueError: As `model_source`; or the demo's conversations are to be streamed, which has no use.
    """
    if model.model_name_or_path is not None:
        model.model_name_or_path = model_source(model.model_name_or_path)
    own, held_out = data.dataset_name, data.eval_dataset_name
    if own not in DATASETS and held_out not in DATASETS:
        return
    if own in DATASETS and data.dataset_streaming:
        raise ValueError(f"`dataset_streaming` has no use with `dataset_name: {own}`, a small local file")
    files = write_demo_files(DEMO_DIR)
    if held_out in DATASETS or held_out is None:
        is_paired = "demo-pairs" in (own, held_out)
        data.eval_dataset_name = str(files.held_out_pairs if is_paired else files.held_out)
    if own in DATASETS:
        data.dataset_name = str(getattr(files, DATASETS[own]))

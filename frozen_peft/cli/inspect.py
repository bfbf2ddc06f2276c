# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft inspect`: what the gradient knows about the context, before a long run.

Compares, on samples of a recipe's data, the gradient of tier 2 (frozen context) with the full one: norm, cosine and
the share that passes through the context, by layer and role. Trains nothing. Prints a table, and writes
gradient_flow.json and a heat map, gradient_flow.png. docs/inspection.md explains the figures.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraConfig
from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg

from frozen_peft.adapters import RoleLoraConfig, is_lora, require_no_pickle, restrict_adapter_rows
from frozen_peft.cli.arguments import require_writable
from frozen_peft.cli.errors import reported
from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.demo import resolve_names
from frozen_peft.evaluation import put_adapter_weights
from frozen_peft.evaluation.inspection import (
    advice_text,
    advise,
    as_inspected,
    flow_table,
    inspect_data,
    inspect_samples,
    plan_memory,
)
from frozen_peft.gradient import GradientFlow
from frozen_peft.merging import find_folder, require_repeatable, require_repeated_change
from frozen_peft.planning import TierAdvice, find_card
from frozen_peft.report.plots import draw_heatmap
from frozen_peft.training.recipe import Recipe, build_trainer, load_base_config
from frozen_peft.training.sft import FrozenContextTrainer
from frozen_peft.utils.files import whole_file

__all__ = ["InspectArguments", "run"]

FILE_NAME = "gradient_flow.json"


@dataclass
class InspectArguments:
    """What is measured and where it goes."""

    samples: int = HfArg(
        default=16, help="Samples to measure, drawn by the recipe's seed; all of them where there are fewer."
    )
    advise: bool = HfArg(
        default=False,
        help="Also say which tier, horizon and store setting to train with, and why. Measures how much of the "
        "context a gradient has to reach, and how much contexts have in common.",
    )
    gpu: str | None = HfArg(
        default=None,
        help="With `advise`, the accelerator to plan for, as `frozen-peft plan` has it: H100, 24GB, ... "
        "(default: the machine's own, if it has one).",
    )
    adapter: str | None = HfArg(
        default=None, help="Trained adapter to measure (folder or hub id); else those of the recipe, untrained."
    )
    output: str | None = HfArg(
        default=None, help=f"File of the figures, the heat map beside it (default: {FILE_NAME} in `output_dir`)."
    )


def run(arguments: Sequence[str]) -> None:
    """Measures, prints a table, and writes the figures and the heat map.

    Args:
        arguments: Command-line arguments after `inspect`.

    Raises:
        CommandError: A field, file, model or dataset cannot be used.
    """
    parser = RecipeParser("inspect", __doc__, InspectArguments, "inspection", every_field="--help-all" in arguments)
    if not arguments or {"-h", "--help", "--help-all"} & set(arguments):
        parser.print_help()
        return
    with reported():
        options, *groups, _ = parser.parse(arguments)
        recipe = Recipe(*groups)
        recipe.require_sources()
        if recipe.data.method != "sft":
            raise ValueError(
                "what is measured is the gradient of a likelihood, and the recipe has "
                f"`method: {recipe.data.method}`. Give one of `method: sft`, with the chosen answers as `completion`"
            )
        _require(options, uses_adapters=recipe.adapter.use_peft)
        notes = as_inspected(recipe.config)
        output = Path(options.output or Path(recipe.config.output_dir, FILE_NAME))
        if options.output is None:
            output.parent.mkdir(parents=True, exist_ok=True)
        require_writable(output, "`output`")
    resolve_names(recipe.model, recipe.data)
    with reported():
        trainer = _build_trainer(recipe, options.adapter)
    flow = inspect_samples(trainer, options.samples, with_horizons=options.advise)
    if flow.num_samples < options.samples:
        notes.append(f"The data has {flow.num_samples} samples, fewer than the {options.samples} asked for.")
    values = flow.as_dict()
    advice = _advice(flow, trainer, options.gpu, recipe) if options.advise else None
    if advice is not None:
        values["advice"] = {**advice.fields, "because": list(advice.sentences)}
    with whole_file(output) as file:
        json.dump(values, file, indent=1, allow_nan=False)
        file.write("\n")
    heatmap = output.with_suffix(".png")
    with whole_file(heatmap, binary=True) as file:
        draw_heatmap(values).savefig(file, dpi=150, format="png")
    print(f"\n{flow_table(flow)}\n")
    if advice is not None:
        print(f"{advice_text(advice)}\n")
    for note in notes:
        print(note)
    print(f"Written to {output} and {heatmap}.")


def _build_trainer(recipe: Recipe, adapter: str | None) -> FrozenContextTrainer:
    """The trainer of a recipe, whose adapters are new ones or those of a trained adapter."""
    model = recipe.model
    if adapter is not None:
        adapter = str(find_folder(adapter, what="the adapter", allow_pickle=model.allow_pickle))
    for folder in (model.model_name_or_path, adapter):
        if folder is not None and not model.allow_pickle:
            require_no_pickle(Path(folder))
    if adapter is None:
        return build_trainer(recipe)
    # A template that is asked for by name brings its tokens anew, as in training, to the base's tokenizer.
    own_tokenizer = adapter if recipe.config.chat_template_path is None else None
    trainer = build_trainer(recipe, peft_config=_read_adapter(adapter, recipe), trained=own_tokenizer)
    put_adapter_weights(trainer.model, adapter)
    require_repeated_change(trainer.model, Path(adapter))
    restrict_adapter_rows(trainer.model)
    return trainer


def _advice(flow: GradientFlow, trainer: FrozenContextTrainer, gpu: str | None, recipe: Recipe) -> TierAdvice:
    """What to train with, by what was measured, the data, and the plan for an accelerator."""
    data = inspect_data(trainer)
    limit = find_card(gpu).memory_bytes if gpu else None
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory
    memory = plan_memory(
        load_base_config(recipe),
        trainer,
        data,
        limit,
        dtype=str(get_pretrained_model(trainer.model).dtype).removeprefix("torch."),
        accelerator=limit is not None,
        **recipe.planned_fields(),
    )
    return advise(flow, data, *memory)


def _require(options: InspectArguments, *, uses_adapters: bool) -> None:
    if options.samples < 1:
        raise ValueError(f"`samples` must be 1 or more, found {options.samples}")
    if options.gpu is not None:
        find_card(options.gpu)
        if not options.advise:
            raise ValueError("`gpu` is what `advise` plans for, and has no use without it")
    if not uses_adapters:
        raise ValueError("what is measured is the gradient of adapters, and `use_peft: false` has none; remove it")


def _read_adapter(name: str, recipe: Recipe) -> LoraConfig:
    """The configuration of a trained adapter, with the roles that PEFT's own reading drops."""
    config = PeftConfig.from_pretrained(name)
    if not is_lora(config):
        raise ValueError(f"adapter {name} is of the kind {config.peft_type}, and only LoRA's gradient is measured")
    require_repeatable(config, Path(name), in_4_bit=recipe.model.load_in_4bit)
    config = RoleLoraConfig.from_pretrained(name)
    config.inference_mode = False
    tokens = config.trainable_token_indices
    if recipe.config.chat_template_path is not None and isinstance(tokens, dict):
        # TRL puts those that the template brings behind them, as it did in training.
        model = recipe.model
        num_tokens = len(AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision))
        own = {module: [token for token in indices if token < num_tokens] for module, indices in tokens.items()}
        config.trainable_token_indices = {module: indices for module, indices in own.items() if indices} or None
    return config

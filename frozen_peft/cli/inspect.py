# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft inspect`: what the gradient knows about the context, before a long run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraConfig
from transformers import AutoTokenizer

from frozen_peft.adapters import RoleLoraConfig, is_lora, require_no_pickle, restrict_adapter_rows
from frozen_peft.cli.errors import reported
from frozen_peft.cli.training import (
    AdapterArguments,
    ModelArguments,
    build_trainer,
    make_parser,
    require_sources,
    resolve_demo,
)
from frozen_peft.config import FrozenContextConfig
from frozen_peft.context.models import get_pretrained_model
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
from frozen_peft.planning import TierAdvice, find_card, load_config
from frozen_peft.report.heatmap import draw_heatmap
from frozen_peft.training.sft import FrozenContextTrainer
from frozen_peft.utils.files import whole_file

__all__ = ["InspectArguments", "run"]

_DESCRIPTION = (
    "Compares, on samples of a recipe's data, the gradient of tier 2 (frozen context) with the full one: norm, cosine "
    "and the share that passes through the context, by layer and role; the attention that decisions give to the "
    "context, and what recurrent layers read from the frozen state. Trains nothing. Prints a table, and writes "
    "gradient_flow.json and a heat map, gradient_flow.png. docs/inspection.md explains the figures."
)
FILE_NAME = "gradient_flow.json"


@dataclass
class InspectArguments:
    """What is measured and where it goes."""

    samples: int = field(
        default=16,
        metadata={"help": "Samples to measure, drawn by the recipe's seed; all of them where there are fewer."},
    )
    advise: bool = field(
        default=False,
        metadata={
            "help": "Also say which tier, horizon and store setting to train with, and why. Measures how much of the "
            "context a gradient has to reach, and how much contexts have in common."
        },
    )
    gpu: str | None = field(
        default=None,
        metadata={
            "help": "With `advise`, the accelerator to plan for, as `frozen-peft plan` has it: H100, 24GB, ... "
            "(default: the machine's own, if it has one)."
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "Trained adapter to measure (folder or hub id); else those of the recipe, untrained."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": f"File of the figures, the heat map beside it (default: {FILE_NAME} in `output_dir`)."},
    )


def run(arguments: Sequence[str]) -> None:
    """Measures, prints a table, and writes the figures and the heat map.

    Args:
        arguments: Command-line arguments after `inspect`.

    Raises:
        CommandError: A field, file, model or dataset cannot be used.
    """
    parser = make_parser("frozen-peft inspect", _DESCRIPTION, {"inspection": InspectArguments})
    if not arguments or set(arguments) & {"-h", "--help", "--help-all"}:
        print(parser.help(every_field="--help-all" in arguments))
        return
    with reported():
        options, model, data, adapter, config, *_ = parser.parse(arguments)
        require_sources(model, data)
        _require(options, uses_adapters=adapter.use_peft)
        notes = as_inspected(config)
        output = _output(options.output, config.output_dir)
    with reported(raised_in="frozen_peft"):
        resolve_demo(model, data)
    with reported():
        trained = options.adapter
        if trained is not None:
            trained = str(find_folder(trained, what="the adapter", allow_pickle=model.allow_pickle))
        for folder in (model.model_name_or_path, trained):
            if folder is not None and not model.allow_pickle:
                require_no_pickle(Path(folder))
        peft_config = None if trained is None else _read_adapter(trained, model, config)
        # A template that is asked for by name brings its tokens anew, as in training, to the base's tokenizer.
        own_tokenizer = trained if config.chat_template_path is None else None
        trainer = build_trainer(model, data, adapter, config, peft_config=peft_config, trained=own_tokenizer)
        if trained is not None:
            put_adapter_weights(trainer.model, trained)
            require_repeated_change(trainer.model, Path(trained))
            restrict_adapter_rows(trainer.model)
    with reported(raised_in="frozen_peft"):
        flow = inspect_samples(trainer, options.samples, with_horizons=options.advise)
        if flow.num_samples < options.samples:
            notes.append(f"The data has {flow.num_samples} samples, fewer than the {options.samples} asked for.")
        values = flow.as_dict()
        advice = _advice(flow, trainer, options.gpu, model, adapter) if options.advise else None
        if advice is not None:
            values["advice"] = {**advice.fields, "because": list(advice.sentences)}
        with whole_file(output) as file:
            json.dump(values, file, indent=1, allow_nan=False)
            file.write("\n")
        heatmap = output.with_suffix(".png")
        _write_figure(values, heatmap)
    print(f"\n{flow_table(flow)}\n")
    if advice is not None:
        print(f"{advice_text(advice)}\n")
    for note in notes:
        print(note)
    print(f"Written to {output} and {heatmap}.")


def _advice(
    flow: GradientFlow,
    trainer: FrozenContextTrainer,
    gpu: str | None,
    model: ModelArguments,
    adapter: AdapterArguments,
) -> TierAdvice:
    """What to train with, by what was measured, the data, and the plan for an accelerator."""
    assert model.model_name_or_path is not None  # require_sources
    data = inspect_data(trainer)
    config = load_config(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=trainer.args.trust_remote_code,
    )
    limit = find_card(gpu).memory_bytes if gpu else None
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory
    memory = plan_memory(
        config,
        trainer,
        data,
        limit,
        dtype=str(get_pretrained_model(trainer.model).dtype).removeprefix("torch."),
        load_in_4bit=model.load_in_4bit,
        lora_preset=adapter.lora_preset,
        lora_roles=None if adapter.lora_roles is None else tuple(adapter.lora_roles),
        lora_r=adapter.lora_r,
        accelerator=limit is not None,
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


def _output(given: str | None, output_dir: str) -> Path:
    """Where the figures go, in a folder that is there."""
    if given is None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / FILE_NAME
    output = Path(given)
    if output.is_dir():
        raise ValueError(f"`output` names a file, and {output} is a folder; try {output / FILE_NAME}")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.absolute().parent} to write {output.name} to")
    return output


def _read_adapter(name: str, model: ModelArguments, args: FrozenContextConfig) -> LoraConfig:
    """The configuration of a trained adapter, with the roles that PEFT's own reading drops."""
    config = PeftConfig.from_pretrained(name)
    if not is_lora(config):
        raise ValueError(f"adapter {name} is of the kind {config.peft_type}, and only LoRA's gradient is measured")
    require_repeatable(config, Path(name), in_4_bit=model.load_in_4bit)
    config = RoleLoraConfig.from_pretrained(name)
    config.inference_mode = False
    tokens = config.trainable_token_indices
    if args.chat_template_path is not None and isinstance(tokens, dict):
        # TRL puts those that the template brings behind them, as it did in training.
        num_tokens = len(AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision))
        own = {module: [token for token in indices if token < num_tokens] for module, indices in tokens.items()}
        config.trainable_token_indices = {module: indices for module, indices in own.items() if indices} or None
    return config


def _write_figure(values: dict, path: Path) -> None:
    """Writes the heat map whole or not at all."""
    with whole_file(path, binary=True) as file:
        draw_heatmap(values).savefig(file, dpi=150, format=path.suffix.removeprefix("."))

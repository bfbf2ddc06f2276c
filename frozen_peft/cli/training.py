# SPDX-License-Identifier: Apache-2.0
"""What the commands that take a training's recipe share: its fields, and the trainer that they make."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import is_torch_bf16_gpu_available, strtobool
from trl import SFTConfig

from frozen_peft.adapters import PRESETS, ROLES, load_tokenizer, lora_config, quantization_config
from frozen_peft.cli.demo import DEMO_DIR, DEMO_NAME, model_source
from frozen_peft.cli.recipe import RecipeParser
from frozen_peft.cli.run_record import ReportArguments
from frozen_peft.config import FrozenContextConfig
from frozen_peft.data import has_split, load_samples
from frozen_peft.training.sft import FrozenContextTrainer

__all__ = [
    "AdapterArguments",
    "DataArguments",
    "ModelArguments",
    "build_trainer",
    "is_sharded_run",
    "load_base_config",
    "make_parser",
    "require_sources",
    "resolve_demo",
]

# The demo's conversations again, without what makes their contexts long.
DEMO_SHORT_NAME = "demo-short"


TRAIN_DESCRIPTION = (
    "Trains a model's response to its context from a recipe: a flat YAML file of the fields below, or the name of one "
    "that ships (`frozen-peft recipes` lists them). A field on the command line wins over the recipe."
)


# The inherited fields that most runs set. `--help` shows these, `--help-all` the other hundred too.
_COMMON_TRAINING_FIELDS = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "loss_type",
    "completion_only_loss",
    "assistant_only_loss",
    "logging_steps",
    "eval_strategy",
    "save_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "trust_remote_code",
    "report_to",
    "seed",
)

_REPORT_FIELDS = ("write_report", "num_examples")


@dataclass
class ModelArguments:
    """The base model and how it is loaded. Fields that TRL's `ModelConfig` has too are named and mean the same."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the base model; `demo`: the tiny one that we ship."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the hub."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the loaded weights: by default the checkpoint's own where only adapters are trained, "
            "float32 where the weights themselves are.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantize the base to 4 bit (NF4, double quantization) and keep small, sensitive projections in "
            "16 bit."
        },
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Read weights that are pickles (tensors only, no code is run)."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of transformers, such as `flash_attention_2`."}
    )
    check_memory: str = field(
        default="auto",
        metadata={
            "help": "Refuse a run that cannot fit. 'full': count activations on a CPU too. 'never': run it anyway.",
            "choices": ["auto", "full", "never"],
        },
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on. Fields that TRL's `ScriptArguments` has too are named and mean the same."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Training samples: a .jsonl, .json or .parquet file, a hub id, or the demo's conversations: "
            "`demo`, `demo-short`."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out samples, if not the test split of `dataset_name`; a file or hub id as above. Their loss "
            "is taken before and after training."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, if the dataset has it."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read samples while training instead of before."})


@dataclass
class AdapterArguments:
    """Which adapters are trained. Fields that TRL's `ModelConfig` has too are named and mean the same."""

    use_peft: bool = field(default=True, metadata={"help": "Train adapters; false trains the weights themselves."})
    lora_preset: str = field(
        default="response",
        metadata={
            "help": "Roles that get adapters: `response` (query, output, gate, beta, decay, gdn_output, which decide "
            "how a context is used), `response+mlp` or `all-linear`.",
            "choices": list(PRESETS),
        },
    )
    lora_roles: list[str] | None = field(
        default=None, metadata={"help": f"Roles in place of a preset: {', '.join(ROLES)}."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters in the decision."})


def make_parser(
    prog: str = "frozen-peft train", description: str = TRAIN_DESCRIPTION, own_fields: Mapping[str, type] | None = None
) -> RecipeParser:
    """Returns the parser of a command that takes a recipe: model, data, adapter and trainer fields.

    Args:
        prog: How the command is called, for its help.
        description: What it does.
        own_fields: Dataclasses of the fields that it has besides those of a recipe, by the title of their section.
            They come first in the help, and are parsed before the others.
    """
    own_fields = own_fields or {}
    groups = (ModelArguments, DataArguments, AdapterArguments)
    inherited = {item.name: item for item in dataclasses.fields(SFTConfig)}
    ours = dataclasses.fields(FrozenContextConfig)
    # What SFTConfig lacks, then what it has with another default.
    own = [item.name for item in ours if item.name not in inherited]
    # Of use to one loss only, whose help names them; `--help-all` has them.
    own = [name for name in own if not name.startswith("distill_")]
    own += [item.name for item in ours if item.name in inherited and item.default != inherited[item.name].default]
    names = [[item.name for item in dataclasses.fields(group)] for group in groups]
    parser = RecipeParser(
        (*own_fields.values(), *groups, FrozenContextConfig, ReportArguments),
        prog=prog,
        description=description,
        sections={
            **{title: [item.name for item in dataclasses.fields(group)] for title, group in own_fields.items()},
            "frozen context": own,
            "model": [name for name in names[0] if name not in ("allow_pickle", "check_memory")],  # errors name both
            "data": names[1],
            "adapters": names[2],
            # `max_example_tokens` is named in the text of another.
            "training": [*(name for name in _COMMON_TRAINING_FIELDS if name not in own), *_REPORT_FIELDS],
        },
        inherited=("training",),
    )
    # SFTConfig's own defaults ask for bfloat16 and pinned memory. Without an accelerator the first fails, the second
    # warns; there, float32 and ordinary memory.
    parser.set_defaults(bf16=is_torch_bf16_gpu_available(), dataloader_pin_memory=torch.accelerator.is_available())
    parser.describe(
        output_dir="Where adapter, checkpoints and metrics are written.",
        bf16="Compute in bfloat16; on by default where an accelerator does.",
        resume_from_checkpoint="Folder, or auto: the last whole checkpoint (also --resume). Auto starts anew where "
        "`output_dir` has none; true is the same, and an error there.",
    )
    parser.alias("--resume", "resume_from_checkpoint")
    return parser


def require_sources(model: ModelArguments, data: DataArguments) -> None:
    """Refuses a recipe without model or dataset.

    Raises:
        ValueError: A field is missing, or has no use; the message names it.
    """
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset_name", data.dataset_name),
    ):
        if value is None:
            raise ValueError(f"`{name}` is needed, in the recipe or as --{name}")
    if data.dataset_name in (DEMO_NAME, DEMO_SHORT_NAME) and data.dataset_streaming:
        raise ValueError(
            f"`dataset_streaming` has no use with `dataset_name: {data.dataset_name}`, a small local file"
        )


def resolve_demo(model: ModelArguments, data: DataArguments) -> None:
    """Puts the paths of the demo's model and data where its names stand."""
    from frozen_peft.demo import write_demo_files

    if model.model_name_or_path is not None:
        model.model_name_or_path = model_source(model.model_name_or_path)
    names = {DEMO_NAME: "stripped", DEMO_SHORT_NAME: "short"}
    if not {data.dataset_name, data.eval_dataset_name} & set(names):
        return
    files = write_demo_files(DEMO_DIR)
    if data.eval_dataset_name in names or (data.dataset_name in names and data.eval_dataset_name is None):
        data.eval_dataset_name = str(files.held_out)
    if data.dataset_name in names:
        data.dataset_name = str(getattr(files, names[data.dataset_name]))


def load_base_config(model: ModelArguments, config: FrozenContextConfig) -> PretrainedConfig:
    """The base model's own configuration.

    Raises:
        ValueError: It is of a family that transformers does not know.
        OSError: There is no such model.
    """
    return AutoConfig.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=config.trust_remote_code
    )


def build_trainer(
    model: ModelArguments,
    data: DataArguments,
    adapter: AdapterArguments,
    config: FrozenContextConfig,
    *,
    peft_config: Any = None,
    trained: str | None = None,
) -> FrozenContextTrainer:
    """Loads model and data, and makes the trainer of a recipe.

    Args:
        model: The base model.
        data: Training and held-out samples.
        adapter: Which adapters it gets.
        config: The trainer's configuration.
        peft_config: The adapters' configuration, in place of the one that `adapter` describes.
        trained: Folder of an adapter that is there already, whose tokenizer and chat template count
            (`adapters.tokenizers`).

    Raises:
        ValueError: A field, a file or a sample cannot be used.
        OSError: There is no such model or dataset.
    """
    assert model.model_name_or_path is not None  # require_sources
    if model.load_in_4bit and not adapter.use_peft:
        raise ValueError("`load_in_4bit` needs `use_peft: true`: 4-bit weights cannot be trained themselves")
    base_config = load_base_config(model, config)
    given = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        # None: safetensors where there are any.
        "use_safetensors": None if model.allow_pickle else True,
        "dtype": model.dtype or ("auto" if adapter.use_peft else "float32"),
        **given,
    }
    train_dataset, eval_dataset = _load_data(data, config)
    if config.eval_on_start and eval_dataset is None:
        raise ValueError("`eval_on_start` needs held-out samples: give `eval_dataset_name`, or remove it")
    return FrozenContextTrainer(
        model=model.model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        # The trainer would load a vision-language model's processor, which needs torchvision; samples are text here.
        processing_class=load_tokenizer(
            model.model_name_or_path,
            trained,
            revision=model.model_revision,
            trust_remote_code=config.trust_remote_code,
        ),
        quantization_config=_quantization_config(base_config) if model.load_in_4bit else None,
        peft_config=peft_config or _peft_config(base_config, adapter),
    )


def is_sharded_run(*engines: str) -> bool:
    """Whether `accelerate launch` spreads weights or optimizer over processes, with one of these engines.

    Args:
        engines: `FSDP`, `DEEPSPEED`, as accelerate's environment variables name them.
    """
    return any(strtobool(os.environ.get(f"ACCELERATE_USE_{engine}", "false")) for engine in engines)


def _quantization_config(base_config: Any) -> Any:
    """In 4 bit; under FSDP stored such that it can be in shards, which bytes cannot."""
    storage = {"bnb_4bit_quant_storage": "bfloat16"} if is_sharded_run("FSDP") else {}
    return quantization_config(base_config, **storage)


def _peft_config(base_config: Any, adapter: AdapterArguments) -> Any:
    if not adapter.use_peft:
        return None
    return lora_config(
        base_config,
        preset=adapter.lora_preset,
        roles=adapter.lora_roles,
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
    )


def load_held_out(data: DataArguments, config: FrozenContextConfig) -> Any:
    """Returns the held-out samples as they were written; None where there are none."""
    assert data.dataset_name is not None  # require_sources
    name = data.eval_dataset_name
    if name is None and has_split(data.dataset_name, data.dataset_test_split, data.dataset_config):
        name = data.dataset_name
    return None if name is None else load_samples(name, data.dataset_test_split, **_load_options(data, config))


def _load_data(data: DataArguments, config: FrozenContextConfig) -> tuple[Any, Any]:
    """Returns the training samples and, where there are any, the held-out samples."""
    assert data.dataset_name is not None  # require_sources
    train = load_samples(data.dataset_name, data.dataset_train_split, **_load_options(data, config))
    return train, load_held_out(data, config)


def _load_options(data: DataArguments, config: FrozenContextConfig) -> dict[str, Any]:
    return {
        "config": data.dataset_config,
        "streaming": data.dataset_streaming,
        "text_field": config.dataset_text_field,
    }

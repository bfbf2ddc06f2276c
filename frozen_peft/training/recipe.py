# SPDX-License-Identifier: Apache-2.0
"""A training's recipe: its fields, and the trainer that they make."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from peft import PeftConfig
from transformers import AutoConfig, PretrainedConfig
from transformers.hf_argparser import HfArg
from transformers.utils import is_torch_bf16_gpu_available, strtobool
from trl import TrlParser

from frozen_peft.adapters import PRESETS, ROLES, load_tokenizer, lora_config, quantization_config
from frozen_peft.config import ContextFields, FrozenContextConfig
from frozen_peft.data import has_split, load_samples
from frozen_peft.training.dpo import FrozenContextDPOConfig, FrozenContextDPOTrainer
from frozen_peft.training.kto import FrozenContextKTOConfig, FrozenContextKTOTrainer
from frozen_peft.training.mixin import FrozenContextMixin
from frozen_peft.training.sft import FrozenContextTrainer

__all__ = [
    "GROUPS",
    "AdapterArguments",
    "DataArguments",
    "ModelArguments",
    "Recipe",
    "build_trainer",
    "groups_of",
    "is_sharded_run",
    "load_base_config",
    "load_held_out",
    "machine_defaults",
]


@dataclass
class ModelArguments:
    """The base model and how it is loaded. Fields that TRL's `ModelConfig` has too are named and mean the same."""

    model_name_or_path: str | None = HfArg(
        default=None, help="Hub id or folder of the base model; `demo`: the tiny one that we ship."
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of a model on the hub.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = HfArg(
        default=None,
        help="Type of the loaded weights: by default the checkpoint's own where only adapters are trained, float32 "
        "where the weights themselves are.",
    )
    load_in_4bit: bool = HfArg(
        default=False,
        help="Quantize the base to 4 bit (NF4, double quantization) and keep small, sensitive projections in 16 bit.",
    )
    allow_pickle: bool = HfArg(default=False, help="Read weights that are pickles (tensors only, no code is run).")
    attn_implementation: str | None = HfArg(
        default=None, help="Attention implementation of transformers, such as `flash_attention_2`."
    )
    check_memory: Literal["auto", "full", "never"] = HfArg(
        default="auto",
        help="Refuse a run that cannot fit. 'full': count activations on a CPU too. 'never': run it anyway.",
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on. Fields that TRL's `ScriptArguments` has too are named and mean the same."""

    method: Literal["sft", "dpo", "kto"] = HfArg(
        default="sft",
        help="How samples are trained. 'sft': the likelihood of their decisions; 'dpo': pairs of `chosen` and "
        "`rejected` answers; 'kto': a `completion` and whether it is wanted (`label`).",
    )
    dataset_name: str | None = HfArg(
        default=None,
        help="Training samples: a .jsonl, .json or .parquet file, a hub id, or the demo's conversations: "
        "`demo`, `demo-short`, pairs of them: `demo-pairs`.",
    )
    eval_dataset_name: str | None = HfArg(
        default=None,
        help="Held-out samples, if not the test split of `dataset_name`; a file or hub id as above. Their loss "
        "is taken before and after training.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub dataset.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str = HfArg(default="test", help="Split to evaluate on, if the dataset has it.")
    dataset_streaming: bool = HfArg(default=False, help="Read samples while training instead of before.")


@dataclass
class AdapterArguments:
    """Which adapters are trained. Fields that TRL's `ModelConfig` has too are named and mean the same."""

    use_peft: bool = HfArg(default=True, help="Train adapters; false trains the weights themselves.")
    lora_preset: str = HfArg(
        default="response",
        help="Roles that get adapters: `response` (query, output, gate, beta, decay, gdn_output, which decide how a "
        "context is used), `response+mlp` or `all-linear`.",
        metadata={"choices": list(PRESETS)},
    )
    lora_roles: list[str] | None = field(
        default=None, metadata={"help": f"Roles in place of a preset: {', '.join(ROLES)}."}
    )
    lora_r: int = HfArg(default=16, help="Rank of the adapters.")
    lora_alpha: int = HfArg(default=32, help="Scale of the adapters, divided by the rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapters in the decision.")


GROUPS = (ModelArguments, DataArguments, AdapterArguments, FrozenContextConfig)
_METHODS: dict[str, tuple[type[ContextFields], type[FrozenContextMixin]]] = {
    "sft": (FrozenContextConfig, FrozenContextTrainer),
    "dpo": (FrozenContextDPOConfig, FrozenContextDPOTrainer),
    "kto": (FrozenContextKTOConfig, FrozenContextKTOTrainer),
}


def groups_of(method: str) -> tuple[type, ...]:
    """The dataclasses that a recipe's fields belong to.

    Raises:
        ValueError: There is no such method.
    """
    if method not in _METHODS:
        raise ValueError(f"`method` takes one of {', '.join(_METHODS)}; got {method!r}")
    return (*GROUPS[:-1], _METHODS[method][0])


@dataclass
class Recipe:
    """What a recipe says, by the dataclasses that its fields belong to; the last is that of its method."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    config: Any

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The recipe of fields and values, as `read_recipe` gives them.

        Raises:
            ValueError: A field is unknown, or its value cannot be used.
        """
        groups = groups_of(values.get("method", "sft"))
        return cls(*TrlParser(groups).parse_dict({**machine_defaults(), **values}))

    def require_sources(self) -> None:
        """Refuses a recipe without model or dataset.

        Raises:
            ValueError: A field is missing; the message names it.
        """
        for group, name in ((self.model, "model_name_or_path"), (self.data, "dataset_name")):
            if getattr(group, name) is None:
                raise ValueError(f"`{name}` is needed, in the recipe or as --{name}")

    def planned_fields(self) -> dict[str, Any]:
        """What `planning.Setting` takes of the model and its adapters."""
        roles = self.adapter.lora_roles
        return {
            "load_in_4bit": self.model.load_in_4bit,
            "use_peft": self.adapter.use_peft,
            "lora_preset": self.adapter.lora_preset,
            "lora_roles": None if roles is None else tuple(roles),
            "lora_r": self.adapter.lora_r,
        }


def machine_defaults() -> dict[str, bool]:
    """Fields whose defaults depend on the machine.

    `SFTConfig`'s own ask for bfloat16 and pinned memory. Without an accelerator the first fails, the second warns;
    there, float32 and ordinary memory.
    """
    return {"bf16": is_torch_bf16_gpu_available(), "dataloader_pin_memory": torch.accelerator.is_available()}


def load_base_config(recipe: Recipe) -> PretrainedConfig:
    """The base model's own configuration.

    Raises:
        ValueError: It is of a family that transformers does not know.
        OSError: There is no such model.
    """
    return AutoConfig.from_pretrained(
        recipe.model.model_name_or_path,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.config.trust_remote_code,
    )


def build_trainer(recipe: Recipe, *, peft_config: PeftConfig | None = None, trained: str | None = None) -> Any:
    """Loads model and data, and makes the trainer of a recipe.

    Args:
        recipe: Model, data, adapters and the trainer's configuration.
        peft_config: The adapters' configuration, in place of the one that the recipe describes.
        trained: Folder of an adapter that is there already, whose tokenizer and chat template count
            (`adapters.tokenizers`).

    Raises:
        ValueError: A field, a file or a sample cannot be used.
        OSError: There is no such model or dataset.
    """
    model, config = recipe.model, recipe.config
    assert model.model_name_or_path is not None  # require_sources
    assert recipe.data.dataset_name is not None
    uses_peft = recipe.adapter.use_peft
    if model.load_in_4bit and not uses_peft:
        raise ValueError("`load_in_4bit` needs `use_peft: true`: 4-bit weights cannot be trained themselves")
    base_config = load_base_config(recipe)
    given = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        # None: safetensors where there are any.
        "use_safetensors": None if model.allow_pickle else True,
        "dtype": model.dtype or ("auto" if uses_peft else "float32"),
        **given,
    }
    train_dataset = load_samples(recipe.data.dataset_name, recipe.data.dataset_train_split, **_load_options(recipe))
    eval_dataset = load_held_out(recipe)
    if config.eval_on_start and eval_dataset is None:
        raise ValueError("`eval_on_start` needs held-out samples: give `eval_dataset_name`, or remove it")
    if peft_config is None and uses_peft:
        adapter = recipe.adapter
        peft_config = lora_config(
            base_config,
            preset=adapter.lora_preset,
            roles=adapter.lora_roles,
            r=adapter.lora_r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
        )
    # Under FSDP, 4 bit are stored such that they can be in shards, which bytes cannot.
    storage = {"bnb_4bit_quant_storage": "bfloat16"} if is_sharded_run("FSDP") else {}
    _, trainer = _METHODS[recipe.data.method]
    return trainer(
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
        quantization_config=quantization_config(base_config, **storage) if model.load_in_4bit else None,
        peft_config=peft_config,
    )


def load_held_out(recipe: Recipe) -> Any:
    """Returns the held-out samples as they were written; None where there are none."""
    data = recipe.data
    assert data.dataset_name is not None  # require_sources
    name = data.eval_dataset_name
    if name is None and has_split(data.dataset_name, data.dataset_test_split, data.dataset_config):
        name = data.dataset_name
    return None if name is None else load_samples(name, data.dataset_test_split, **_load_options(recipe))


def is_sharded_run(*engines: str) -> bool:
    """Whether `accelerate launch` spreads weights or optimizer over processes, with one of these engines.

    Args:
        engines: `FSDP`, `DEEPSPEED`, as accelerate's environment variables name them.
    """
    return any(strtobool(os.environ.get(f"ACCELERATE_USE_{engine}", "false")) for engine in engines)


def _load_options(recipe: Recipe) -> dict[str, Any]:
    return {
        "config": recipe.data.dataset_config,
        "streaming": recipe.data.dataset_streaming,
        "text_field": getattr(recipe.config, "dataset_text_field", "text"),
        "method": recipe.data.method,
        "prompts_alone": getattr(recipe.config, "needs_no_completions", False),
    }

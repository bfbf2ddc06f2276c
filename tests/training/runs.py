# SPDX-License-Identifier: Apache-2.0
"""Short trainings of tiny models, by the trainer under test and by what it is compared with."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextConfig
from tests.reference import Sample, double_precision, random_sample, reference_gradients, stop_gradient_at_context
from tests.tiny_models import VOCAB_SIZE, add_lora, tiny_model, to_double

IGNORED = -100
LEARNING_RATE = 0.1
# Of what training added to a weight, relative, in float64, where rounding leaves 1e-14. In float32 every step begins
# from the rounding of those before: after three steps that is 1e-6, after eight 5e-5, on another processor another.
UPDATE_TOLERANCE = 1e-10
# Modules of the preset `response` that llama and qwen3_5_text have, by their last name.
RESPONSE = ("q_proj", "o_proj", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + ' ' -}}
{%- if message.role == 'assistant' -%}
{% generation %}{{- message.content + '<|im_end|>' -}}{% endgeneration %}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant ' -}}{%- endif -%}"""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, `w0` to `w80`, within the vocabulary of the tiny models; with a ChatML-like template."""
    words = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "system", "user", "assistant"]
    words += [f"w{index}" for index in range(81)]
    assert len(words) <= VOCAB_SIZE - 2
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def words(count: int, *, seed: int) -> str:
    """A text of `count` words that the tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{index}" for index in torch.randint(81, (count,), generator=generator).tolist())


# Boundary and decision length; no total length is the size of a weight, which `reference_gradients` needs.
RAGGED = ((30, 7), (9, 2), (63, 10), (0, 11), (20, 3), (52, 5), (17, 6), (41, 12))


def samples(shapes: Sequence[tuple[int, int]] = RAGGED) -> list[Sample]:
    """Random samples of the given boundaries and decision lengths; boundary 0 is supervised from the start."""
    made = []
    for seed, (boundary, length) in enumerate(shapes):
        sample = random_sample(boundary, length, seed=seed)
        made.append(sample if boundary else Sample(sample.input_ids, sample.input_ids.clone()))
    return made


def as_dataset(rows: Sequence[Sample]) -> Dataset:
    """A pre-tokenized dataset."""
    return Dataset.from_dict(
        {"input_ids": [row.input_ids.tolist() for row in rows], "labels": [row.labels.tolist() for row in rows]}
    )


def adapted(name: str = "qwen3_5_text", *, seed: int = 0, **config_overrides: Any) -> PeftModel:
    """A tiny model with random LoRA on its response projections."""
    model = tiny_model(name, **config_overrides)
    return add_lora(model, seed=seed, keep=lambda full: full.rpartition(".")[2] in RESPONSE)


def fresh_lora(model: PreTrainedModel, **fields: Any) -> PeftModel:
    """LoRA as PEFT starts it, on the response projections."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in RESPONSE if name in present]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **fields))


def config(folder: Path, kind: type[SFTConfig] = FrozenContextConfig, **fields: Any) -> Any:
    """A configuration in which a step is a plain step of SGD over the next two samples, on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "max_length": None,
    }
    return kind(**(defaults | fields))


@dataclass(frozen=True)
class Run:
    """What a training leaves behind.

    Attributes:
        trainer: The trainer, after training.
        losses: The logged loss of each step.
        weights: Trained weights by name.
        gradients: Gradients by name, as the optimizer of each step got them.
    """

    trainer: SFTTrainer
    losses: list[float]
    weights: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]

    @property
    def logs(self) -> list[dict[str, Any]]:
        """Log entries of the steps, in order."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]


class _KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.gradients.append({name: weight.grad.clone() for name, weight in trainable.items()})


def train(
    trainer_class: type[SFTTrainer],
    model: Any,
    args: Any,
    train_dataset: Any,
    *,
    resume: str | None = None,
    **kwargs: Any,
) -> Run:
    """Trains, and collects losses and weights."""
    kwargs.setdefault("processing_class", word_tokenizer())
    kept = _KeepGradients()
    kwargs["callbacks"] = [*kwargs.get("callbacks", ()), kept]
    trainer = trainer_class(model, args=args, train_dataset=train_dataset, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(trainer, losses, trained_weights(trainer.model), kept.gradients)


@contextmanager
def in_float64(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of a model that computes in float64 throughout."""
    model = to_double(copy.deepcopy(model))
    with double_precision(model):
        yield model


def train_in_float64(trainer_class: type[SFTTrainer], model: nn.Module, *args: Any, **kwargs: Any) -> Run:
    """`train`, of the same weights in float64: what is compared after several steps is then not rounding."""
    with in_float64(model) as exact:
        return train(trainer_class, exact, *args, **kwargs)


# Wall-clock figures of TRL, and what follows from them.
TIMINGS = ("runtime", "per_second")


def without_timings(logs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries without figures of the clock: TRL's, and those that the trainer under test adds."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(TIMINGS) and not key.startswith("time/")}
        for entry in logs
    ]


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def reference_sgd(
    model: PeftModel, batches: Sequence[Sequence[Sample]], *, context_adapters: bool = True
) -> dict[str, torch.Tensor]:
    """Weights after one SGD step per batch in float64, gradient stopped at context positions in plain forwards.

    Args:
        model: Left as it is, in float32.
        batches: The samples of each optimizer step, micro-batches joined.
        context_adapters: Whether LoRA acts at context positions.
    """
    with in_float64(model) as exact:
        parameters = {name: weight for name, weight in exact.named_parameters() if weight.requires_grad}
        for batch in batches:
            gradients = reference_gradients(exact, batch, context_adapters=context_adapters)
            with torch.no_grad():
                for name, weight in parameters.items():
                    weight -= LEARNING_RATE * gradients[name]
        return trained_weights(exact)


def batches(rows: Sequence[Sample], size: int, steps: int) -> list[list[Sample]]:
    """Samples of each of the first steps, in order and from the start again."""
    return [[rows[(step * size + index) % len(rows)] for index in range(size)] for step in range(steps)]


def worst_update_error(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Largest relative error over weights of what training added to them, small updates against a hundredth."""
    assert actual.keys() == expected.keys()
    norms = {name: float((expected[name] - start[name]).double().norm()) for name in expected}
    floor = 1e-2 * max(norms.values())
    assert floor > 0
    return max(float((actual[name] - expected[name]).double().norm()) / max(norms[name], floor) for name in expected)


def assert_trained_as(run: Run, model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Holds the weights of a run in float64 to others, `model` being what both started from."""
    assert {weight.dtype for weight in run.weights.values()} == {torch.float64}
    assert worst_update_error(run.weights, expected, trained_weights(model)) <= UPDATE_TOLERANCE


def stopped_forward(model: nn.Module, row: Sample, **kwargs: Any) -> Any:
    """Output of one plain forward over a whole sample, with a stop-gradient at context positions."""
    with stop_gradient_at_context(model, row.boundary, len(row.input_ids)):
        return model(input_ids=row.input_ids[None], use_cache=False, **kwargs)


def gradients_of(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of a loss in every trainable weight, by name."""
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def decision_logprobs(logits: torch.Tensor, row: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities over the vocabulary `[labels, V]` where a label is predicted, and those labels.

    Args:
        logits: Of the whole sample, `[S, V]`.
        row: The sample.
    """
    predicted = row.labels[1:] != IGNORED
    return logits[:-1][predicted].log_softmax(-1), row.labels[1:][predicted]


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

# SPDX-License-Identifier: Apache-2.0
"""One step of the trainer as on a card, beside plain forwards of PyTorch's references with their gradient."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from frozen_peft import FrozenContextTrainer
from frozen_peft.context.kernels import choose_kernels
from tests.kernels.card import on_card, plain_kernels
from tests.reference import Sample, negative_log_likelihood, num_labels, reference_gradients, worst_gradient_error
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import as_dataset, config, decision_logprobs, gradients_of, samples, train
from tests.training.test_turns import conversation, per_span

__all__ = ["ARCHITECTURES", "FAULTS", "WAYS", "Errors", "model_of", "planted", "step_errors"]

# As small as the kernels take them: the interpreter runs a program at a time. One layer is linear attention. Channels
# of convolutions and strides are multiples of 8, as causal-conv1d has them.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
    },
    "kimi_linear": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_num_heads": 1,
    },
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
}

# Boundaries and decisions around multiples of 64, one token to train, contexts of other lengths in one batch and none.
ROWS = samples(((130, 2), (62, 67), (0, 11)))
CONVERSATIONS = [conversation(((66, 3), (9, 1), (1, 5)), 0), conversation(((31, 2), (70, 4)), 1)]


Rule = Callable[..., Any]


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        fields: Of the configuration.
        rows: What is trained on.
        full: Whether gradient goes through the context.
    """

    fields: dict[str, Any]
    rows: Sequence[Sample]
    full: bool = False


WAYS = {
    "tier 1": Way({"tier": 1}, ROWS, full=True),
    "tier 2": Way({"tier": 2}, ROWS),
    "tier 2, chunks of 40": Way({"tier": 2, "prefill_chunk_size": 40}, ROWS),
    "tier 3, stretches of 50": Way({"tier": 3, "sequence_chunk_size": 50}, ROWS, full=True),
    "turns": Way({"tier": 2, "decision_mode": "turns", "max_decisions_per_forward": 2}, CONVERSATIONS),
}


@dataclass(frozen=True)
class Errors:
    """Of one step.

    Attributes:
        loss: Of the mean over labels, absolute, in nats.
        entropy: Of TRL's metric, absolute, in nats; None in turns, where it is a mean over forwards.
        gradient: The largest over weights, relative.
        launched: How often each Triton kernel ran, by `package.function`.
    """

    loss: float
    entropy: float | None
    gradient: float
    launched: Counter[str]


def model_of(architecture: str) -> nn.Module:
    """A tiny model with an adapter at every linear layer."""
    return add_lora(tiny_model(architecture, **ARCHITECTURES[architecture]))


def step_errors(
    architecture: str,
    way: str,
    folder: Path,
    *,
    card: str = "A100",
    damage: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext(),
    **fields: Any,
) -> Errors:
    """Trains one step over all rows of a way and compares.

    Args:
        architecture: One of `ARCHITECTURES`.
        way: One of `WAYS`.
        folder: For what the trainer writes.
        card: One of `CARDS`.
        damage: Of the model while the trainer runs.
        fields: More of the configuration.
    """
    model = model_of(architecture)
    rows, full = WAYS[way].rows, WAYS[way].full
    parts = per_span(list(rows)) if way == "turns" else rows
    with plain_kernels(model):
        gradients = _full_gradients(model, parts) if full else reference_gradients(model, parts)
        loss = _loss(model, parts).item()
        entropy = _entropy(model, parts)
    choose_kernels(model)
    arguments = config(
        folder,
        max_steps=1,
        per_device_train_batch_size=len(rows),
        gradient_checkpointing=False,
        verify_context="never",
        router_aux_loss_coef=0.0,
        **WAYS[way].fields,
        **fields,
    )
    with on_card(card) as launched, damage(model):
        run = train(FrozenContextTrainer, model, arguments, as_dataset(rows))
    return Errors(
        abs(run.losses[0] - loss),
        None if way == "turns" else abs(run.logs[0]["entropy"] - entropy),
        worst_gradient_error(run.gradients[0], gradients),
        launched,
    )


def _loss(model: nn.Module, rows: Sequence[Sample]) -> torch.Tensor:
    losses = [negative_log_likelihood(model(input_ids=row.input_ids[None]).logits[0], row.labels) for row in rows]
    return torch.stack(losses).sum() / num_labels(rows)


@torch.no_grad()
def _entropy(model: nn.Module, rows: Sequence[Sample]) -> float:
    """Mean entropy where a label is predicted."""
    logits = [decision_logprobs(model(input_ids=row.input_ids[None]).logits[0], row)[0] for row in rows]
    logprobs = torch.cat(logits).double()
    return float(-(logprobs.exp() * logprobs).sum(-1).mean())


def _full_gradients(model: nn.Module, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    return gradients_of(_loss(model, rows), model)


def _transposed(rule: Rule) -> Rule:
    """Keys and values of the state in each other's place, as of a kernel that keeps values first."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output, state = rule(*args, **kwargs)
        return output, state if state is None else state.transpose(-1, -2).contiguous()

    return run


def _without_state(rule: Rule) -> Rule:
    """Every chunk starts as if nothing was before it."""
    return lambda *args, **kwargs: rule(*args, **(kwargs | {"initial_state": None}))


def _decay_converted_twice(rule: Rule) -> Rule:
    """The kernels compute with powers of 2: what is given to them is converted once more."""
    return lambda *args, g, **kwargs: rule(*args, g=g / math.log(2), **kwargs)


FAULTS = {
    "the state transposed": _transposed,
    "the initial state dropped": _without_state,
    "decay in the wrong space": _decay_converted_twice,
}


@contextmanager
def planted(fault: str, model: nn.Module) -> Iterator[None]:
    """Puts one of `FAULTS` around the gated delta rule that a model runs."""
    file = sys.modules[type(model.get_base_model()).__module__]
    name = "torch_chunk_gated_delta_rule"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, name, FAULTS[fault](getattr(file, name)))
        yield

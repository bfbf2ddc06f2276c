# SPDX-License-Identifier: Apache-2.0
"""How far the gradient over a frozen context points where the full one does: of a preference, and of a likelihood.

By plain forwards, the frozen context a stop-gradient (`tests/reference.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from peft import PeftModel
from torch.nn import functional

from tests.reference import stop_gradient_at_context, token_logprobs

BETA = 0.1  # TRL's default
LossName = Literal["preference", "likelihood"]
Pair = Mapping[str, list[int]]


def frozen_cosine(model: PeftModel, pairs: Sequence[Pair], name: LossName) -> float:
    """Cosine of the frozen with the full gradient, over all adapters and all pairs together.

    Args:
        model: With adapters.
        pairs: Token ids in `prompt_ids`, `chosen_ids` and `rejected_ids`.
        name: Of the loss: DPO's `sigmoid` loss, or the likelihood of the chosen answers.

    Raises:
        ValueError: Every pair has a length that is a size of the model's weights too, by which positions are found.
    """
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    # A stop-gradient finds positions by the length of a sequence, which must be no other size too.
    usable = [
        pair
        for pair in pairs
        if sizes.isdisjoint(len(pair["prompt_ids"]) + len(pair[name]) for name in ("chosen_ids", "rejected_ids"))
    ]
    if not usable:
        raise ValueError(
            f"each of the {len(pairs)} pairs has a length that is a size of the model's weights too: take others"
        )
    was_training = model.training
    model.eval()
    loss = _LOSSES[name]
    frozen, full = (
        sum(_gradient(model, loss(model, pair, is_frozen)) for pair in usable) for is_frozen in (True, False)
    )
    model.train(was_training)
    return float(functional.cosine_similarity(frozen, full, dim=0))


def _gradient(model: PeftModel, loss: torch.Tensor) -> torch.Tensor:
    """Over all adapters, flat."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.double().flatten() for gradient in torch.autograd.grad(loss, weights)])


def _preference(model: PeftModel, pair: Pair, frozen: bool) -> torch.Tensor:
    chosen, rejected = (_log_ratio(model, pair, name, frozen) for name in ("chosen_ids", "rejected_ids"))
    return -functional.logsigmoid(BETA * (chosen - rejected))


def _likelihood(model: PeftModel, pair: Pair, frozen: bool) -> torch.Tensor:
    return -_log_probability(model, pair, "chosen_ids", frozen)


_LOSSES: dict[LossName, Callable[[PeftModel, Pair, bool], torch.Tensor]] = {
    "preference": _preference,
    "likelihood": _likelihood,
}


def _log_ratio(model: PeftModel, pair: Pair, name: str, frozen: bool) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = _log_probability(model, pair, name, frozen=False)
    return _log_probability(model, pair, name, frozen) - reference


def _log_probability(model: PeftModel, pair: Pair, name: str, frozen: bool) -> torch.Tensor:
    input_ids = torch.tensor(pair["prompt_ids"] + pair[name])
    boundary = len(pair["prompt_ids"]) - 1
    stopped = stop_gradient_at_context(model, boundary, len(input_ids)) if frozen else nullcontext()
    with stopped:
        logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
    return token_logprobs(logits[boundary:], input_ids[boundary:]).sum()

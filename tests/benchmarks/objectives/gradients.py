# SPDX-License-Identifier: Apache-2.0
"""How far the gradient over a frozen context points where the full one does: of a preference, and of a likelihood.

By plain forwards, the frozen context a stop-gradient (`tests/reference.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel
from torch.nn import functional

from tests.reference import stop_gradient_at_context, token_logprobs

BETA = 0.1  # TRL's default
Pair = Mapping[str, list[int]]


def cosines(model: PeftModel, pairs: Sequence[Pair]) -> dict[str, float]:
    """Cosine of the frozen with the full gradient, over all adapters and all pairs together.

    Args:
        model: With adapters, whose dropout is off.
        pairs: Token ids in `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Returns:
        That of DPO's `sigmoid` loss in `preference`, that of the chosen answers' in `likelihood`.
    """
    model.eval()
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    # A stop-gradient finds positions by the length of a sequence, which must be no other size too.
    usable = [
        pair
        for pair in pairs
        if sizes.isdisjoint(len(pair["prompt_ids"]) + len(pair[name]) for name in ("chosen_ids", "rejected_ids"))
    ]
    losses: dict[str, Callable[[Pair, bool], torch.Tensor]] = {
        "preference": lambda pair, frozen: _preference(model, pair, frozen),
        "likelihood": lambda pair, frozen: -_log_probability(model, pair, "chosen_ids", frozen),
    }
    found = {}
    for name, loss in losses.items():
        frozen, full = (_gradient(model, [loss(pair, is_frozen) for pair in usable]) for is_frozen in (True, False))
        found[name] = float(functional.cosine_similarity(frozen, full, dim=0))
    return found


def _gradient(model: PeftModel, losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of the mean, over all adapters, flat."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(torch.stack(list(losses)).mean(), weights)
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def _preference(model: PeftModel, pair: Pair, frozen: bool) -> torch.Tensor:
    chosen, rejected = (_log_ratio(model, pair, name, frozen) for name in ("chosen_ids", "rejected_ids"))
    return -functional.logsigmoid(BETA * (chosen - rejected))


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

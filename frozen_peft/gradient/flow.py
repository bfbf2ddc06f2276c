# SPDX-License-Identifier: Apache-2.0
"""What the gradient of a model's adapters knows about the context, before anything is trained.

Two gradients of the same loss are compared, projection by projection: the *frozen* one of tier 2, which stops at
everything computed at context positions, and the *full* one of tier 3. Their difference is what passes through the
context, and its share is `|full - frozen| / |full|`.

- *The loss* is the mean negative log-likelihood of all supervised tokens of all samples.
- *The gradient* is that of `lora_B`, of the rows that hold a role. The update of a weight is `scaling * lora_B @
  lora_A`, so with `lora_B` at zero, where training starts, `lora_A` has no gradient at all; that of `lora_B` is the
  weight's own gradient seen through the random projection `lora_A`, which keeps angles and shares roughly. And of two
  roles in one fused projection each has its own rows of `lora_B`, while `lora_A` is common to both.

Samples run one at a time: the context is encoded without gradient, the decision runs over it forward and backward, and
the whole sample in stretches of the sequence (`stretches`). What is kept are sums: a few numbers per layer, and one
copy of `lora_B` per gradient that is compared. The logits of a decision's supervised tokens exist at a time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from frozen_peft.context import TAIL, Cut
from frozen_peft.gradient.flow_meter import FlowMeter

__all__ = ["FORMAT", "GradientFlow", "GradientShare", "HorizonFlow", "ProjectionFlow", "gradient_flow", "pooled"]

FORMAT = 1


@dataclass(frozen=True)
class GradientShare:
    """A gradient that stops in the context, compared with the full one.

    Attributes:
        frozen_norm: Euclidean norm of the one that stops.
        full_norm: Norm of the full one.
        cosine: Cosine of the angle between them; None where one of them is zero.
        context_share: Norm of their difference over that of the full one; None where that is zero.
    """

    frozen_norm: float
    full_norm: float
    cosine: float | None
    context_share: float | None


@dataclass(frozen=True)
class ProjectionFlow:
    """The gradients of one role of one projection.

    Attributes:
        layer: Index of its layer; outside of all layers, one past the last.
        role: What it does (`adapters.ROLES`), or `other`.
        module: Name of the linear module in the model, without PEFT's wrapping.
        gradient: The comparison.
    """

    layer: int
    role: str
    module: str
    gradient: GradientShare


@dataclass(frozen=True)
class HorizonFlow:
    """Gradients that reach so far into the context.

    Attributes:
        horizon: Context tokens just before the decision that carry gradient; 0: none, tier 2.
        total: All adapted rows of all `lora_B` as one vector.
        projections: By module and role.
    """

    horizon: int
    total: GradientShare
    projections: list[ProjectionFlow]


@dataclass(frozen=True)
class GradientFlow:
    """What was measured.

    Attributes:
        num_samples: Decisions measured.
        num_context_tokens: Context tokens of all of them.
        num_decision_tokens: Decision tokens of all of them.
        loss: Mean negative log-likelihood of a supervised token, in nats.
        horizons: The gradients of every horizon asked for, in that order.
    """

    num_samples: int
    num_context_tokens: int
    num_decision_tokens: int
    loss: float
    horizons: list[HorizonFlow]

    def as_dict(self) -> dict[str, Any]:
        """What `gradient_flow.json` holds: the first horizon in full, of any others the totals."""
        first, *others = self.horizons
        rows = [
            {"layer": part.layer, "role": part.role, "module": part.module, **asdict(part.gradient)}
            for part in first.projections
        ]
        values: dict[str, Any] = {
            "format": FORMAT,
            "samples": self.num_samples,
            "tokens": {"context": self.num_context_tokens, "decision": self.num_decision_tokens},
            "loss": self.loss,
            "horizon": first.horizon,
            "gradient": rows,
            "total": asdict(first.total),
        }
        if others:
            values["horizons"] = [{"horizon": other.horizon, **asdict(other.total)} for other in others]
        return values


def gradient_flow(
    model: torch.nn.Module,
    batch: Mapping[str, torch.Tensor] | Iterable[Mapping[str, torch.Tensor]],
    *,
    horizons: Sequence[int] = (0,),
    cut: Cut = TAIL,
    prefill_chunk_size: int = 2048,
    sequence_chunk_size: int = 2048,
    progress: bool = False,
) -> GradientFlow:
    """Measures what the gradient of a model's adapters knows about the context.

    Adapters are active everywhere, in the context too, and dropout is off. The model is left as it was, but for its
    attention, which may read two segments from now on (`use_segmented_attention`), as in training. Under autocast,
    everything runs as in training.

    Args:
        model: A causal language model of transformers with LoRA adapters.
        batch: A batch, or several: `input_ids`, `labels` and, where there is padding (on either side),
            `attention_mask`, each of shape `(samples, tokens)`. A sample without context is no error: its frozen
            gradient is the full one.
        horizons: Gradients to compare with the full one, by the number of context tokens that they reach; 0: tier 2.
        cut: Where samples are cut; its own `gradient_horizon` does not matter.
        prefill_chunk_size: Context tokens per forward without gradient; 0: one forward.
        sequence_chunk_size: Tokens that have their activations in memory at a time.
        progress: Whether to show a progress bar.

    Returns:
        The figures, for all samples together.

    Raises:
        ValueError: The model has no LoRA adapters, there is no sample, or one without a supervised label; or an
            argument is out of range.
        ContextMismatchError: transformers does not continue this architecture exactly from a cache.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    meter = FlowMeter(
        model,
        horizons,
        prefill_chunk_size=prefill_chunk_size,
        sequence_chunk_size=sequence_chunk_size,
    )
    decisions = [meter.cut(one, cut) for one in batches]
    num_samples = sum(map(len, decisions))
    if not num_samples:
        raise ValueError("There is no sample to measure: the batch is empty.")
    with tqdm(total=num_samples, desc="Gradient flow", unit=" samples", delay=2, disable=not progress) as bar:
        for group in decisions:
            meter.measure(group, bar.update)
    return GradientFlow(
        num_samples=num_samples,
        num_context_tokens=sum(len(decision.context) for group in decisions for decision in group),
        num_decision_tokens=sum(len(decision.input_ids) for group in decisions for decision in group),
        loss=meter.loss(),
        horizons=[_horizon_flow(meter, horizon) for horizon in horizons],
    )


def pooled(parts: Sequence[GradientShare]) -> GradientShare:
    """The comparison of several gradients as one, of weights that none of them have in common."""
    frozen_square = math.fsum(part.frozen_norm**2 for part in parts)
    full_square = math.fsum(part.full_norm**2 for part in parts)
    product = math.fsum((part.cosine or 0.0) * part.frozen_norm * part.full_norm for part in parts)
    difference = math.fsum(((part.context_share or 0.0) * part.full_norm) ** 2 for part in parts)
    both = math.sqrt(frozen_square * full_square)
    return GradientShare(
        math.sqrt(frozen_square),
        math.sqrt(full_square),
        # Rounding may leave a little more than 1.
        max(-1.0, min(1.0, product / both)) if both > 0.0 else None,
        math.sqrt(difference / full_square) if full_square > 0.0 else None,
    )


def _horizon_flow(meter: FlowMeter, horizon: int) -> HorizonFlow:
    total = pooled([_share(*meter.gradients(horizon, weight, rows)) for weight, rows in enumerate(meter.adapted)])
    projections = [
        ProjectionFlow(part.layer, part.role, part.module, _share(*meter.gradients(horizon, part.weight, part.rows)))
        for part in meter.parts
    ]
    return HorizonFlow(horizon, total, projections)


def _share(frozen: torch.Tensor, full: torch.Tensor) -> GradientShare:
    """Compares two gradients of the same shape, in float64."""
    frozen, full = frozen.double(), full.double()
    frozen_norm, full_norm = float(frozen.norm()), float(full.norm())
    cosine = share = None
    if frozen_norm > 0.0 and full_norm > 0.0:
        cosine = max(-1.0, min(1.0, float((frozen / frozen_norm).flatten() @ (full / full_norm).flatten())))
    if full_norm > 0.0:
        share = float((full - frozen).norm()) / full_norm
    return GradientShare(frozen_norm, full_norm, cosine, share)

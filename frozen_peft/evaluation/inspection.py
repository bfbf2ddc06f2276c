# SPDX-License-Identifier: Apache-2.0
"""Gradient flow on a recipe's own samples: which are taken, how they are cut, and the table of what was found."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers import PretrainedConfig

from frozen_peft.adapters import ROLES
from frozen_peft.config import FrozenContextConfig
from frozen_peft.context import Cut, Decision, cut_batch
from frozen_peft.context.branches import BRANCHES
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.gradient import GradientFlow, gradient_flow
from frozen_peft.gradient.flow import GradientShare, pooled
from frozen_peft.planning import (
    DataFigures,
    GradientFigures,
    Plan,
    Setting,
    TierAdvice,
    advise_tier,
    cheapest_fitting,
    make_plan,
    measure_data,
)
from frozen_peft.training.model_setup import make_cut
from frozen_peft.training.sft import FrozenContextTrainer
from frozen_peft.utils.tables import aligned

__all__ = ["advice_text", "advise", "as_inspected", "flow_table", "inspect_data", "inspect_samples", "plan_memory"]

DEFAULT_STRETCH = 2048
HORIZONS = tuple(4**power for power in range(3, 12))
# What is compared of a large dataset.
MAX_ROWS, MAX_TOKENS = 2_000, 20_000_000


def as_inspected(config: FrozenContextConfig) -> list[str]:
    """Changes a configuration to one whose trainer freezes contexts with the adapters on, as inspection compares it.

    Returns:
        What was changed that a user would want to know, one sentence each.

    Raises:
        ValueError: Samples are put into one row, where contexts cannot be told apart.
    """
    for name in ("packing", "padding_free"):
        if getattr(config, name):
            raise ValueError(
                f"`{name}` puts several samples into one row, and gradient flow is measured one sample at a time. Set "
                f"`{name}: false`."
            )
    notes = []
    if config.gradient_horizon:
        found = "tier 1 or 3" if config.gradient_horizon == -1 else f"`gradient_horizon: {config.gradient_horizon}`"
        notes.append(f"The recipe is of {found}; compared are tier 2 and the full gradient all the same.")
    if not config.context_adapters:
        notes.append(
            "The recipe has `context_adapters: false`; measured is what adapters would do in the context too."
        )
    if config.loss_type != "nll":
        notes.append(f"The recipe has `loss_type: {config.loss_type}`; measured is the likelihood of the decisions.")
    config.tier, config.gradient_horizon = 2, 0
    config.context_adapters, config.invocation = True, None
    # Nothing is kept beyond a sample.
    config.context_cache_size, config.context_cache_dir, config.max_context_staleness = "0", None, 0
    config.context_cache_dtype = "auto"
    return notes


def inspect_samples(trainer: FrozenContextTrainer, num_samples: int, *, with_horizons: bool = False) -> GradientFlow:
    """Measures the gradient flow on samples of the training data.

    Args:
        trainer: A trainer whose configuration is as `as_inspected` leaves it.
        num_samples: How many, drawn at random by the configuration's seed; all where there are fewer. Of a stream the
            first ones.
        with_horizons: Compare gradients that reach 64, 256, 1,024, ... tokens into the context too, as long
            as the longest is longer.

    Raises:
        ValueError: Less than one sample is asked for, or the model has no adapters.
    """
    if num_samples < 1:
        raise ValueError(f"`samples` must be 1 or more, found {num_samples}.")
    args, model = trainer.args, trainer.model
    if args.gradient_checkpointing:
        get_pretrained_model(model).activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    # As in training, where layers recompute what they do not keep; dropout is off all the same.
    model.train()
    cut = make_cut(args, trainer.processing_class, ())
    batches = [trainer.data_collator([row]) for row in _rows(trainer, num_samples)]
    longest = max((len(decision.context) for batch in batches for decision in _decisions(batch, cut)), default=0)
    horizons = itertools.takewhile(lambda horizon: horizon < longest, HORIZONS if with_horizons else ())
    with trainer.accelerator.autocast():
        return gradient_flow(
            model,
            batches,
            horizons=(0, *horizons),
            cut=cut,
            prefill_chunk_size=args.prefill_chunk_size,
            sequence_chunk_size=args.sequence_chunk_size or DEFAULT_STRETCH,
            progress=True,
        )


def inspect_data(trainer: FrozenContextTrainer) -> DataFigures:
    """Measures the training data as it is cut, up to `MAX_ROWS` samples or `MAX_TOKENS` tokens of it."""
    cut = make_cut(trainer.args, trainer.processing_class, ())

    def samples() -> Iterator[list[Decision]]:
        num_tokens = 0
        for row in tqdm(_rows(trainer, MAX_ROWS), desc="Comparing contexts", unit=" samples", delay=2):
            decisions = _decisions(trainer.data_collator([row]), cut)
            yield decisions
            num_tokens += sum(len(decision.context) for decision in decisions)
            if num_tokens > MAX_TOKENS:
                return

    args = trainer.args
    return measure_data(samples(), samples_per_step=args.train_batch_size * args.gradient_accumulation_steps)


def plan_memory(
    config: PretrainedConfig,
    trainer: FrozenContextTrainer,
    data: DataFigures,
    memory_limit: int | None,
    **choices: Any,
) -> tuple[Plan, Plan]:
    """What tiers 2 and 3 take at the longest sample of the data, each in the cheapest setting that fits.

    Args:
        config: The model's configuration, as it is loaded.
        trainer: The trainer of the recipe.
        data: What the data is like.
        memory_limit: Bytes that the device has; None: not asked.
        choices: What `planning.Setting` has and the trainer's configuration has not.
    """
    frozen = Setting.from_config(
        trainer.args, context_length=data.longest_context, decision_length=data.longest_decision, **choices
    )
    plans = (make_plan(config, setting, memory_limit) for setting in (frozen, replace(frozen, tier=3)))
    of_tier_2, of_tier_3 = (cheapest_fitting(plan) or plan for plan in plans)
    return of_tier_2, of_tier_3


def advise(
    flow: GradientFlow,
    data: DataFigures,
    frozen_plan: Plan | None = None,
    full_plan: Plan | None = None,
) -> TierAdvice:
    """`advise_tier` on what was measured."""
    first, *others = flow.horizons
    horizons = [(other.horizon, other.total.cosine) for other in others if other.total.cosine is not None]
    gradient = GradientFigures(first.total.cosine, first.total.context_share, tuple(horizons))
    return advise_tier(gradient, data, frozen_plan, full_plan)


def advice_text(advice: TierAdvice) -> str:
    """The fields to set, and why."""
    fields = [f"{name}: {str(value).lower()}" for name, value in advice.fields.items()]
    return "\n".join(["advice", *(f"  {line}" for line in fields), "", " ".join(advice.sentences)])


def _decisions(batch: Mapping[str, torch.Tensor], cut: Cut) -> list[Decision]:
    """The decisions of a batch of one sample."""
    mask, branches = batch.get("attention_mask"), batch.get(BRANCHES)
    (decisions,) = cut_batch(batch["input_ids"], batch["labels"], mask, cut, branches)
    return decisions


def _rows(trainer: FrozenContextTrainer, num_samples: int) -> Iterator[dict[str, Any]]:
    """Samples drawn at random, all where there are fewer; of a stream the first ones."""
    dataset: Any = trainer.train_dataset
    if isinstance(dataset, IterableDataset):
        yield from itertools.islice(dataset, num_samples)
        return
    assert isinstance(dataset, Dataset)
    drawn = random.Random(trainer.args.seed).sample(range(len(dataset)), min(num_samples, len(dataset)))
    yield from dataset.select(sorted(drawn))


def flow_table(flow: GradientFlow) -> str:
    """The figures as text: layers against roles, then all together."""
    first = flow.horizons[0]
    parts = [_gradient_table(flow)]
    rows = [
        [
            _reach(horizon.horizon),
            f"{horizon.total.frozen_norm:.3e}",
            _number(horizon.total.cosine),
            _percent(horizon.total.context_share),
        ]
        for horizon in flow.horizons
    ]
    rows.append(["full", f"{first.total.full_norm:.3e}", "1.00", "0%"])
    parts.append("all adapters\n" + _aligned([["gradient", "norm", "cosine", "share left out"], *rows]))
    tokens = f"{flow.num_context_tokens:,} tokens of context and {flow.num_decision_tokens:,} of decisions"
    parts.append(f"{flow.num_samples} samples, {tokens}; loss {flow.loss:.4f}")
    return "\n\n".join(parts)


def _gradient_table(flow: GradientFlow) -> str:
    """Cosine and share of every layer and role, and of all of a layer and all of a role."""
    cells: dict[tuple[int, str], list[GradientShare]] = {}
    for part in flow.horizons[0].projections:
        cells.setdefault((part.layer, part.role), []).append(part.gradient)
    layers = sorted({layer for layer, _ in cells})
    roles = [role for role in (*ROLES, "other") if any(role == own for _, own in cells)]

    def cell(chosen_layers: Sequence[int], chosen_roles: Sequence[str]) -> str:
        found = [part for layer in chosen_layers for role in chosen_roles for part in cells.get((layer, role), [])]
        if not found:
            return ""
        share = pooled(found)
        return f"{_number(share.cosine)} {_percent(share.context_share):>4}"

    table = [["layer", *roles, "all"]]
    table += [[str(layer), *(cell([layer], [role]) for role in roles), cell([layer], roles)] for layer in layers]
    table.append(["all", *(cell(layers, [role]) for role in roles), cell(layers, roles)])
    title = (
        "gradient of lora_B: cosine of tier 2 with the full gradient, and the share that passes through the context"
    )
    return f"{title}\n{_aligned(table)}"


def _reach(horizon: int) -> str:
    return "tier 2" if horizon == 0 else f"last {horizon} tokens"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(aligned(rows, right=range(len(rows[0]))))

# SPDX-License-Identifier: Apache-2.0
"""What a model makes of rows: greedy exact match, margin, loss, and divergence from the base, one entry per row."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from frozen_peft.context import ContextStore, stop_tokens_of
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.evaluation.decision_scores import DecisionScorer, Weights
from frozen_peft.evaluation.decision_tokens import TokenizedDecision
from tests.benchmarks.real.samples import Row

Score = dict[str, Any]


def score_rows(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    conditions: Sequence[str] = ("given",),
    weights: Sequence[Weights] = ("base", "adapted"),
    contexts: ContextStore | None = None,
) -> dict[str, dict[Weights, list[Score]]]:
    """Scores the decisions of rows in several kinds of context, which share what they begin with.

    Args:
        model: A model, or one with adapters.
        tokenizer: Its tokenizer.
        rows: What to score.
        conditions: The contexts that they stand in.
        weights: With adapters, without, or both, which is what the divergence takes.
        contexts: Keeps the base's contexts from one model with adapters to the next.

    Returns:
        By condition and weights, for each row its `kind`; whether greedy decoding gives the decision (`exact`); the
        decision's negative log-probability and tokens; the `margin` by which it is more likely than the rejected one,
        or None; and `kl`, KL(base || adapted) per token of the decision, or None. All in nats, margins between means
        per token: an answer of the base that is cut off is twice as long as most decisions, and less likely for that
        alone.
    """
    stops = stop_tokens_of(tokenizer, get_pretrained_model(model).generation_config)
    scorer = DecisionScorer(model, batch_size=4, stop_tokens=stops, store=contexts)
    asked = [
        (condition, index, name)
        for condition in conditions
        for index, row in enumerate(rows)
        for name in ("decision", "rejected")
        if row[name] is not None
    ]
    decisions = [
        TokenizedDecision(
            torch.tensor(rows[index][condition]), torch.tensor(rows[index][name]), f"row {index} ({condition})"
        )
        for condition, index, name in asked
    ]
    found = scorer.score(decisions, weights=weights)
    by_weights = {which: dict(zip(asked, found[which], strict=True)) for which in weights}
    return {
        condition: {
            which: _by_row(rows, {key[1:]: score for key, score in scores.items() if key[0] == condition})
            for which, scores in by_weights.items()
        }
        for condition in conditions
    }


def loss(scores: Sequence[Score]) -> float:
    """Mean over rows of the decision's loss per token, so that long answers count no more than short ones."""
    return sum(score["nll"] / score["tokens"] for score in scores) / len(scores)


def _by_row(rows: Sequence[Row], scores: dict[tuple[int, str], Any]) -> list[Score]:
    found = []
    for index, row in enumerate(rows):
        own, rejected = scores[index, "decision"], scores.get((index, "rejected"))
        per_token = [one.logprob / one.num_tokens for one in (own, rejected) if one is not None]
        margin = None if rejected is None else round(per_token[0] - per_token[1], 4)
        figures = {"kind": row["kind"], "exact": own.is_greedy, "margin": margin, "kl": own.kl_to_base}
        found.append(figures | {"nll": round(-own.logprob, 4), "tokens": own.num_tokens})
    return found

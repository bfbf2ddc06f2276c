# SPDX-License-Identifier: Apache-2.0
"""What a model makes of probes: per probe, and in figures.

- A decision's log-probability is the *sum* over its tokens, to the end of its turn; means per token stand beside it.
- A probe is *preferred* where that of the preferred decision is the larger one; its *margin* is the difference.
- Greedy decoding gives a decision *exactly* when each of its tokens is the most likely one after those before it, up
  to the one that ends the turn; so one forward tells, without decoding.
- On control probes, *KL to the base* is that of the preferred decision: the mean over its tokens of KL(base || model).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from frozen_peft.context import ContextStore, DiskLevel, stop_tokens_of
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.evaluation.decision_scores import DecisionScore, DecisionScorer, Weights
from frozen_peft.evaluation.intervals import Mean, Proportion, bootstrap_mean, wilson_proportion
from frozen_peft.evaluation.probe_tokens import ProbeDecisions, ProbeTokens
from frozen_peft.evaluation.probes import CONDITIONS, KINDS, Condition, Probe, ProbeKind

__all__ = ["ProbeScore", "ProbeScores", "ProbeSummary", "compare_probes", "score_probes", "summarize"]


@dataclass(frozen=True)
class ProbeScore:
    """What a model makes of one probe.

    Attributes:
        probe: The probe.
        preferred: Score of the preferred decision.
        rejected: Score of the rejected decision.
        is_exact: Whether greedy decoding gives what the probe expects; None where it expects nothing.
    """

    probe: Probe
    preferred: DecisionScore
    rejected: DecisionScore
    is_exact: bool | None

    @property
    def margin(self) -> float:
        """How much more likely the preferred decision is, in nats."""
        return self.preferred.logprob - self.rejected.logprob

    @property
    def margin_per_token(self) -> float:
        """The same between the means per token, which do not favour the shorter decision."""
        per_token = (score.logprob / score.num_tokens for score in (self.preferred, self.rejected))
        return next(per_token) - next(per_token)

    @property
    def is_preferred(self) -> bool:
        """Whether the preferred decision is the more likely one; a tie is not."""
        return self.margin > 0

    @property
    def kl_to_base(self) -> float | None:
        """That of the preferred decision of a control probe; None of others, or where the base was not scored."""
        return self.preferred.kl_to_base if self.probe.kind == "control" else None


@dataclass(frozen=True)
class ProbeScores:
    """What a model makes of probes under one condition.

    Attributes:
        model: `"base"` without adapters, `"adapted"` with them.
        condition: The contexts that the probes were scored in.
        scores: One per probe, in their order, but for those that cannot be had under this condition.
        notes: What to know about them.
    """

    model: Weights
    condition: Condition
    scores: tuple[ProbeScore, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeSummary:
    """Figures of the probes of one kind.

    Attributes:
        preference: Share of probes whose preferred decision is the more likely one, with its Wilson interval.
        margin: Mean margin between the decisions' log-probabilities, in nats, with its bootstrap interval.
        margin_per_token: The same between means per token.
        exact_match: Share of the probes that expect a decision of which greedy decoding gives just that; None where
            no probe does.
        kl_to_base: Mean KL to the base, in nats per token; None where it was not measured.
    """

    preference: Proportion
    margin: Mean
    margin_per_token: Mean
    exact_match: Proportion | None = None
    kl_to_base: Mean | None = None


def score_probes(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe] | ProbeTokens,
    condition: Condition = "given",
    *,
    adapters: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    prefill_chunk_size: int = 2048,
) -> ProbeScores:
    """Scores probes with one model under one condition.

    Every distinct context is encoded once for all decisions in it. Tokens are those that TRL trains on.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one; its modes are left as they are.
        tokenizer: Its tokenizer, with a chat template where prompts are messages.
        probes: What to score; tokenized ones where several models with one tokenizer are scored.
        condition: The context: `given`, `instructed`, `shuffled` or `empty`, see `probes`.
        adapters: Whether a `PeftModel` is scored with its adapters, or as its base.
        seed: Decides who gets whose context in `shuffled`.
        batch_size: Decisions per forward.
        prefill_chunk_size: Context tokens per prefill forward; 0: one forward.

    Raises:
        ValueError: A probe cannot be scored, or none can be under this condition; the message names it.
        ContextMismatchError: The model's decision over a frozen context is not what a plain forward gives.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """
    weights: Weights = "adapted" if adapters and isinstance(model, PeftModel) else "base"
    (scores,) = compare_probes(
        model,
        tokenizer,
        probes,
        [condition],
        weights=[weights],
        seed=seed,
        batch_size=batch_size,
        prefill_chunk_size=prefill_chunk_size,
    )
    return scores


def compare_probes(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe] | ProbeTokens,
    conditions: Sequence[Condition] = CONDITIONS,
    *,
    weights: Sequence[Weights] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    prefill_chunk_size: int = 2048,
    context_cache_dir: str | Path | None = None,
    on_bad: Callable[[str], None] | None = None,
) -> list[ProbeScores]:
    """Scores probes before and after training, under several conditions, each distinct context encoded once.

    Args:
        model: A `PeftModel`, scored as its base and with its adapters, control probes also by their KL; or a plain
            model, scored as the base.
        tokenizer: Its tokenizer, with a chat template where prompts are messages.
        probes: What to score; tokenized ones where several models with one tokenizer are scored.
        conditions: The contexts, see `probes`.
        weights: Which of a `PeftModel`'s weights are scored; None: both.
        seed: Decides who gets whose context in `shuffled`.
        batch_size: Decisions per forward.
        prefill_chunk_size: Context tokens per prefill forward; 0: one forward.
        context_cache_dir: Folder of files for the contexts as the base encodes them, so that it does so once for
            several adapters; those of training with `context_adapters=False` serve too. None: nothing is kept.
        on_bad: Called with the message of a probe that has no tokens to score, which is then left out. Without it
            that is an error.

    Returns:
        One entry per model and condition, the base's first; without scores where a note says why.

    Raises:
        ValueError: A probe cannot be scored, or none can; the message names it.
        ContextMismatchError: The model's decision over a frozen context is not what a plain forward gives.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """
    if weights is None:
        weights = ["base", "adapted"] if isinstance(model, PeftModel) else ["base"]
    tokens = probes if isinstance(probes, ProbeTokens) else ProbeTokens(tokenizer, probes, on_bad)
    stops: Sequence[int] = ()
    if any(probe.expected is not None for probe in tokens.probes):
        stops = stop_tokens_of(tokenizer, getattr(get_pretrained_model(model), "generation_config", None))
    disk = DiskLevel.at(context_cache_dir)
    scorer = DecisionScorer(
        model,
        batch_size=batch_size,
        chunk_size=prefill_chunk_size,
        stop_tokens=stops,
        store=None if disk is None else ContextStore(0, disk),
    )
    asked: dict[Condition, list[ProbeDecisions]] = {}
    general, notes = tuple(tokens.notes), {}
    for condition in dict.fromkeys(conditions):
        num_notes = len(tokens.notes)
        asked[condition] = tokens.under(condition, seed=seed)
        notes[condition] = (*general, *tokens.notes[num_notes:])
    decisions = [
        replace(decision, name=f"{decision.name} ({condition})")
        for condition, probes_under in asked.items()
        for own in probes_under
        for decision in own.decisions.values()
    ]
    if not decisions:
        raise ValueError(f"no probe can be scored. {' '.join(tokens.notes)}")
    results = []
    for which, found in scorer.score(decisions, weights=weights).items():
        rest = iter(found)
        for condition, probes_under in asked.items():
            scores = tuple(_probe_score(own, rest) for own in probes_under)
            results.append(ProbeScores(which, condition, scores, notes[condition]))
    return results


def summarize(scores: ProbeScores, *, seed: int = 0) -> dict[ProbeKind, ProbeSummary]:
    """The figures of each kind of probe that there is.

    Args:
        scores: What a model made of the probes.
        seed: Decides the resamples of bootstrap intervals.
    """
    summaries = {}
    for kind in KINDS:
        own = [score for score in scores.scores if score.probe.kind == kind]
        if not own:
            continue
        exact = [score.is_exact for score in own if score.is_exact is not None]
        divergences = [score.kl_to_base for score in own if score.kl_to_base is not None]
        summaries[kind] = ProbeSummary(
            preference=wilson_proportion(sum(score.is_preferred for score in own), len(own)),
            margin=bootstrap_mean([score.margin for score in own], seed=seed),
            margin_per_token=bootstrap_mean([score.margin_per_token for score in own], seed=seed),
            exact_match=wilson_proportion(sum(exact), len(exact)) if exact else None,
            kl_to_base=bootstrap_mean(divergences, seed=seed) if divergences else None,
        )
    return summaries


def _probe_score(asked: ProbeDecisions, found: Iterator[DecisionScore]) -> ProbeScore:
    """What was made of one probe, of the scores of its decisions, which come next."""
    score_of = {name: next(found) for name in asked.decisions}
    is_exact = score_of["expected"].is_greedy if "expected" in score_of else None
    return ProbeScore(asked.probe, score_of["preferred"], score_of["rejected"], is_exact)

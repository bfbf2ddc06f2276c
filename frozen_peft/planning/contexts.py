# SPDX-License-Identifier: Apache-2.0
"""What the contexts of a dataset are like: how long, how many decisions share one, how much they begin alike."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from frozen_peft.context import Decision
from frozen_peft.context.prefixes import num_shared, token_order
from frozen_peft.planning.tiers import DataFigures

__all__ = ["measure_data"]


def measure_data(samples: Iterable[Sequence[Decision]], *, samples_per_step: int = 1) -> DataFigures:
    """Measures samples as they are cut.

    Takes eight bytes per context token, and n log n comparisons for n decisions.

    Args:
        samples: The decisions of each sample.
        samples_per_step: Samples of an optimizer step.

    Raises:
        ValueError: There is no sample.
    """
    contexts: list[np.ndarray] = []
    decision_lengths: list[int] = []
    num_samples = 0
    for decisions in samples:
        num_samples += 1
        for decision in decisions:
            decision_lengths.append(len(decision.input_ids))
            contexts.append(decision.context.cpu().numpy().astype(np.int32))
    if not contexts:
        raise ValueError("There is no sample to measure: the dataset is empty.")
    lengths = [len(context) for context in contexts]
    contexts.sort(key=token_order)
    repeated = sum(num_shared(one, other) for one, other in itertools.pairwise(contexts))
    return DataFigures(
        context_tokens=sum(lengths) / len(lengths),
        longest_context=max(lengths),
        decision_tokens=sum(decision_lengths) / len(lengths),
        longest_decision=max(decision_lengths),
        decisions_per_sample=len(lengths) / num_samples,
        decisions_per_context=len(lengths) / len(set(map(token_order, contexts))),
        shared=repeated / sum(lengths) if any(lengths) else 0.0,
        samples_per_step=samples_per_step,
    )

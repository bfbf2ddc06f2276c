# SPDX-License-Identifier: Apache-2.0
"""How much contexts age: what a step would have seen, and learned, from contexts that are some steps old."""

import statistics
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from frozen_peft.context import TAIL, FrozenContext, cut_batch, decision_forward, encode_context, pad_decisions
from tests.reference import CACHE

LAGS = (1, 4, 16)


class Drift(TrainerCallback):
    """Compares, before every step, the contexts of one batch with what they were some steps ago.

    Args:
        trainer: Its first batch is the one that is looked at.
    """

    def __init__(self, trainer: Any):
        self._model = trainer.model
        rows = trainer.train_dataset[: trainer.args.per_device_train_batch_size]
        longest = max(map(len, rows["input_ids"]))
        input_ids, labels, mask = (
            torch.tensor([row + [filling] * (longest - len(row)) for row in values])
            for values, filling in (
                (rows["input_ids"], 0),
                (rows["labels"], -100),
                ([[1] * len(row) for row in rows["input_ids"]], 0),
            )
        )
        samples = cut_batch(input_ids, labels, mask, TAIL)
        self._batch = pad_decisions([decision for sample in samples for decision in sample])
        self._past: deque[FrozenContext] = deque(maxlen=max(LAGS) + 1)
        self._found: dict[str, list[float]] = defaultdict(list)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Encodes the contexts anew and compares."""
        self._past.append(encode_context(self._model, self._batch.contexts))
        if len(self._past) <= max(LAGS):
            return
        now = self._past[-1]
        gradient = self._gradient(now)
        for lag in LAGS:
            then = self._past[-1 - lag]
            for kind in ("recurrent", "keys", "values"):
                change = relative_change(list(states(now, kind)), list(states(then, kind)))
                self._found[f"{kind}/{lag}"].append(change)
            self._found[f"gradient/{lag}"].append(relative_change(gradient, self._gradient(then)))

    def summary(self) -> dict[str, float]:
        """Mean over the steps, by kind and lag."""
        return {name: statistics.mean(values) for name, values in self._found.items()}

    def _gradient(self, contexts: FrozenContext) -> list[torch.Tensor]:
        """Gradient of the batch's loss with these contexts and the adapter as it is."""
        weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        with torch.enable_grad(), decision_forward(self._model):
            loss = self._model(
                input_ids=self._batch.input_ids,
                attention_mask=self._batch.attention_mask,
                position_ids=self._batch.position_ids,
                labels=self._batch.labels,
                **{CACHE: contexts},
            ).loss
        return list(torch.autograd.grad(loss, weights))


def states(contexts: FrozenContext, kind: str) -> Iterator[torch.Tensor]:
    """Recurrent states, keys or values of every context in every layer that has them."""
    for row in contexts.rows:
        for layer in row.layers:
            if kind == "recurrent" and layer.linear is not None:
                yield from layer.linear.recurrent.values()
            elif kind != "recurrent" and layer.attention is not None:
                yield torch.cat(getattr(layer.attention, kind), dim=-2)


def relative_change(now: list[torch.Tensor], then: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is now, all tensors together."""
    difference = sum(float((new - old).square().sum()) for new, old in zip(now, then, strict=True))
    return (difference / sum(float(new.square().sum()) for new in now)) ** 0.5

# SPDX-License-Identifier: Apache-2.0
"""A batch on its way: samples as they are collated, decisions as TRL sees them.

1. `BatchCutter.cut` makes of a collated batch a `SampleBatch`: what the collator made, and the decisions in it. A
   training cuts in its collator (`CuttingCollator`); a batch that comes from elsewhere is cut where it arrives.
2. `BatchCutter.parts` makes of that the `DecisionBatch`es that run one after the other, each with its contexts beside
   it.
3. Where a part is prepared for the model, a frozen context takes the place of its contexts (`FrozenContexts.freeze`).

What a batch is, its type says; no key of it is looked at to find out.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from frozen_peft.context import ContextTokens, Cut, Decision, SplitBatch, cut_batch, pad_decisions
from frozen_peft.context.boundary import IGNORED_LABEL
from frozen_peft.context.branches import BRANCHES
from frozen_peft.context.prefixes import num_shared
from frozen_peft.distillation import Prompt
from frozen_peft.utils.compat.torch import num_writes

__all__ = [
    "BatchCutter",
    "CuttingCollator",
    "DecisionBatch",
    "SampleBatch",
    "from_first_label",
    "num_labels",
    "without_labels",
]

# What a collator may put into a batch for samples that have a context.
TOKEN_KEYS = {"input_ids", "labels", "attention_mask", BRANCHES}
# What a collator adds that flattens samples into one row.
FLATTENED_KEYS = {"position_ids", "cu_seq_lens_q", "seq_idx"}


class SampleBatch(dict[str, Any]):
    """A batch as the collator made it, cut.

    Attributes:
        samples: Decisions of each sample; none where the batch is run as it is.
        teachers: For each decision the same with its instructions, with distillation.
        beside: Other decisions behind the same contexts, one of each sample, by what their keys begin with.
        prompts: For each sample what the model is to answer instead, None for those that stay as they are; empty:
            nothing was settled yet.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        samples: Sequence[Sequence[Decision]] = (),
        teachers: Sequence[Decision] = (),
        beside: Mapping[str, Sequence[Decision]] | None = None,
        prompts: Sequence[Prompt | None] = (),
        *,
        is_cut: bool = False,
    ):
        super().__init__(inputs)
        self.samples, self.teachers, self.beside, self.prompts = samples, teachers, beside or {}, prompts
        self._seen = self._stamp() if is_cut else None

    def _stamp(self) -> dict[str, tuple[torch.Tensor, int]]:
        return {name: (value, num_writes(value)) for name, value in self.items() if isinstance(value, torch.Tensor)}

    @property
    def is_cut(self) -> bool:
        """Whether its decisions are those of what is in it.

        Not so where accelerate has put it together of parts of others, or a training step of the user's own has
        changed what it holds.
        """
        seen, now = self._seen, self._stamp()
        return seen is not None and all(
            name in now and now[name][0] is value and now[name][1] == writes for name, (value, writes) in seen.items()
        )

    @property
    def decisions(self) -> list[Decision]:
        """Those of all samples, in their order."""
        return [decision for sample in self.samples for decision in sample]

    @property
    def contexts(self) -> list[ContextTokens]:
        """Every context to encode, as often as it is asked for: once for each decision, and once to write them."""
        decisions = [decision for sample in self._trained() for decision in sample]
        contexts = [decision.to_encode for decision in itertools.chain(decisions, *self.beside.values())]
        contexts += [prompt.to_encode for prompt in self.prompts if prompt is not None]
        return [context for context in contexts if len(context)]

    @property
    def told_teachers(self) -> list[Decision]:
        """All that the teacher will be asked about, of answers to come the prompts."""
        if not self.prompts:
            return list(self.teachers)
        pairs = zip(self.teachers, self.prompts, strict=True)
        return [
            each for teacher, prompt in pairs for each in ([teacher] if prompt is None else prompt.repeated("teacher"))
        ]

    def _trained(self) -> Sequence[Sequence[Decision]]:
        """Decisions of each sample, of answers to come the prompts."""
        if not self.prompts:
            return self.samples
        pairs = zip(self.samples, self.prompts, strict=True)
        return [sample if prompt is None else prompt.repeated("student") for sample, prompt in pairs]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SampleBatch":
        """The same on a device; by this, accelerate's dataloaders move a batch."""
        inputs = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for name, value in self.items()
        }
        samples = [[decision.to(device) for decision in sample] for sample in self.samples]
        teachers = [decision.to(device) for decision in self.teachers]
        beside = {name: [decision.to(device) for decision in decisions] for name, decisions in self.beside.items()}
        prompts = [prompt and prompt.to(device) for prompt in self.prompts]
        # What changed since is a copy in pinned memory.
        return SampleBatch(inputs, samples, teachers, beside, prompts, is_cut=self._seen is not None)


class DecisionBatch(dict[str, Any]):
    """What one forward and backward takes: decisions, padded on the right, or whole samples where nothing is cut.

    Attributes:
        contexts: Of each decision, where one of them has any; otherwise none.
        teachers: Of each decision the same with its instructions, with distillation.
        num_context_tokens: Tokens of the samples that are in no decision; of several parts, the first has them all.
        beside: Contexts of the other decisions in it, by what their keys begin with.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        contexts: Sequence[ContextTokens] = (),
        teachers: Sequence[Decision] = (),
        num_context_tokens: int = 0,
        beside: Mapping[str, Sequence[ContextTokens]] | None = None,
    ):
        super().__init__(inputs)
        self.contexts, self.teachers, self.num_context_tokens = list(contexts), list(teachers), num_context_tokens
        self.beside = beside or {}

    def with_inputs(self, inputs: Mapping[str, Any]) -> "DecisionBatch":
        """The same decisions, elsewhere."""
        return DecisionBatch(inputs, self.contexts, self.teachers, self.num_context_tokens, self.beside)

    @property
    def all_contexts(self) -> dict[str, Sequence[ContextTokens]]:
        """Contexts of all decisions, by what their keys begin with, its own first; empty where it has none."""
        return {"": self.contexts, **self.beside} if self.contexts else {}


@dataclass(frozen=True)
class BatchCutter:
    """Cuts collated batches.

    Attributes:
        cut_at: Where samples are cut.
        max_decisions: Decisions in one batch, where a sample may have several; None: no bound.
        pad_token_id: Token that fills the decisions' padding.
        supervision: Key of a mask that is 1 on supervised tokens, where a batch says it so; None: by `labels`.
        kept_keys: Keys of what a batch holds about samples as a whole, and keeps.
        beside: What keys begin with of other answers to the same prompts, of which a batch holds the like.
        take_teachers: Takes the samples with their instructions out of a collated batch, and gives their decisions.
        always: Cut batches too in which no sample has a context.
    """

    cut_at: Cut
    max_decisions: int | None
    pad_token_id: int
    supervision: str | None = None
    kept_keys: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()
    take_teachers: Callable[[dict[str, Any]], list[Decision]] | None = None
    always: bool = False

    def cut(self, inputs: Mapping[str, Any]) -> SampleBatch:
        """A batch of samples and its decisions; one that is cut already stays as it is.

        Args:
            inputs: What the collator made: `input_ids`, `labels` and `attention_mask` of shape `(samples, tokens)`.

        Raises:
            ValueError: The collator added something that cannot be cut, or put several samples into one row.
        """
        if isinstance(inputs, SampleBatch) and inputs.is_cut:
            return inputs
        kept = dict(inputs)
        teachers = inputs.teachers if isinstance(inputs, SampleBatch) else []
        if self.take_teachers is not None:
            teachers = self.take_teachers(kept) or teachers
        samples = self._samples(kept)
        beside = {}
        if self._is_whole(kept, samples):
            samples = []
        elif any(len(decision.context) for sample in samples for decision in sample):
            self._require_known(kept)
            for name in self.beside:
                if f"{name}input_ids" in kept:
                    beside[name] = [decision for (decision,) in self._samples(kept, name)]
        return SampleBatch(kept, samples, teachers, beside, is_cut=True)

    def parts(self, batch: SampleBatch) -> list[DecisionBatch]:
        """Batches of decisions, of one batch of samples; the batch itself where there is nothing to cut.

        Returns:
            Where decisions have contexts, a part also has `position_ids` of shape `(decisions, tokens)`.
        """
        decisions = batch.decisions
        if not decisions:
            return [DecisionBatch(batch, teachers=batch.teachers)]
        size = self.max_decisions or len(decisions)
        groups = [slice(start, start + size) for start in range(0, len(decisions), size)]
        parts = [self._padded(batch, decisions[group], batch.teachers[group]) for group in groups]
        for name, others in batch.beside.items():
            (part,) = parts
            part.update(self._padded_inputs(others, name)[0])
            part.beside = {**part.beside, name: [decision.to_encode for decision in others]}
        are_branches = BRANCHES in batch
        counts = [_num_context_tokens(sample, are_branches=are_branches) for sample in batch.samples]
        parts[0].num_context_tokens = sum(counts)
        return parts

    def _samples(self, inputs: dict[str, Any], name: str = "") -> list[list[Decision]]:
        """Decisions of each sample, in keys that begin with a name; none where there is nothing to cut."""
        branches = inputs.get(BRANCHES)
        cuts = self.cut_at.gradient_horizon != -1 or self.cut_at.max_context_length is not None or branches is not None
        cuts |= self.always
        labels = self._labels(inputs, name)
        if not cuts or labels is None:
            return []
        if FLATTENED_KEYS & inputs.keys():
            _require_no_context(inputs)
            return []
        mask = inputs.get(f"{name}attention_mask")
        return cut_batch(inputs[f"{name}input_ids"], labels, mask, self.cut_at, branches)

    def _labels(self, inputs: dict[str, Any], name: str) -> torch.Tensor | None:
        if self.supervision is None:
            return inputs.get(f"{name}labels")
        return inputs[f"{name}input_ids"].masked_fill(inputs[f"{name}{self.supervision}"] == 0, IGNORED_LABEL)

    def _is_whole(self, inputs: dict[str, Any], samples: list[list[Decision]]) -> bool:
        """Whether the decisions are the samples, so that the batch can stay as the collator made it."""
        decisions = [decision for sample in samples for decision in sample]
        if self.always or BRANCHES in inputs or any(len(decision.context) for decision in decisions):
            return False
        num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        return not decisions or (
            len(decisions) <= (self.max_decisions or len(decisions))
            and num_tokens == sum(len(decision.input_ids) for decision in decisions)
        )

    def _require_known(self, inputs: dict[str, Any]) -> None:
        known = TOKEN_KEYS | {self.supervision}
        known |= {f"{name}{key}" for name in self.beside for key in known}
        if unknown := inputs.keys() - known - self.kept_keys:
            raise ValueError(
                f"The collator put {', '.join(f'`{key}`' for key in sorted(unknown))} into a batch whose samples have "
                f"contexts; only {', '.join(f'`{key}`' for key in sorted(TOKEN_KEYS))} can be cut at a boundary. Use "
                "another `data_collator`, or train with `tier: 1`."
            )

    def _padded(self, batch: SampleBatch, decisions: list[Decision], teachers: Sequence[Decision]) -> DecisionBatch:
        own, padded = self._padded_inputs(decisions)
        inputs = {key: value for key, value in batch.items() if key != BRANCHES} | own
        if not padded.num_context_tokens:
            return DecisionBatch(inputs, teachers=teachers)
        inputs["position_ids"] = padded.position_ids
        return DecisionBatch(inputs, [decision.to_encode for decision in decisions], teachers)

    def _padded_inputs(
        self, decisions: Sequence[Decision], name: str = ""
    ) -> tuple[dict[str, torch.Tensor], SplitBatch]:
        """Decisions in one batch, as the keys that a loss reads and as they are."""
        padded = pad_decisions(decisions, self.pad_token_id)
        inputs = {f"{name}input_ids": padded.input_ids, f"{name}attention_mask": padded.attention_mask}
        if self.supervision is None:
            inputs[f"{name}labels"] = padded.labels
        else:
            inputs[f"{name}{self.supervision}"] = (padded.labels != IGNORED_LABEL).to(padded.attention_mask.dtype)
        return inputs, padded


class CuttingCollator:
    """A collator whose batches are cut where they are made.

    Args:
        collator: Makes a batch of samples.
        cutter: Cuts it.

    Attributes:
        last: The batch that was made last; worker processes have collators of their own.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], cutter: BatchCutter):
        self._collator, self._cutter = collator, cutter
        self.last: SampleBatch | None = None

    def __call__(self, samples: list[Any]) -> SampleBatch:
        self.last = self._cutter.cut(self._collator(samples))
        return self.last


def num_labels(batch: Mapping[str, Any]) -> int:
    """Labels that a batch predicts."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def from_first_label(batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A batch with its labels cut to those that a loss needs, and the first token whose output that loss needs.

    The tokens stay. Two labels are left where none is supervised, since losses compare each with the token before.
    """
    labels = batch.get("labels")
    if labels is None or "shift_labels" in batch:
        return dict(batch), 0
    is_supervised = (labels[:, 1:] != IGNORED_LABEL).any(dim=0)
    first = int(is_supervised.nonzero()[0]) if bool(is_supervised.any()) else max(labels.shape[1] - 2, 0)
    return {**batch, "labels": labels[:, first:]}, first


def without_labels(batch: DecisionBatch) -> DecisionBatch:
    """Two tokens of a batch's first decision, without context and labels: a forward and backward that add nothing."""
    tokens = {name: batch[name][:1, :2] for name in ("input_ids", "attention_mask")}
    return DecisionBatch({**tokens, "labels": torch.full_like(tokens["input_ids"], IGNORED_LABEL)})


def _num_context_tokens(decisions: Sequence[Decision], *, are_branches: bool) -> int:
    """Tokens of a sample that are kept and belong to no decision; those that decisions share count once."""
    if any(decision.is_written for decision in decisions):
        return len(decisions[0].context)
    lengths = [len(decision.context) + len(decision.input_ids) for decision in decisions]
    num_kept = max(lengths)
    if are_branches:
        sequences = [torch.cat([decision.context, decision.input_ids]).cpu().numpy() for decision in decisions]
        num_kept = sum(lengths) - sum(itertools.starmap(num_shared, itertools.pairwise(sequences)))
    return max(num_kept - sum(len(decision.input_ids) for decision in decisions), 0)


def _require_no_context(inputs: Mapping[str, Any]) -> None:
    starts = inputs["position_ids"][0] == 0 if "position_ids" in inputs else None
    supervised = inputs["labels"][0] != IGNORED_LABEL
    if starts is not None and not bool(supervised[1:][~starts[1:] & starts[:-1]].all()):
        raise ValueError(
            "A flattened batch (`packing`, `padding_free` or a collator that does the same) holds a sample with a "
            "context, and contexts cannot be told apart there. Set both to False, or train with `tier: 1`."
        )

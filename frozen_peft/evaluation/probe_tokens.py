# SPDX-License-Identifier: Apache-2.0
"""The tokens of probes: decisions as TRL prepares a completion for training, behind one context or another."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from frozen_peft.data.conversation import Message
from frozen_peft.data.stripping import restore_instructions
from frozen_peft.evaluation.decision_tokens import TokenizedDecision, decision_tokens, rendered_tokens
from frozen_peft.evaluation.probes import CONDITIONS, KINDS, Condition, Probe

__all__ = ["ProbeDecisions", "ProbeTokens"]

# Stands before an empty conversation's decision while it is rendered: templates need a message to begin with.
_ANY_MESSAGE = [{"role": "user", "content": "."}]


@dataclass(frozen=True)
class ProbeDecisions:
    """The decisions of one probe under one condition.

    Attributes:
        probe: The probe.
        decisions: Those under `preferred`, `rejected` and, where the probe has it, `expected`.
    """

    probe: Probe
    decisions: dict[str, TokenizedDecision]

    @property
    def preferred(self) -> TokenizedDecision:
        """The one that is wanted."""
        return self.decisions["preferred"]

    @property
    def rejected(self) -> TokenizedDecision:
        """The one that is not."""
        return self.decisions["rejected"]

    def behind(self, prompt: torch.Tensor) -> "ProbeDecisions":
        """All of them behind another prompt."""
        return replace(self, decisions={name: replace(own, prompt=prompt) for name, own in self.decisions.items()})


class ProbeTokens:
    """Tokenizes probes, under every condition that is asked for.

    Args:
        tokenizer: The model's.
        probes: What to tokenize.
        on_bad: Called with the message of a probe that cannot be scored, which is then left out. Without it that is
            an error.

    Attributes:
        tokenizer: The model's.
        probes: Those that can be scored.
        notes: What a reader of the results should know.

    Raises:
        ValueError: A decision has no tokens, both of a probe have the same, or the chat template refuses a prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probes: Sequence[Probe],
        on_bad: Callable[[str], None] | None = None,
    ):
        self.tokenizer = tokenizer
        self._prompts: dict[bytes, torch.Tensor] = {}
        self.notes: list[str] = []
        self._given: list[ProbeDecisions] = []
        # The delay keeps the bar away from what takes a moment.
        for probe in tqdm(probes, desc="Tokenizing probes", unit=" probes", delay=2):
            try:
                self._given.append(self._tokenized(probe))
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
        self.probes = [decisions.probe for decisions in self._given]
        num_diverging = sum(decisions.preferred.diverges for decisions in self._given)
        if num_diverging:
            self.notes.append(
                f"{num_diverging} of {len(self.probes)} prompts are tokenized differently before a decision "
                "than alone: their decisions are scored from where the two diverge, as they are trained, which is not "
                "what generation begins from."
            )

    def under(self, condition: Condition, *, seed: int = 0) -> list[ProbeDecisions]:
        """The probes' decisions under one condition, in the probes' order.

        Args:
            condition: Where they stand.
            seed: Decides who gets whose context in `shuffled`.

        Returns:
            Those of the probes that can be had: `instructed` needs `stripped`, and `shuffled` two distinct contexts.
            A note tells what is left out.
        """
        if condition == "given":
            return self._given
        if condition == "instructed":
            return self._instructed()
        if condition == "shuffled":
            return self._shuffled(seed)
        if condition == "empty":
            return [decisions.behind(self._header(decisions)) for decisions in self._given]
        raise ValueError(f"`condition` is one of {', '.join(CONDITIONS)}; got {condition!r}")

    def _instructed(self) -> list[ProbeDecisions]:
        stripped = [probe for probe in self.probes if probe.stripped]
        for kind in KINDS:
            num_all, num = (sum(probe.kind == kind for probe in probes) for probes in (self.probes, stripped))
            if not num and num_all:
                self.notes.append(
                    f"instructed: left out for {num_all} {kind} probes, which have no `stripped` instructions."
                )
            elif num < num_all:
                self.notes.append(
                    f"instructed: {num} of {num_all} {kind} probes, those that have `stripped` instructions. Compare "
                    "it with the other rows with that in mind."
                )
        return [self._tokenized(replace(probe, prompt=_restored(probe))) for probe in stripped]

    def _shuffled(self, seed: int) -> list[ProbeDecisions]:
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, probe in enumerate(self.probes):
            groups.setdefault((probe.kind, isinstance(probe.prompt, str)), []).append(index)
        moved: dict[int, ProbeDecisions] = {}
        for (kind, is_text), members in groups.items():
            own = {index: _as_bytes(self._given[index].preferred.prompt) for index in members}
            distinct = list(dict.fromkeys(own.values()))
            if len(distinct) < 2:
                self.notes.append(
                    f"shuffled: left out for {len(members)} {kind} probes, whose contexts are all one and the same."
                )
                continue
            order = _derangement(len(distinct), random.Random(f"{seed}/{kind}/{is_text}"))
            other = {prompt: self._prompts[distinct[place]] for prompt, place in zip(distinct, order, strict=True)}
            moved |= {index: self._given[index].behind(other[own[index]]) for index in members}
        return [moved[index] for index in sorted(moved)]

    def _header(self, decisions: ProbeDecisions) -> torch.Tensor:
        """What is left of a prompt without its context."""
        prompt, probe = decisions.preferred.prompt, decisions.probe
        start = len(prompt)
        if not isinstance(probe.prompt, str):
            without = rendered_tokens(self.tokenizer, probe, probe.prompt or _ANY_MESSAGE)
            start = common_prefix_length(without, prompt.tolist())
        header = prompt[start:]
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(prompt) and int(prompt[0]) == bos and start:
            header = torch.cat([prompt[:1], header])
        return self._shared(header)

    def _tokenized(self, probe: Probe) -> ProbeDecisions:
        texts = {"preferred": probe.preferred, "rejected": probe.rejected, "expected": probe.expected}
        found = {name: self._decision(probe, name, text) for name, text in texts.items() if text is not None}
        made = ProbeDecisions(probe, found)
        if torch.equal(made.preferred.decision, made.rejected.decision):
            raise ValueError(
                f"{probe.place}: `preferred` and `rejected` have the same tokens, so there is nothing to prefer"
            )
        return made.behind(self._header(made)) if probe.prompt == [] else made

    def _decision(self, probe: Probe, name: str, text: str | Message) -> TokenizedDecision:
        if isinstance(text, str) and not self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"{probe.place}: `{name}` is {text!r}, which tokenizes to nothing")
        prompt = _ANY_MESSAGE if probe.prompt == [] else probe.prompt
        found = decision_tokens(self.tokenizer, probe, prompt, text, f"{probe.place}: `{name}`")
        return replace(found, prompt=self._shared(found.prompt))

    def _shared(self, tokens: torch.Tensor) -> torch.Tensor:
        """These tokens, in the one copy that all who have the same hold."""
        return self._prompts.setdefault(_as_bytes(tokens), tokens.clone())


def _restored(probe: Probe) -> list[dict[str, Any]] | str:
    """The prompt with its instructions."""
    try:
        return restore_instructions({"prompt": probe.prompt, "stripped": probe.stripped})["prompt"]
    except ValueError as error:
        raise ValueError(f"{probe.place}: {error}") from error


def _as_bytes(tokens: torch.Tensor) -> bytes:
    return tokens.numpy().tobytes()


def _derangement(count: int, generator: random.Random) -> list[int]:
    """A permutation without a fixed point, each as likely as any other; `count` is 2 or more."""
    order = list(range(count))
    while any(index == value for index, value in enumerate(order)):
        generator.shuffle(order)
    return order

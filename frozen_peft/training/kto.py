# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: TRL's `KTOTrainer`, with answers and mismatched ones behind one frozen context."""

import inspect
from dataclasses import dataclass
from typing import ClassVar

from trl import KTOConfig, KTOTrainer

from frozen_peft.training.preference import PreferenceMixin
from frozen_peft.training.preference_fields import PreferenceFields

__all__ = ["FrozenContextKTOConfig", "FrozenContextKTOTrainer"]


@dataclass
class FrozenContextKTOConfig(PreferenceFields, KTOConfig):
    """Configuration of `FrozenContextKTOTrainer`.

    All fields of `KTOConfig` are here too and mean the same, but for `max_length`, whose default is None and which
    cuts prompts; and those of contexts of `FrozenContextConfig`.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    _VALID_DICT_FIELDS = KTOConfig._VALID_DICT_FIELDS

    def _check_grouping(self) -> None:
        # Of TRL's losses, the one that is no estimate over the neighbours of a row.
        if self.loss_type != "apo_zero_unpaired":
            raise ValueError(
                f"`group_by_context=True` orders the rows, and `loss_type={self.loss_type!r}` compares each with its "
                "neighbours in the order of the dataset. Sort the dataset by its prompts, or leave `group_by_context` "
                "at False."
            )
        super()._check_grouping()


class FrozenContextKTOTrainer(PreferenceMixin, KTOTrainer):
    """`KTOTrainer` that encodes each prompt without gradient, once, and trains the answer behind it.

    Takes what `KTOTrainer` takes, in the same order; `args` may be a `FrozenContextKTOConfig`, or a plain `KTOConfig`
    or `TrainingArguments`, which is converted. Loss and metrics are TRL's; everything is inherited but the hooks of
    `FrozenContextMixin` and `PreferenceMixin`. The mismatched answer, from which TRL estimates how far the policy is
    from the reference, stands behind the same context as the answer.

    Raises:
        ValueError: A field or a sample cannot be trained as asked; the message names it.
        ContextMismatchError: The model's decision over a frozen context is not what a plain forward gives.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    # What TRL adds to it in a later version is taken, too.
    __signature__ = inspect.signature(KTOTrainer)
    _tag_names: ClassVar[list[str]] = ["trl", "kto", "frozen-context"]
    _config_class = FrozenContextKTOConfig
    _answers = ("completion_ids", "KL_completion_ids")
    _said = ("ref_logps", "ref_KL_logps")
    _row_keys = frozenset({"label"})
    _beside = ("KL_",)

    def _required(self, args: PreferenceFields) -> tuple[str, ...]:
        """The mismatched answers only where the loss estimates a divergence by them."""
        answers = self._answers[:1] if args.loss_type == "apo_zero_unpaired" else self._answers
        return (*answers, "label")

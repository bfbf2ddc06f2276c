# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization: TRL's `DPOTrainer`, with both answers to a prompt behind one frozen context."""

import inspect
from dataclasses import dataclass
from typing import ClassVar

from trl import DPOConfig, DPOTrainer

from frozen_peft.training.preference import PreferenceMixin
from frozen_peft.training.preference_fields import PreferenceFields

__all__ = ["FrozenContextDPOConfig", "FrozenContextDPOTrainer"]


@dataclass
class FrozenContextDPOConfig(PreferenceFields, DPOConfig):
    """Configuration of `FrozenContextDPOTrainer`.

    All fields of `DPOConfig` are here too and mean the same, but for `max_length`, whose default is None and which
    cuts prompts; and those of contexts of `FrozenContextConfig`.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"`truncation_mode={self.truncation_mode!r}` is how DPOTrainer cuts answers, and here an answer is "
                "never cut: `max_length` drops the oldest tokens of a prompt. Leave it out."
            )


class FrozenContextDPOTrainer(PreferenceMixin, DPOTrainer):
    """`DPOTrainer` that encodes each prompt without gradient, once, and trains both answers behind it.

    Takes what `DPOTrainer` takes, in the same order; `args` may be a `FrozenContextDPOConfig`, or a plain `DPOConfig`
    or `TrainingArguments`, which is converted. Loss and metrics are TRL's; everything is inherited but the hooks of
    `FrozenContextMixin` and `PreferenceMixin`.

    The reference reads contexts that it encoded itself: without adapters, with the adapter `ref` or by `ref_model`.
    With `gradient_horizon=-1` (tiers 1 and 3) nothing is frozen, and every batch goes to TRL as it is.

    Raises:
        ValueError: A field or a sample cannot be trained as asked; the message names it.
        ContextMismatchError: The model's decision over a frozen context is not what a plain forward gives.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    # What TRL adds to it in a later version is taken, too.
    __signature__ = inspect.signature(DPOTrainer)
    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "frozen-context"]
    _config_class = FrozenContextDPOConfig
    _answers = ("chosen_ids", "rejected_ids")
    _must_differ = True
    _said = ("ref_chosen_logps", "ref_rejected_logps")

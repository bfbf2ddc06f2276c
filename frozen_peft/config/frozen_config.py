# SPDX-License-Identifier: Apache-2.0
"""The configuration of `FrozenContextTrainer`: `SFTConfig` and what a frozen context adds to it."""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg
from trl import SFTConfig

from frozen_peft.config.distillation_fields import DistillationFields
from frozen_peft.config.field_checks import require_choice, require_rows_of_one

__all__ = ["FrozenContextConfig"]


@dataclass
class FrozenContextConfig(DistillationFields, SFTConfig):
    """Configuration of `FrozenContextTrainer`.

    All fields of `SFTConfig` are here too and mean the same, but for `max_length`, whose default is None.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS

    loss_type: str = HfArg(
        default="nll",
        help="'nll': likelihood; 'dft': TRL's; 'distill': what the base says with instructions (`distill_...`)."
        " There the model learns, without the instructions in its context, the distribution that its base has "
        "with them; rows need the column `stripped`, and the model adapters.",
        metadata={"choices": ["nll", "dft", "chunked_nll", "distill"]},
    )
    turn_contexts: Literal["training", "inference"] = HfArg(
        default="training",
        help="What a turn stands behind with `decision_mode='turns'`. 'training': the conversation, rendered once. "
        "'inference': what the chat template shows a model that is about to write this turn, which for most reasoning "
        "models is without earlier reasoning; every assistant message trains, but for those with `train: false` or "
        "`weight: 0`.",
    )
    max_length: int | None = HfArg(
        default=None,
        help="Longest sample in tokens. A longer one loses its oldest context tokens, never its decision; one "
        "without context loses its end.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_turns()

    @property
    def renders_turns(self) -> bool:
        """Whether the turns of a conversation are rendered one by one."""
        return self.turn_contexts == "inference"

    def _check_turns(self) -> None:
        require_choice(self, "turn_contexts")
        if not self.renders_turns:
            return
        if self.decision_mode != "turns":
            raise ValueError(
                f"`turn_contexts='inference'` makes each turn a decision, and `decision_mode={self.decision_mode!r}` "
                "does not. Set `decision_mode='turns'`."
            )
        if self.loss_type == "distill":
            raise ValueError(
                "`turn_contexts='inference'` renders each turn by itself, and `loss_type='distill'` compares with a "
                "teacher's rendering of the whole conversation. Leave one of the two out."
            )
        require_rows_of_one(self, "`turn_contexts='inference'` keeps a conversation's turns in a row of their own")

# SPDX-License-Identifier: Apache-2.0
"""What a configuration says of a teacher: the base with its instructions, and answers that it judges."""

from dataclasses import dataclass, fields
from typing import Literal

from transformers.hf_argparser import HfArg
from transformers.utils import logging

from frozen_peft.config.context_fields import ContextFields
from frozen_peft.config.field_checks import require, require_choice, require_rows_of_one, require_size

__all__ = ["WRITING_FIELDS", "DistillationFields"]

logger = logging.get_logger(__name__)

# Fields of how answers are written, as TRL names them.
WRITING_FIELDS = ("num_generations", "max_completion_length", "temperature", "top_p", "top_k")


@dataclass
class DistillationFields(ContextFields):
    """What a configuration says of distillation: stands before a configuration of TRL that has `loss_type`.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    distill_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = HfArg(
        default="forward_kl",
        help="What `loss_type='distill'` makes small. 'forward_kl': KL(teacher || student), which covers all "
        "that the teacher might say. 'reverse_kl': KL(student || teacher), which avoids what the teacher would "
        "not say. 'jsd': what lies between them, by `distill_beta`.",
    )
    distill_beta: float = HfArg(
        default=0.5,
        help="The teacher's share in the mixture that `distill_divergence='jsd'` compares both with, from 0 "
        "('forward_kl') to 1 ('reverse_kl'): the `beta` of TRL's generalized Jensen-Shannon divergence.",
    )
    distill_on_policy: float = HfArg(
        default=0.0,
        help="Share of the samples, from 0 to 1, to which the model writes answers of its own in "
        "`loss_type='distill'`, for its base with instructions to judge; the others are distilled as they are "
        "written. With 1, rows need no completion.",
    )
    num_generations: int = HfArg(
        default=8, help="Answers that are written to a sample in each step, with `distill_on_policy`."
    )
    max_completion_length: int = HfArg(
        default=256, help="Tokens after which an answer is cut off, with `distill_on_policy`."
    )
    temperature: float = HfArg(
        default=1.0, help="What logits are divided by before an answer's tokens are drawn, with `distill_on_policy`."
    )
    top_p: float = HfArg(
        default=1.0,
        help="Draw an answer's tokens from the likeliest that come to this probability, with `distill_on_policy`.",
    )
    top_k: int = HfArg(
        default=0,
        help="Draw an answer's tokens from so many of the likeliest, with `distill_on_policy`; 0: from all.",
    )
    distill_likelihood_weight: float = HfArg(
        default=0.0,
        help="Share of the negative log-likelihood of the decision as it is written in the loss of "
        "`loss_type='distill'`, from 0 to less than 1.",
    )
    distill_top_k: int = HfArg(
        default=100,
        help="Most likely tokens of the teacher that are compared one by one, and all others together as one; "
        "0: the whole vocabulary.",
    )
    distill_temperature: float = HfArg(
        default=1.0,
        help="What logits of teacher and student are divided by; the divergence is multiplied by its square, "
        "which keeps gradients as large.",
    )
    distill_chunk_size: int = HfArg(
        default=128, help="Decision tokens whose logits exist at a time in `loss_type='distill'`; bounds memory."
    )
    distill_cache_size: str = HfArg(
        default="1GiB", help="Host memory for what the teacher said, which later epochs read; '0': it says it again."
    )
    distill_cache_dir: str | None = HfArg(
        default=None, help="Directory for what the teacher said, for later epochs and runs; runs may share it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_distillation()

    @property
    def runs_in_parts(self) -> bool:
        """Whether a sample is run in parts: also, in a distillation, a teacher's and a student's."""
        return super().runs_in_parts or self.loss_type == "distill"

    @property
    def writes(self) -> bool:
        """Whether the model writes answers of its own."""
        return self.loss_type == "distill" and self.distill_on_policy > 0.0

    @property
    def needs_no_completions(self) -> bool:
        """Whether rows may be prompts alone, since the model writes every answer."""
        return self.writes and self.distill_on_policy == 1.0

    @property
    def keeps_other_contexts(self) -> bool:
        """Also the teacher's, where what it says is not kept."""
        return super().keeps_other_contexts or self.writes

    @property
    def base_needed_for(self) -> str | None:
        """Also, in a distillation, the teacher."""
        if (needed_for := super().base_needed_for) is not None or self.loss_type != "distill":
            return needed_for
        return "`loss_type='distill'` has the base model for a teacher"

    def _check_distillation(self) -> None:
        require_choice(self, "distill_divergence")
        require(self.distill_top_k >= 0, "distill_top_k", self.distill_top_k, "0 (all) or more tokens")
        require(self.distill_chunk_size >= 1, "distill_chunk_size", self.distill_chunk_size, "1 token or more")
        temperature, weight = self.distill_temperature, self.distill_likelihood_weight
        require(0.0 < temperature < float("inf"), "distill_temperature", temperature, "above 0")
        require(0.0 <= weight < 1.0, "distill_likelihood_weight", weight, "from 0 to less than 1")
        require(0.0 <= self.distill_beta <= 1.0, "distill_beta", self.distill_beta, "from 0 to 1")
        require_size(self, "distill_cache_size")
        self._check_writing()
        if self.loss_type != "distill":
            own = [f for f in fields(self) if f.name.startswith("distill_") and getattr(self, f.name) != f.default]
            for given in own:
                logger.warning(f"No effect of `{given.name}`: it belongs to `loss_type='distill'`.")
            return
        if self.distill_beta != 0.5 and self.distill_divergence != "jsd":
            logger.warning("No effect of `distill_beta`: it belongs to `distill_divergence='jsd'`.")
        require_rows_of_one(self, "`loss_type='distill'` compares each sample with its own teacher")
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` smooths labels, and `loss_type='distill'` "
                "learns from the teacher's distribution instead. Leave one of the two out."
            )

    def _check_writing(self) -> None:
        share = self.distill_on_policy
        require(0.0 <= share <= 1.0, "distill_on_policy", share, "from 0 to 1")
        for name, holds, expected in (
            ("num_generations", self.num_generations >= 1, "1 answer or more"),
            ("max_completion_length", self.max_completion_length >= 1, "1 token or more"),
            ("temperature", 0.0 < self.temperature < float("inf"), "above 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more tokens"),
        ):
            require(holds, name, getattr(self, name), expected)
        if not self.writes:
            names = ", ".join(
                f"`{f.name}`" for f in fields(self) if f.name in WRITING_FIELDS and getattr(self, f.name) != f.default
            )
            if names:
                logger.warning(f"No effect of {names}: without `distill_on_policy` no answers are written.")
            return
        for holds, given, reason in (
            (self.decision_mode == "tail", "decision_mode='turns'", "an answer is one decision behind one prompt"),
            (
                self.distill_likelihood_weight == 0.0,
                f"distill_likelihood_weight={self.distill_likelihood_weight}",
                "of its own answers a model learns nothing by their likelihood",
            ),
            (
                self.max_length is None,
                f"max_length={self.max_length}",
                "how long an answer becomes is not known; `max_context_length` and `max_completion_length` limit both",
            ),
        ):
            if not holds:
                raise ValueError(
                    f"`distill_on_policy={share}` and `{given}` do not go together: {reason}. Leave one of them out."
                )

# SPDX-License-Identifier: Apache-2.0
"""What the configurations of preference trainers have in common."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from frozen_peft.config import ContextFields

__all__ = ["PreferenceFields"]


@dataclass
class PreferenceFields(ContextFields):
    """What configurations of preference trainers have in common; stands before one of TRL.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    max_length: int | None = HfArg(
        default=None,
        help="Longest prompt with its longest answer, in tokens. A longer prompt loses its oldest tokens; an answer "
        "is never cut.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decision_mode != "tail":
            raise ValueError(
                f"`decision_mode={self.decision_mode!r}`: an answer that is preferred is one decision, whatever turns "
                "it has. Leave `decision_mode` at 'tail'."
            )
        if self.use_liger_kernel and self.runs_in_parts:
            raise ValueError(
                "`use_liger_kernel=True` puts other kernels into the layers, which were never run over frozen "
                "contexts or in stretches. Leave it out, or train with `tier: 1`."
            )

    @property
    def rows_per_sample(self) -> int:
        """Of a pair both answers, of an answer the mismatched one; and of their context one, and the reference's.

        Both are at hand together with stretches and with weights in shards, and one after the other without.
        """
        return 2

    @property
    def keeps_other_contexts(self) -> bool:
        """Those of the reference, where they are not its answers' log-probabilities alone that are kept."""
        return not self.precompute_ref_log_probs

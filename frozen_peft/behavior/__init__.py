# SPDX-License-Identifier: Apache-2.0
"""From instructions in the context to behaviour in the weights: strip, sample, vary, distil, measure."""

from frozen_peft.behavior.conversation import Split, message_texts, sample_problem, split_sample, with_context
from frozen_peft.behavior.marks import DEFAULT_MARKS, Marks
from frozen_peft.behavior.paraphrases import Paraphrases
from frozen_peft.behavior.probe_scores import (
    ProbeScore,
    ProbeScores,
    ProbeSummary,
    compare_probes,
    score_probes,
    summarize,
)
from frozen_peft.behavior.probe_tokens import CONDITIONS, Condition
from frozen_peft.behavior.probes import Probe, ProbeKind, read_probes
from frozen_peft.behavior.rows import Row, read_rows, whole_file
from frozen_peft.behavior.strip import QuotedInstructionError, restore_instructions, strip_instructions
from frozen_peft.behavior.strip_file import StripSettings, StripSummary, strip_file
from frozen_peft.behavior.variant_files import read_paraphrases, read_units
from frozen_peft.behavior.variants import DEFAULT_INDEPENDENT, VariantSettings, vary_context

__all__ = [
    "CONDITIONS",
    "DEFAULT_INDEPENDENT",
    "DEFAULT_MARKS",
    "Condition",
    "Marks",
    "Paraphrases",
    "Probe",
    "ProbeKind",
    "ProbeScore",
    "ProbeScores",
    "ProbeSummary",
    "QuotedInstructionError",
    "Row",
    "Split",
    "StripSettings",
    "StripSummary",
    "VariantSettings",
    "compare_probes",
    "message_texts",
    "read_paraphrases",
    "read_probes",
    "read_rows",
    "read_units",
    "restore_instructions",
    "sample_problem",
    "score_probes",
    "split_sample",
    "strip_file",
    "strip_instructions",
    "summarize",
    "vary_context",
    "whole_file",
    "with_context",
]

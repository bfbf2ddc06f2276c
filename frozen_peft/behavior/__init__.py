# SPDX-License-Identifier: Apache-2.0
"""From instructions in the context to behaviour in the weights: strip, sample, vary, distil, measure."""

import importlib
from typing import TYPE_CHECKING, Any

from frozen_peft.behavior.candidates import Candidate, PromptRow, SamplingSettings, read_prompts
from frozen_peft.behavior.conversation import Split, message_texts, sample_problem, split_sample, with_context
from frozen_peft.behavior.endpoint import EndpointError, EndpointSampler, RetrySettings
from frozen_peft.behavior.filters import CandidateFilter, FilterError
from frozen_peft.behavior.marks import DEFAULT_MARKS, Marks
from frozen_peft.behavior.paraphrases import Paraphrases
from frozen_peft.behavior.probes import CONDITIONS, Condition, Probe, ProbeKind, read_probes
from frozen_peft.behavior.rows import Row, read_rows, whole_file
from frozen_peft.behavior.sample_job import Sampler, SampleSummary, run_sample_job, work_file
from frozen_peft.behavior.strip import QuotedInstructionError, restore_instructions, strip_instructions
from frozen_peft.behavior.strip_file import StripSettings, StripSummary, strip_file
from frozen_peft.behavior.variant_files import read_paraphrases, read_units
from frozen_peft.behavior.variants import DEFAULT_INDEPENDENT, VariantSettings, vary_context

if TYPE_CHECKING:
    from frozen_peft.behavior.generation import LocalSampler
    from frozen_peft.behavior.loading import load_model, put_adapter_weights
    from frozen_peft.behavior.margins import DecisionMargin
    from frozen_peft.behavior.probe_scores import (
        ProbeScore,
        ProbeScores,
        ProbeSummary,
        compare_probes,
        score_probes,
        summarize,
    )
    from frozen_peft.behavior.probe_tables import MEASURES, probe_report, probe_table

__all__ = [
    "CONDITIONS",
    "DEFAULT_INDEPENDENT",
    "DEFAULT_MARKS",
    "MEASURES",
    "Candidate",
    "CandidateFilter",
    "Condition",
    "DecisionMargin",
    "EndpointError",
    "EndpointSampler",
    "FilterError",
    "LocalSampler",
    "Marks",
    "Paraphrases",
    "Probe",
    "ProbeKind",
    "ProbeScore",
    "ProbeScores",
    "ProbeSummary",
    "ProbeTokens",
    "PromptRow",
    "QuotedInstructionError",
    "RetrySettings",
    "Row",
    "SampleSummary",
    "Sampler",
    "SamplingSettings",
    "Split",
    "StripSettings",
    "StripSummary",
    "VariantSettings",
    "compare_probes",
    "load_model",
    "message_texts",
    "probe_report",
    "probe_table",
    "put_adapter_weights",
    "read_paraphrases",
    "read_probes",
    "read_prompts",
    "read_rows",
    "read_units",
    "restore_instructions",
    "run_sample_job",
    "sample_problem",
    "score_probes",
    "split_sample",
    "strip_file",
    "strip_instructions",
    "summarize",
    "vary_context",
    "whole_file",
    "with_context",
    "work_file",
]

# Imported at first use: torch, TRL and transformers take seconds, which `frozen-peft strip` need not wait for.
_MODULES = {
    "DecisionMargin": "margins",
    "LocalSampler": "generation",
    "MEASURES": "probe_tables",
    "ProbeScore": "probe_scores",
    "ProbeScores": "probe_scores",
    "ProbeSummary": "probe_scores",
    "ProbeTokens": "probe_tokens",
    "compare_probes": "probe_scores",
    "load_model": "loading",
    "put_adapter_weights": "loading",
    "probe_report": "probe_tables",
    "probe_table": "probe_tables",
    "score_probes": "probe_scores",
    "summarize": "probe_scores",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

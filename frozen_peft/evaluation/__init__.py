# SPDX-License-Identifier: Apache-2.0
"""What a model does, measured: probes and their scores, sampled decisions, and what the gradient would train."""

import importlib
from typing import TYPE_CHECKING, Any

from frozen_peft.evaluation.candidates import Candidate, PromptRow, SamplingSettings, read_prompts
from frozen_peft.evaluation.endpoint import EndpointError, EndpointSampler, RetrySettings
from frozen_peft.evaluation.filters import CandidateFilter, FilterError
from frozen_peft.evaluation.probes import CONDITIONS, Condition, Probe, ProbeKind, read_probes
from frozen_peft.evaluation.sample_job import Sampler, SampleSummary, run_sample_job, work_file

if TYPE_CHECKING:
    from frozen_peft.evaluation.generation import LocalSampler
    from frozen_peft.evaluation.margins import DecisionMargin
    from frozen_peft.evaluation.model_loading import load_model, put_adapter_weights
    from frozen_peft.evaluation.probe_scores import (
        ProbeScore,
        ProbeScores,
        ProbeSummary,
        compare_probes,
        score_probes,
        summarize,
    )
    from frozen_peft.evaluation.probe_tables import MEASURES, probe_report, probe_table
    from frozen_peft.evaluation.probe_tokens import ProbeTokens

__all__ = [
    "CONDITIONS",
    "MEASURES",
    "Candidate",
    "CandidateFilter",
    "Condition",
    "DecisionMargin",
    "EndpointError",
    "EndpointSampler",
    "FilterError",
    "LocalSampler",
    "Probe",
    "ProbeKind",
    "ProbeScore",
    "ProbeScores",
    "ProbeSummary",
    "ProbeTokens",
    "PromptRow",
    "RetrySettings",
    "SampleSummary",
    "Sampler",
    "SamplingSettings",
    "compare_probes",
    "load_model",
    "probe_report",
    "probe_table",
    "put_adapter_weights",
    "read_probes",
    "read_prompts",
    "run_sample_job",
    "score_probes",
    "summarize",
    "work_file",
]

# Imported at first use: torch, TRL and transformers take seconds, which `frozen-peft sample --help` need not wait for.
_MODULES = {
    "DecisionMargin": "margins",
    "LocalSampler": "generation",
    "MEASURES": "probe_tables",
    "ProbeScore": "probe_scores",
    "ProbeScores": "probe_scores",
    "ProbeSummary": "probe_scores",
    "ProbeTokens": "probe_tokens",
    "compare_probes": "probe_scores",
    "load_model": "model_loading",
    "put_adapter_weights": "model_loading",
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

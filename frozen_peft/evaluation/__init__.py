# SPDX-License-Identifier: Apache-2.0
"""What a model does, measured: probes and their scores, sampled decisions, and what the gradient would train."""

from frozen_peft.utils.lazy import lazy_package

# torch, TRL and transformers take seconds, which `frozen-peft sample --help` need not wait for.
_MODULES, __all__, __getattr__, __dir__ = lazy_package(
    __name__,
    {
        "candidates": ["Candidate", "PromptRow", "SamplingSettings", "read_prompts"],
        "endpoint": ["EndpointError", "EndpointSampler", "RetrySettings"],
        "filters": ["CandidateFilter", "FilterError"],
        "generation": ["LocalSampler"],
        "margins": ["DecisionMargin"],
        "model_loading": ["load_model", "put_adapter_weights"],
        "probe_scores": [
            "ProbeScore",
            "ProbeScores",
            "ProbeSummary",
            "compare_probes",
            "score_probes",
            "summarize",
        ],
        "probe_tables": ["MEASURES", "probe_report", "probe_table"],
        "probe_tokens": ["ProbeTokens"],
        "probes": ["CONDITIONS", "Condition", "Probe", "ProbeKind", "read_probes"],
        "sample_job": ["SampleSummary", "Sampler", "run_sample_job", "work_file"],
    },
)

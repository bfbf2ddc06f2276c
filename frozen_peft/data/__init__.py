# SPDX-License-Identifier: Apache-2.0
"""Rows and conversations: read exactly and checked, stripped of instructions, varied, on the way to token ids."""

from frozen_peft.utils.lazy import lazy_package

# `datasets` takes a second, which commands that only read and write rows need not wait for.
_MODULES, __all__, __getattr__, __dir__ = lazy_package(
    __name__,
    {
        "conversation": ["Split", "message_texts", "require_sample", "split_sample", "with_context"],
        "json_text": ["parse_json"],
        "loading": ["has_split", "load_samples"],
        "marks": ["DEFAULT_MARKS", "Marks"],
        "paraphrases": ["Paraphrases", "read_paraphrases"],
        "preference_rows": ["PairsSummary", "apart_from", "join_pairs", "pair_of_probe", "write_pairs"],
        "rows": ["Row", "read_rows"],
        "stored": [
            "as_table",
            "has_json_columns",
            "needs_python_rows",
            "python_row",
            "python_rows",
            "require_no_dates",
        ],
        "strip_job": ["StripSettings", "StripSummary", "strip_file"],
        "stripping": ["QuotedInstructionError", "restore_instructions", "strip_instructions"],
        "variants": ["DEFAULT_INDEPENDENT", "VariantSettings", "read_units", "vary_context"],
    },
)

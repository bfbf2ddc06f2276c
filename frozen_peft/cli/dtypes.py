# SPDX-License-Identifier: Apache-2.0
"""Types of weights as the command line takes them: transformers' names, and the short ones of `merge`."""

__all__ = ["LOADED_DTYPES", "full_name"]

LOADED_DTYPES = ["auto", "bfloat16", "float16", "float32"]
_FULL_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def full_name(text: str) -> str:
    """Transformers' name of a type, where it is given by the short one."""
    return _FULL_NAMES.get(text, text)

# SPDX-License-Identifier: Apache-2.0
"""What of transformers is used beyond what it promises."""

from transformers import PretrainedConfig

__all__ = ["attention_implementation"]


# PRIVATE: `PretrainedConfig._attn_implementation`, transformers 5.23 and 5.24.
# Why: `set_attn_implementation` is public, and there is nothing to ask what was set. Goes when: there is.
def attention_implementation(config: PretrainedConfig) -> str | None:
    """The name of the attention function that a model of this configuration calls."""
    return config._attn_implementation

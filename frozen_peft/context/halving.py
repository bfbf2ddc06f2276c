# SPDX-License-Identifier: Apache-2.0
"""What a GPU without enough memory does to encoding: smaller chunks, or an error that says what to change."""

import gc

import torch

__all__ = ["AdvisedOutOfMemoryError", "free_unused_memory", "halved_chunk", "out_of_memory_in_prefill"]

# One chunk of the chunked kernels: below that a forward takes no less memory.
MIN_FORWARD_TOKENS = 64


class AdvisedOutOfMemoryError(torch.OutOfMemoryError):
    """Out of memory on the GPU, with what to change in the message."""


def halved_chunk(num_tokens: int) -> int | None:
    """Tokens per forward after one of `num_tokens` ran out of memory; None where fewer would not help."""
    return max(num_tokens // 2, MIN_FORWARD_TOKENS) if num_tokens > MIN_FORWARD_TOKENS else None


def free_unused_memory() -> None:
    """Gives back what a failed forward held; call it where its exception is no longer handled."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def out_of_memory_in_prefill(error: torch.OutOfMemoryError, num_tokens: int, num_forward_tokens: int) -> Exception:
    """The error that ends a training where even small chunks do not fit.

    Args:
        error: What PyTorch said.
        num_tokens: Tokens of the context.
        num_forward_tokens: Tokens of the forward that failed.
    """
    # Not halved already, since other processes run the same forwards.
    chunk = "`prefill_chunk_size`, " if num_forward_tokens > MIN_FORWARD_TOKENS else ""
    return AdvisedOutOfMemoryError(
        f"{error}\nA context of {num_tokens} tokens could not be encoded, {num_forward_tokens} tokens at a time. "
        f"Lower {chunk}`max_context_length`, `context_cache_size` or `per_device_train_batch_size` (all contexts of "
        "a batch are kept until its decisions have run), load the base in 4 bit, or take a card with more memory."
    )

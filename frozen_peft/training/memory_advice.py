# SPDX-License-Identifier: Apache-2.0
"""What a training does where the GPU runs out of memory: it stops, and says which fields to change.

Encoding contexts in smaller chunks changes nothing but the time, so the encoder does that by itself. What a decision
takes is set by fields that change the training or its speed, which are the user's to choose.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from frozen_peft.config import ContextFields, FrozenContextConfig
from frozen_peft.context.halving import AdvisedOutOfMemoryError

__all__ = ["advice_on_memory", "memory_advice"]


@contextmanager
def advice_on_memory(args: ContextFields, *, evaluation: bool = False) -> Iterator[None]:
    """Has running out of memory inside name the fields to change.

    Args:
        args: The settings.
        evaluation: It is a step of an evaluation.

    Raises:
        AdvisedOutOfMemoryError: In place of the error.
    """
    try:
        yield
    except AdvisedOutOfMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        step = "evaluation" if evaluation else "training"
        lines = "\n".join(f"- {line}" for line in memory_advice(args, evaluation=evaluation))
        # PyTorch's text comes first: `auto_find_batch_size` looks for it.
        raise AdvisedOutOfMemoryError(
            f"{error}\nA step of {step} does not fit. What takes less memory:\n{lines}"
        ) from error


def memory_advice(args: ContextFields, *, evaluation: bool = False) -> list[str]:
    """What takes less memory than these settings, what costs least first.

    Args:
        args: The settings.
        evaluation: Of an evaluation, which has no gradient.
    """
    batch = "per_device_eval_batch_size" if evaluation else "per_device_train_batch_size"
    size = getattr(args, batch)
    lines = []
    if size > 1:
        also = "" if evaluation else ", and a larger `gradient_accumulation_steps` for the same step"
        lines.append(f"`{batch}: {size // 2}` instead of {size}{also}")
    writes = isinstance(args, FrozenContextConfig) and args.writes
    if (args.decision_mode == "turns" or writes) and args.max_decisions_per_forward > 1:
        lines.append(
            f"`max_decisions_per_forward: {args.max_decisions_per_forward // 2}` instead of "
            f"{args.max_decisions_per_forward}"
        )
    if not evaluation:
        lines += _gradient_advice(args)
    if args.loss_type == "distill" and args.distill_chunk_size > 1:
        lines.append(f"`distill_chunk_size: {args.distill_chunk_size // 2}` instead of {args.distill_chunk_size}")
    if args.gradient_horizon != -1:
        limit = args.max_context_length or "none"
        lines.append(f"a smaller `max_context_length` (now {limit}): keys and values grow with every context token")
    else:
        lines.append(f"a smaller `max_length` (now {args.max_length or 'none'}), or `tier: 2`, which freezes contexts")
    lines.append("`load_in_4bit: true`, if the base is not in 4 bit yet")
    lines.append("the environment variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, against fragmentation")
    return lines


def _gradient_advice(args: ContextFields) -> list[str]:
    """What lowers the activations that wait for a backward pass."""
    lines = []
    if not args.gradient_checkpointing:
        lines.append("`gradient_checkpointing: true`: layers are computed again in the backward pass")
    elif args.checkpoint_every > 1:
        lines.append(f"`checkpoint_every: 1` instead of {args.checkpoint_every}")
    if args.gradient_horizon not in (0, -1):
        lines.append(f"a `gradient_horizon` below {args.gradient_horizon}")
    if args.sequence_chunk_size is None:
        lines.append("`sequence_chunk_size: 1024`: activations of that many tokens at a time, the same gradient")
    else:
        lines.append(f"a `sequence_chunk_size` below {args.sequence_chunk_size}")
        if not args.offload_stretches:
            lines.append("`offload_stretches: true`: keys, values and their gradients in host memory")
    return lines

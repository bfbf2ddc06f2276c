# SPDX-License-Identifier: Apache-2.0
"""What a training does where the GPU runs out of memory: it stops, and says which fields to change.

Encoding contexts in smaller chunks changes nothing but the time, so the encoder does that by itself. What a decision
takes is set by fields that change the training or its speed, which are the user's to choose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from peft import PeftModel

from frozen_peft.config import FrozenContextConfig
from frozen_peft.context.halving import AdvisedOutOfMemoryError
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.sharding import are_sharded
from frozen_peft.training.batches import SampleBatch

__all__ = ["advice_on_memory", "memory_advice", "planned_advice"]


@contextmanager
def advice_on_memory(
    args: FrozenContextConfig,
    where: Literal["training", "evaluation"],
    model: torch.nn.Module | None = None,
    batch: SampleBatch | None = None,
) -> Iterator[None]:
    """Has running out of memory inside name the fields to change.

    Args:
        args: The settings.
        where: Which step it is.
        model: The model, where the planner is to say what a batch takes.
        batch: That batch.

    Raises:
        AdvisedOutOfMemoryError: In place of the error.
    """
    try:
        yield
    except AdvisedOutOfMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        planned = planned_advice(model, args, batch) if model is not None and batch is not None else []
        lines = "\n".join(f"- {line}" for line in (*planned, *memory_advice(args, evaluation=where == "evaluation")))
        # PyTorch's text comes first: `auto_find_batch_size` looks for it.
        raise AdvisedOutOfMemoryError(
            f"{error}\nA step of {where} does not fit. What takes less memory:\n{lines}"
        ) from error


def planned_advice(model: torch.nn.Module, args: FrozenContextConfig, batch: SampleBatch) -> list[str]:
    """What the planner says of a batch that did not fit; nothing where it thinks that it fits, or cannot know.

    Args:
        model: The model.
        args: The settings.
        batch: The batch.
    """
    limit = _device_memory()
    # A plan is of one device, and knows nothing of shards.
    if limit is None or are_sharded(model):
        return []
    # Here and not above: it takes a while to import, and most trainings never need it.
    from frozen_peft.planning import Setting, advise, make_plan

    pretrained = get_pretrained_model(model)
    # Where nothing is cut, the batch is its samples.
    num_tokens = max((len(decision.input_ids) for decision in batch.decisions), default=None)
    contexts = list(map(len, batch.contexts))
    dtype = str(pretrained.dtype).removeprefix("torch.")
    try:
        setting = Setting.from_config(
            args,
            context_length=max(contexts, default=0),
            decision_length=batch["input_ids"].shape[1] if num_tokens is None else num_tokens,
            load_in_4bit=getattr(pretrained, "is_loaded_in_4bit", False),
            use_peft=isinstance(model, PeftModel),
            **({"dtype": dtype} if dtype in ("float32", "float16", "bfloat16") else {}),
        )
        plan = make_plan(pretrained.config, setting, limit)
    except ValueError:
        # It has no plan for this model: the advice below it holds all the same.
        return []
    return [] if plan.fits is not False else [f"planned: {sentence}" for sentence in advise(plan)]


def _device_memory() -> int | None:
    """Bytes that the GPU has; None without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def memory_advice(args: FrozenContextConfig, *, evaluation: bool = False) -> list[str]:
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
    if args.decision_mode == "turns" and args.max_decisions_per_forward > 1:
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


def _gradient_advice(args: FrozenContextConfig) -> list[str]:
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

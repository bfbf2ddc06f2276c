# SPDX-License-Identifier: Apache-2.0
"""Weights in shards (FSDP2, `fully_shard`): how this side runs a decoder whose weights are gathered for each forward.

Every forward gathers weights from all processes, layer by layer, so that each of them has to run as many forwards as
the others, in the same order, or it would wait for ever. Contexts differ in length, though, and one process may find
in its store what another has to encode. Three things keep them in step:

1. `run_within_forward`: hooks gather weights where the model is called from its outermost module, and only there are
   all of them in a defined state. What calls the decoder below the head runs as a part of such a forward.
2. `run_idle_forwards`: before contexts are encoded, the processes tell each other how many forwards they will take,
   and those with fewer run the rest on two tokens, of which nothing is kept.
3. `same_everywhere`: a check that some processes have a sample for and others have not is made by all of them on one
   sample.

Without shards each of these does nothing, and no process waits for another.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from frozen_peft.context.models import get_decoder, get_pretrained_model

__all__ = [
    "are_sharded",
    "digest_of_all",
    "local_part",
    "num_missing_forwards",
    "reshard",
    "run_idle_forwards",
    "run_within_forward",
    "same_everywhere",
]

Result = TypeVar("Result")
Sample: TypeAlias = tuple[int, torch.Tensor]

# The method that a sharded model gets, since FSDP's hooks run around methods of a module.
METHOD = "_run_within_forward"
# One token would take the kernels for one step.
NUM_IDLE_TOKENS = 2


def are_sharded(model: torch.nn.Module) -> bool:
    """Whether a model's weights are spread over processes and gathered in each forward."""
    return isinstance(model, FSDPModule)


def run_within_forward(model: torch.nn.Module, function: Callable[[], Result]) -> Result:
    """Calls a function as a part of the model's forward, so that the modules it calls find their weights gathered.

    Args:
        model: The outermost module, as the trainer has it.
        function: Calls modules of the model, once or more often.
    """
    if not are_sharded(model):
        return function()
    if not hasattr(model, METHOD):
        setattr(model, METHOD, MethodType(_call, model))
        register_fsdp_forward_method(model, METHOD)
    result: Result = getattr(model, METHOD)(function)
    return result


def _call(model: torch.nn.Module, function: Callable[[], Result]) -> Result:
    return function()


def num_missing_forwards(model: torch.nn.Module, num_forwards: int) -> int:
    """How many forwards fewer this process is about to run than the one that runs most; 0 without shards."""
    if not are_sharded(model):
        return 0
    counts = torch.tensor(num_forwards, device=_device(model))
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts) - num_forwards


def run_idle_forwards(model: torch.nn.Module, num_forwards: int) -> None:
    """Takes part in forwards of other processes; called in `prefill_mode`."""
    for _ in range(num_forwards):
        tokens = torch.zeros(1, NUM_IDLE_TOKENS, dtype=torch.long, device=_device(model))
        run_within_forward(model, partial(_forward, model, tokens))


def _forward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    get_decoder(get_pretrained_model(model))(input_ids=tokens, use_cache=False)


def same_everywhere(model: torch.nn.Module, sample: Sample | None) -> Sample | None:
    """The sample with the largest number, of those of all processes; the own one without shards.

    Args:
        model: The model that the sample is for.
        sample: A number, of context tokens for instance, and token ids; None where this process has none.
    """
    if not are_sharded(model):
        return sample
    found: list[Sample | None] = [None] * dist.get_world_size()
    # A tensor on a device would arrive on that same device everywhere.
    dist.all_gather_object(found, sample and (sample[0], sample[1].cpu()))
    chosen = max((one for one in found if one is not None), key=lambda one: one[0], default=None)
    return chosen and (chosen[0], chosen[1].to(_device(model)))


def reshard(model: torch.nn.Module) -> None:
    """Frees the gathered weights that a forward left behind, so that parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def digest_of_all(model: torch.nn.Module, digest: str) -> str:
    """Digest of the digests of all processes' parts, the same on each; the own one without shards."""
    if not are_sharded(model):
        return digest
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def _device(model: torch.nn.Module) -> torch.device:
    return get_pretrained_model(model).get_input_embeddings().weight.device

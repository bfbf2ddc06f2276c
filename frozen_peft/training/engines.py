# SPDX-License-Identifier: Apache-2.0
"""What has to hold across processes before they train together.

Another version of a kernel rounds otherwise, and another choice of kernels has other limits: processes that differ
would each compute another gradient, and average them without a word.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from frozen_peft.config import ContextFields
from frozen_peft.context.compiled import compile_layers
from frozen_peft.context.kernels import KERNEL_MODULES, current_capabilities, kernel_choices
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.sharding import are_sharded, reshard
from frozen_peft.training.batches import BatchCutter, DecisionBatch, without_labels
from frozen_peft.utils.compat.accelerate import forget_preparation, prepared_models
from frozen_peft.utils.installed import installed_version, module_versions

__all__ = [
    "adding_up",
    "as_many_everywhere",
    "check_engine",
    "compile_as_asked",
    "describe_machine",
    "evaluated_as_trained",
    "require_same",
]

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
MISSING = "not installed"


def check_engine(accelerator: Accelerator, model: torch.nn.Module, config: ContextFields) -> None:
    """Refuses weights in shards that cannot be gathered where the configuration has layers run.

    Args:
        accelerator: Of the training.
        model: Before it is prepared for training.
        config: Of the training.

    Raises:
        ValueError: `checkpoint_every` with FSDP; contexts or stretches with DeepSpeed ZeRO-3, FSDP of version 1 or
            a model that was in shards before.
    """
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp and config.checkpoint_every > 1:
        raise ValueError(
            f"`checkpoint_every={config.checkpoint_every}` computes several layers again in one go, and FSDP has the "
            "weights of one at a time. Leave it at 1."
        )
    if config.gradient_horizon == -1 and config.sequence_chunk_size is None:
        return
    way_out = "or train the whole sequence at once (`tier: 1` without `sequence_chunk_size`)"
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 gathers weights in the order of the first step, and contexts of different lengths take "
            "another number of forwards in each. Use ZeRO-2, or FSDP2, which shards weights as well "
            f"(`frozen-peft recipes accelerate/fsdp2`), {way_out}."
        )
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP of version 1 gathers weights for a forward of the whole model alone, and contexts are encoded below "
            f"its head. Set `fsdp_version: 2` (`frozen-peft recipes accelerate/fsdp2`), {way_out}."
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "This model's weights were put in shards when it was loaded. Load it without `distributed_config`, and "
            f"let `accelerate launch` put them in shards (`frozen-peft recipes accelerate/fsdp2`), {way_out}."
        )


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What has to be the same on every process, by name: versions, and the kernel for each part of a step."""
    rows = kernel_choices(current_capabilities(device), dtype)
    return {
        "python": platform.python_version(),
        **{name: installed_version(name) or MISSING for name in PACKAGES},
        **{name: _parts(module_versions(name)) for name in ("triton", *KERNEL_MODULES)},
        **{f"kernel for {row.purpose}": row.kernel for row in rows},
    }


def _parts(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or MISSING


def require_same(machines: Sequence[Mapping[str, str]]) -> None:
    """Refuses machines that differ.

    Args:
        machines: What `describe_machine` gave, by rank.

    Raises:
        ValueError: Names everything that differs, with the value and the ranks that have it.
    """
    names = dict.fromkeys(name for machine in machines for name in machine)
    different = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, machine in enumerate(machines):
            ranks.setdefault(machine.get(name, MISSING), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(f"{value} on rank {', '.join(map(str, found))}" for value, found in ranks.items())
            different.append(f"{name}: {values}")
    if different:
        raise ValueError(
            f"The processes of this training would not compute the same. {'; '.join(different)}. Install the same "
            "versions everywhere (`pip install -c constraints.txt`), and use GPUs of one kind."
        )


def as_many_everywhere(
    accelerator: Accelerator, parts: list[DecisionBatch], cutter: BatchCutter
) -> list[DecisionBatch]:
    """Parts of a batch, with some that add nothing where another process has more.

    The forward and backward of each part have collective operations, which every process must enter.

    Args:
        accelerator: Of the training.
        parts: Batches of decisions, one at least.
        cutter: Made them; without a bound on decisions, every process has one part.
    """
    if cutter.max_decisions is None or accelerator.num_processes == 1:
        return parts
    num_parts = torch.tensor(len(parts), device=accelerator.device)
    missing = int(accelerator.gather(num_parts).max()) - len(parts)
    return parts + [without_labels(parts[-1])] * missing


@contextmanager
def adding_up(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Inside, a backward adds to the gradients of a step; one outside of it, the last, reduces them over processes.

    With DeepSpeed that last one also steps: accelerate 1.15 has the engine step in every backward, and forget the
    gradients, while `sync_gradients` is set, which it is for all of the last micro-batch of a step. `no_sync` does
    not unset it, and does nothing at all with ZeRO-2.
    """
    syncs = accelerator.sync_gradients
    accelerator.sync_gradients = False
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = syncs


@contextmanager
def evaluated_as_trained(trainer: Trainer) -> Iterator[None]:
    """Runs an evaluation that leaves training as it would have been without it.

    A model in shards is prepared together with its optimizer, where that is still to be done; shards are left behind,
    since what comes next, a checkpoint or training, reads the weights by name. The random state stays: a run that goes
    on from a checkpoint may not evaluate where the first one did, before training, or at the end of the epoch whose
    last step saved the checkpoint.
    """
    accelerator = trainer.accelerator
    is_first = not prepared_models(accelerator)
    if accelerator.is_fsdp2 and not are_sharded(trainer.model):
        # transformers 5.23 prepares the model alone for an evaluation before training, which accelerate 1.15 refuses:
        # with its weights it replaces those of the optimizer.
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        reshard(trainer.model)
        if is_first and accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            forget_preparation(accelerator, trainer.model)


def compile_as_asked(model: torch.nn.Module, accelerator: Accelerator, compiler: TorchDynamoPlugin) -> None:
    """Compiles the parts of each decoder layer, with `torch_compile`.

    Args:
        model: The model.
        accelerator: Of the training.
        compiler: What to compile with.

    Raises:
        ValueError: With FSDP or DeepSpeed, or what `compile_layers` refuses.
    """
    if compiler.backend == DynamoBackend.NO:
        return
    engine = accelerator.distributed_type
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"`torch_compile` was never run with {engine.value}, whose hooks would become a part of what is "
            "compiled. Set it to False, or use DDP."
        )
    compile_layers(get_pretrained_model(model), **compiler.to_kwargs())

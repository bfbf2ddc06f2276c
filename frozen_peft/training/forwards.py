# SPDX-License-Identifier: Apache-2.0
"""How the forwards of a batch run while its loss is computed, by what the batch carries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from frozen_peft.adapters import active_everywhere
from frozen_peft.config import ContextFields
from frozen_peft.context import Carried, EncodeAgain, carried_context, decision_forward
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.rope import rows_on_their_own
from frozen_peft.distillation import Answers, Distiller
from frozen_peft.gradient import StretchedDecoder, Stretching, stretched_forward
from frozen_peft.training.checks import BatchChecks
from frozen_peft.utils.cache_argument import given_cache

__all__ = ["DecisionForwards", "LiveBatch"]


@dataclass
class LiveBatch:
    """A batch of decisions on its way through `compute_loss`.

    Attributes:
        inputs: What the model can be called with, a frozen context included.
        target: What the teacher says about each label, with distillation.
        carried: Its decisions and their frozen contexts; none where it has no context.
        encode_again: See `carried_context`.
        encode_elsewhere: The same for the other model that its loss calls, where there is one.
        stretching: How stretches are run, where there are any.
    """

    inputs: dict[str, Any]
    target: Answers | None = None
    carried: Sequence[Carried] = ()
    encode_again: EncodeAgain | None = None
    encode_elsewhere: EncodeAgain | None = None
    stretching: Stretching | None = None

    def is_of(self, inputs: dict[str, Any]) -> bool:
        """Whether `inputs` is this batch, perhaps with something added or changed."""
        frozen = given_cache(self.inputs)
        is_same_context = frozen is not None and given_cache(inputs) is frozen
        return is_same_context or inputs.get("input_ids") is self.inputs["input_ids"]


@dataclass
class DecisionForwards:
    """Runs the forwards of one trainer's batches.

    Attributes:
        model: Without what an engine wraps it in.
        args: The configuration.
        checks: Of stretches.
        accelerator: Of the training.
        distiller: Makes the loss, with distillation.
        metrics: Where figures of a batch are logged.
        other_model: Another model that losses call, without what an engine wraps it in; None: there is none.
        pending: Gets the stretches that a backward pass leaves where weights are in shards.
        live: The batch whose loss is being computed; None: none is.
    """

    model: torch.nn.Module
    args: ContextFields
    checks: BatchChecks
    accelerator: Accelerator
    distiller: Distiller | None
    metrics: Callable[[], dict[str, list[float]]]
    other_model: torch.nn.Module | None = None
    pending: list[StretchedDecoder] = field(default_factory=list)
    live: LiveBatch | None = None

    @contextmanager
    def of(self, batch: LiveBatch) -> Iterator[None]:
        """Computes the loss of a batch inside; the backward pass may run outside.

        Raises:
            ContextMismatchError: See `carried_context` and `decision_forward`, or stretches are not exact.
            ValueError: See `distilled_loss` and `stretched_forward`.
        """
        stretch_size = self.args.sequence_chunk_size
        if stretch_size is not None:
            with self.accelerator.autocast():
                self.checks.check_stretches(self.model, batch.inputs, stretch_size)
        outer, self.live = self.live, batch
        try:
            with ExitStack() as stack:
                if batch.carried and not torch.is_grad_enabled():
                    # As its contexts were encoded. For an evaluation before training, transformers (5.24) prepares no
                    # model where another one is prepared already, as a reference is.
                    stack.enter_context(self.accelerator.autocast())
                if self.distiller is not None:
                    stack.enter_context(self.distiller.distilled_loss(self.model, batch.target))
                stack.enter_context(carried_context(self.model, batch.carried, batch.encode_again))
                if stretch_size is not None:
                    stretched = stretched_forward(
                        self.model,
                        stretch_size,
                        offload=self.args.offload_stretches,
                        pending=self.pending,
                        # DeepSpeed reduces gradients in the order in which they come.
                        short_too=self.accelerator.distributed_type == DistributedType.DEEPSPEED,
                    )
                    batch.stretching = stack.enter_context(stretched)
                else:
                    stack.enter_context(self.whole(self.model, batch.inputs))
                if self.other_model is not None:
                    encode = batch.encode_elsewhere
                    stack.enter_context(carried_context(self.other_model, batch.carried, encode, of_another=True))
                    stack.enter_context(self.whole(self.other_model, batch.inputs))
                if not self.args.context_adapters:
                    stack.enter_context(active_everywhere(self.model))
                yield
            if self.distiller is not None:
                self.distiller.note_figures(self.metrics(), self.accelerator)
        finally:
            self.live = outer

    def whole(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Lets a model run decisions over their contexts, or samples without any, in one forward."""
        if given_cache(inputs) is not None:
            return decision_forward(model)
        if self.args.gradient_horizon != -1 and "attention_mask" in inputs:
            # No sample of this batch has a context; each has its own positions, as if another one had.
            return rows_on_their_own(get_pretrained_model(model))
        return nullcontext()

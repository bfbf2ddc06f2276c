# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings whose frequencies follow the longest position of a forward.

With `longrope` (Phi-3, Phi-4) a forward that reaches beyond `original_max_position_embeddings` turns *every* position
by other factors than a shorter one; with `dynamic` each length beyond `max_position_embeddings` has its own. A context
that is encoded by itself, in chunks, would thus be another one than in the forward over context and decision. So:

1. What counts is the length of the whole sample. Lengths with the same frequencies fall into one *rope length*, the
   shortest of them; 0 stands for all that are within the limits, and for models without any such rope.
2. The same tokens in samples of two rope lengths are two contexts: their keys differ (`keys.prefix_keys`), so nothing
   that is kept of one is found for the other.
3. Forwards over a part of a sample run inside `rows_of_lengths`, which has each row's positions computed as in a
   forward over that row's whole sample. Rows of one batch may differ.

The second is why a conversation's turns share less where it crosses a limit, and the third why nothing is refused.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.context.handover import uncompiled
from frozen_peft.context.models import get_decoder
from frozen_peft.errors import UnsupportedArchitectureError

__all__ = ["RopeLimits", "frequencies_of_the_moment", "rope_limits", "rows_of_lengths", "rows_on_their_own"]


@dataclass(frozen=True)
class RopeLimits:
    """Lengths at which a model's rotary embeddings change.

    Attributes:
        model_type: The architecture, for messages.
        switches: Lengths beyond which a forward has other frequencies, the same for all longer ones.
        follows_beyond: Length beyond which each length has its own; None: there is none.
        adjustable: Whether `rows_of_lengths` can have positions computed as in a longer forward.
    """

    model_type: str
    switches: tuple[int, ...] = ()
    follows_beyond: int | None = None
    adjustable: bool = True

    @property
    def all(self) -> tuple[int, ...]:
        """Every limit, shortest first; empty where positions do not depend on a forward's length."""
        beyond = set() if self.follows_beyond is None else {self.follows_beyond}
        return tuple(sorted(beyond.union(self.switches)))

    def crossed(self, num_tokens: int) -> int:
        """The longest limit that so many tokens are beyond; 0 within all of them."""
        return max((limit for limit in self.all if num_tokens > limit), default=0)

    def rope_length(self, num_tokens: int) -> int:
        """The shortest length with the frequencies of this one; 0 within all limits.

        Raises:
            UnsupportedArchitectureError: The length is beyond a limit, and the model computes its positions where no
                other length can be given to it.
        """
        if not self.crossed(num_tokens):
            return 0
        if not self.adjustable:
            raise UnsupportedArchitectureError(
                f"`{self.model_type}` has a rope whose frequencies follow the length of a forward, beyond "
                f"{self.all[0]} tokens, in code that this package does not know, and a sample has {num_tokens}: a "
                "context that is encoded by itself would be another one. Keep samples within "
                f"`max_length: {self.all[0]}`, or train with `tier: 1`."
            )
        if self.follows_beyond is not None and num_tokens > self.follows_beyond:
            return num_tokens
        return max(limit + 1 for limit in self.switches if num_tokens > limit)

    def last_alike(self, num_tokens: int) -> int | None:
        """The longest length with the frequencies of this one; None: all longer ones have them too."""
        if self.follows_beyond is not None and num_tokens > self.follows_beyond:
            return num_tokens
        return min((limit for limit in self.all if limit >= num_tokens), default=None)


def rope_limits(model: PreTrainedModel) -> RopeLimits:
    """Reads off a model at which lengths its rotary embeddings change."""
    decoder = get_decoder(model)
    switches: set[int] = set()
    beyond: set[int] = set()
    modules = _rotary_modules(decoder)
    for module in modules:
        _add_limits(module.config, switches, beyond)
    if not modules:
        # A model's own code: what its configuration says has to be believed.
        _add_limits(model.config.get_text_config(), switches, beyond)
    adjustable = bool(modules) and _modules_run_again(decoder).isdisjoint(modules)
    return RopeLimits(
        model.config.get_text_config().model_type,
        tuple(sorted(switches)),
        min(beyond, default=None),
        adjustable or not (switches or beyond),
    )


def frequencies_of_the_moment(model: PreTrainedModel) -> list[torch.Tensor]:
    """Buffers that a forward sets by its length: they say nothing of the model that its configuration does not."""
    return [
        buffer
        for module in _rotary_modules(get_decoder(model))
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]


@contextmanager
def rows_of_lengths(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """Has the forwards inside compute a row's positions as one forward over so many tokens would.

    Args:
        model: A transformers model whose rope follows lengths; others take no notice.
        lengths: Tokens of each row's whole sample. Positions beyond are padding's, and count as the last one's.
    """
    rows = _Rows(rope_limits(model), tuple(lengths))
    modules = _rotary_modules(get_decoder(model))
    handles = [module.register_forward_hook(partial(_compute_by_row, rows), with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rows_on_their_own(model: PreTrainedModel) -> Iterator[None]:
    """The same for forwards of whole samples, padded on the right, each by its own attention mask, shape `(B, S)`."""
    if not rope_limits(model).all:
        yield
        return
    decoder = get_decoder(model)
    running: list[ExitStack] = []

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A loss may run rows of several lengths, such as KTO's mismatched answers.
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        mask = (dict(zip(names, args, strict=False)) | kwargs).get("attention_mask")
        running.append(ExitStack())
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            running[-1].enter_context(rows_of_lengths(model, mask.sum(-1).tolist()))

    def end(*_: Any) -> None:
        running.pop().close()

    handles = [
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Rows:
    """The rows of the forwards that run now."""

    limits: RopeLimits
    lengths: tuple[int, ...]


@uncompiled
def _compute_by_row(
    rows: _Rows, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """What a rotary embedding gives each row in a forward over the row's whole sample."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    positions = arguments["position_ids"]
    if positions.shape[-2] not in (1, len(rows.lengths)):
        # Another forward than that of these rows.
        return None
    positions = positions.expand(*positions.shape[:-2], len(rows.lengths), positions.shape[-1])
    ends = torch.tensor(rows.lengths, device=positions.device)[:, None] - 1
    positions = torch.minimum(positions, ends)
    by_rope: dict[int, list[int]] = {}
    for row, length in enumerate(rows.lengths):
        by_rope.setdefault(rows.limits.rope_length(length), []).append(row)
    order = torch.tensor([row for members in by_rope.values() for row in members], device=positions.device).argsort()
    parts = []
    for rope_length, members in by_rope.items():
        if rows.limits.follows_beyond is not None:
            # transformers (5.23, 5.24) goes on with the frequencies of the longest forward so far, until it sees one
            # within the limit.
            module.forward(**{**arguments, "position_ids": torch.zeros_like(positions[..., :1, :1])})
        own = positions[..., members, :]
        last = own.new_full((*own.shape[:-1], 1), max(rope_length - 1, 0))
        part = module.forward(**{**arguments, "position_ids": torch.cat([own, last], dim=-1)})
        parts.append(tuple(tensor[..., :-1, :] for tensor in (part if isinstance(part, tuple) else (part,))))
    joined = tuple(torch.cat(tensors, dim=-3).index_select(-3, order) for tensors in zip(*parts, strict=True))
    return joined if isinstance(output, tuple) else joined[0]


def _rotary_modules(decoder: torch.nn.Module) -> list[Any]:
    """The rotary embeddings of a decoder whose frequencies follow the length of a forward."""
    found = []
    for module in decoder.modules():
        if hasattr(module, "rope_type") and hasattr(module, "config"):
            limits: set[int] = set()
            _add_limits(module.config, limits, limits)
            if limits:
                found.append(module)
    return found


def _modules_run_again(decoder: torch.nn.Module) -> set[torch.nn.Module]:
    """What runs a second time in a backward pass with gradient checkpointing, outside of `rows_of_lengths`."""
    layers = (module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer))
    return {module for layer in layers for module in layer.modules()}


def _add_limits(config: Any, switches: set[int], beyond: set[int]) -> None:
    """Adds the lengths at which the rope of a configuration changes, whatever layers it is for."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layers = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    for part in of_layers:
        rope_type = part.get("rope_type") or "default"
        if "dynamic" in rope_type:
            beyond.add(config.max_position_embeddings)
        elif rope_type != "default" and (_differs(part, "factor") or _differs(part, "mscale")):
            switches.add(part["original_max_position_embeddings"])


def _differs(parameters: dict[str, Any], name: str) -> bool:
    """Whether short and long sequences have another `name`; with the same for both, no length matters."""
    return bool(parameters.get(f"short_{name}") != parameters.get(f"long_{name}"))

# SPDX-License-Identifier: Apache-2.0
"""The decoder over the stretches of one batch, as one function of its weights (see `stretches` for the mechanism).

With weights in shards (`context.sharding`) the stretches cannot run backward inside the caller's backward: the hooks
that gather and reduce weights belong to one forward and one backward of the whole model at a time. There, that pass
only leaves its gradient of the hidden states, and `finish` runs each stretch afterwards as a forward and backward of
its own, on every process equally many.

Shapes: B samples, S tokens of a sample, E hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.decision import cache_under_checkpointing, rows_of_samples
from frozen_peft.context.handover import counted_forward, require_all_read
from frozen_peft.context.models import get_decoder
from frozen_peft.context.rope import rope_limits, rows_of_lengths
from frozen_peft.context.segments import continues_in_segments
from frozen_peft.context.sharding import num_missing_forwards, run_within_forward
from frozen_peft.gradient.layers import LayerEnd, LayerPast, Piece, layer_kinds
from frozen_peft.gradient.past import Past
from frozen_peft.gradient.stretch_cache import StretchCache
from frozen_peft.gradient.totals import Root, Totals
from frozen_peft.utils.cache_argument import as_cache_argument, take_cache

__all__ = ["MIN_STRETCH_TOKENS", "StretchedDecoder", "stretch_bounds"]

# Of the random number generators of the CPU, and of which devices which, before a stretch.
RandomState = tuple[torch.Tensor, list[int], list[torch.Tensor]]
# A stretch of one token would run the kernels for one step, which write their state in place.
MIN_STRETCH_TOKENS = 2


def stretch_bounds(num_tokens: int, stretch_size: int) -> list[tuple[int, int]]:
    """First token of each stretch, and the first behind it; none is shorter than two tokens unless the sequence is."""
    starts = list(range(0, num_tokens, max(stretch_size, MIN_STRETCH_TOKENS)))
    if len(starts) > 1 and num_tokens - starts[-1] < MIN_STRETCH_TOKENS:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_tokens], strict=True))


class StretchedDecoder:
    """One forward of the decoder over the stretches of a batch, and the backward that belongs to it.

    Padding lies on the right, where nothing that counts comes after it. So stretches run without a mask (but for the
    padding of a frozen context), and what is computed at padding meets labels that are ignored.

    Args:
        model: The transformers model.
        forward: The decoder's own forward.
        arguments: What the decoder was called with, by name.
        stretch_size: Tokens per stretch.
        first_output: The first token whose hidden states are returned.
        offload: Keep what the stretches hand on in host memory.
        root: The outermost module, where weights are in shards; None: they are whole.
        pending: Where weights are in shards, gets what is to be finished once the caller's backward is over.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        stretch_size: int,
        *,
        first_output: int = 0,
        offload: bool = False,
        root: torch.nn.Module | None = None,
        pending: "list[StretchedDecoder] | None" = None,
    ):
        self.decoder, self.forward, self.model_type = get_decoder(model), forward, model.config.model_type
        self.segmented = continues_in_segments(model)
        arguments = dict(arguments)
        self.input_ids, self.embeddings = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        tokens = self.embeddings if self.input_ids is None else self.input_ids
        self.num_rows, self.num_tokens = tokens.shape[:2]
        self.device = tokens.device
        self.bounds = stretch_bounds(self.num_tokens, stretch_size)
        self.first_output = first_output
        self.frozen: FrozenContext | None = take_cache(arguments)
        self.num_frozen = max(self.frozen.lengths) if self.frozen is not None else 0
        self.position_ids = arguments.pop("position_ids", None)
        if self.position_ids is None:
            lengths = self.frozen.lengths if self.frozen is not None else [0] * self.num_rows
            starts = torch.tensor(lengths, device=self.device)
            self.position_ids = starts[:, None] + torch.arange(self.num_tokens, device=self.device)
        self.model, self.mask = model, arguments.get("attention_mask")
        self.options = arguments | {"attention_mask": None, "use_cache": False}
        self.root, self.pending = root, pending
        trained = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        # Shards are no leaves of what a forward computes; there, an empty leaf stands for them.
        self.leaves = trained if root is None else [torch.zeros(0, requires_grad=bool(trained))]
        self.num_missing = 0 if root is None else num_missing_forwards(root, len(self.bounds))
        self.gradients: list[torch.Tensor | None] = []
        device_type = self.device.type
        self.autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        self.past = Past(layer_kinds(model), self.frozen, torch.device("cpu") if offload else None)
        self.random_states: list[RandomState] = []
        self.output_type: type[Any] | None = None
        self.needs_backward = False

    def outputs(self) -> Any:
        """What the decoder returns: hidden states from `first_output` on, and router logits where asked for."""
        inputs = [self.embeddings, *self.leaves]
        needs_gradient = any(tensor is not None and tensor.requires_grad for tensor in inputs)
        self.needs_backward = torch.is_grad_enabled() and needs_gradient
        hidden_states, *router_logits = _AllStretches.apply(self, *inputs)
        assert self.output_type is not None
        outputs = self.output_type(last_hidden_state=hidden_states)
        if router_logits:
            outputs["router_logits"] = tuple(router_logits)
        return outputs

    def run_forward(self) -> tuple[torch.Tensor, ...]:
        """Hidden states `(B, S - first_output, E)`, and the router logits `(B * S, experts)` of each routed layer."""
        collected: list[torch.Tensor] = []
        for index, (start, stop) in enumerate(self.bounds):
            if self.needs_backward:
                devices = get_device_states(*self.leaves, self.position_ids)
                self.random_states.append((torch.get_rng_state(), *devices))
            else:
                self.past.forget_states_before(index)
            embeddings = None if self.embeddings is None else self.embeddings[:, start:stop]
            outputs, ends = self._run_stretch(index, self.past.before(index, self.device), embeddings)
            if index + 1 < len(self.bounds):
                self.past.append(ends, stop - start)
            parts = self._by_row(_results(outputs))
            if not collected:
                self.output_type = type(outputs)
                collected = [
                    part.new_empty(self.num_rows, self.num_tokens - first, part.shape[-1])
                    for part, first in zip(parts, self._firsts(parts), strict=True)
                ]
            for whole, part, first in zip(collected, parts, self._firsts(parts), strict=True):
                whole[:, max(start - first, 0) : max(stop - first, 0)] = part[:, max(first - start, 0) :]
        for _ in range(self.num_missing):
            self._run_idle()
        return collected[0], *(logits.flatten(0, 1) for logits in collected[1:])

    def run_backward(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradient of the embeddings, if they were passed in, and of the weights.

        Args:
            gradients: Gradient of what `run_forward` returned.

        Raises:
            RuntimeError: It ran before.
        """
        if not self.random_states:
            raise RuntimeError(
                "Going backward through the stretches of a sequence a second time: what they handed on to each other "
                "is freed by the first. Call `backward` once per forward."
            )
        if self.root is not None:
            assert self.pending is not None, "whoever trains weights in shards finishes the stretches"
            self.gradients = self._by_row(gradients)
            self.pending.append(self)
            return [None, *(None for _ in self.leaves)]
        totals = Totals(self.embeddings, self.leaves)
        self._differentiate_all(self._by_row(gradients), totals)
        return totals.results()

    def finish(self) -> None:
        """Runs the stretches backward, after a backward that left the gradient of the hidden states."""
        assert self.root is not None
        self._differentiate_all(self.gradients, Totals(self.embeddings, None))
        for _ in range(self.num_missing):
            with torch.enable_grad():
                hidden = run_within_forward(self.root, self._run_idle)
            # Nothing, but every process has to take part where gradients are reduced.
            torch.autograd.backward(hidden, torch.zeros_like(hidden))

    def _differentiate_all(self, by_row: list[torch.Tensor | None], totals: Totals) -> None:
        of_states: list[torch.Tensor | None] = []
        for index in reversed(range(len(self.bounds))):
            of_states = self._differentiate(index, by_row, of_states, totals)

    def _run_idle(self) -> torch.Tensor:
        """Takes part in a stretch that other processes have and this one has not."""
        tokens: dict[str, torch.Tensor] = {}
        if self.embeddings is None:
            tokens["input_ids"] = torch.zeros(1, MIN_STRETCH_TOKENS, dtype=torch.long, device=self.device)
        else:
            # A decoder that is given embeddings does not gather those of its own.
            tokens["inputs_embeds"] = self.embeddings.new_zeros(1, MIN_STRETCH_TOKENS, self.embeddings.shape[-1])
        hidden: torch.Tensor = self.forward(**tokens, use_cache=False).last_hidden_state
        return hidden

    def _differentiate(
        self,
        index: int,
        by_row: list[torch.Tensor | None],
        of_states: list[torch.Tensor | None],
        totals: Totals,
    ) -> list[torch.Tensor | None]:
        """Computes a stretch again, with gradient, and differentiates it.

        Args:
            index: The stretch, the last one that is left.
            by_row: Gradient of what `run_forward` returned, shapes `(B, tokens, ...)`.
            of_states: Gradient of the states that the next stretch started from; empty where there is none.
            totals: Gets the gradient of embeddings and weights.

        Returns:
            Gradient of the states that this stretch started from.
        """
        start, stop = self.bounds[index]
        pieces = self.past.pop(index)
        pasts = self.past.before(index, self.device, with_gradient=index > 0)
        states = [state for past in pasts for state in past.linear.tensors() if state.requires_grad]
        embeddings = totals.leaf_of_embeddings(start, stop)
        with torch.enable_grad(), _random_state(self.random_states.pop(), self.device.type):
            given, ends = self._run_gathered(index, pasts, embeddings)
            results = self._by_row(given)
            roots = [
                self._root(result, gradient, first, start)
                for result, gradient, first in zip(results, by_row, self._firsts(results), strict=True)
            ]
            for end, piece in zip(ends, pieces, strict=True):
                roots += _key_value_roots(end, piece)
            roots += _state_roots(ends, of_states)
        return totals.add(roots, embeddings, states, start)

    def _run_gathered(
        self, index: int, pasts: list[LayerPast], embeddings: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[LayerEnd]]:
        """What a loss can be computed from, and what the stretch leaves behind; weights in shards are gathered."""
        ends: list[LayerEnd] = []

        def run() -> list[torch.Tensor]:
            outputs, found = self._run_stretch(index, pasts, embeddings)
            ends.extend(found)
            return _results(outputs)

        return run() if self.root is None else run_within_forward(self.root, run), ends

    def _run_stretch(
        self, index: int, pasts: list[LayerPast], embeddings: torch.Tensor | None
    ) -> tuple[Any, list[LayerEnd]]:
        """The decoder's output for one stretch, and what the stretch leaves behind in each layer."""
        start, stop = self.bounds[index]
        cache = StretchCache(self.past.kinds, pasts, self.num_frozen + start, self.segmented)
        options = dict(self.options)
        if self.frozen is not None:
            tokens = torch.ones(self.num_rows, stop, dtype=torch.long, device=self.device)
            options["attention_mask"] = self.frozen.attention_mask(tokens)
        enabled, dtype = self.autocast
        with (
            # Without its cache: weights that were cast without gradient would get none when used again.
            torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False),
            cache_under_checkpointing(self.decoder),
            self._rows_as_whole(),
            counted_forward(self.segmented) as use,
        ):
            outputs = self.forward(
                input_ids=None if self.input_ids is None else self.input_ids[:, start:stop],
                inputs_embeds=embeddings,
                position_ids=self.position_ids[..., start:stop],
                **as_cache_argument(self.decoder, cache),
                **options,
            )
        require_all_read(use, self.model_type)
        return outputs, cache.take_ends(self.model_type)

    def _rows_as_whole(self) -> AbstractContextManager[None]:
        """Has a stretch compute positions as the whole does: behind contexts each sample, without any the batch."""
        if self.frozen is not None:
            tokens = self.embeddings if self.input_ids is None else self.input_ids
            return rows_of_samples(self.model, self.frozen, self.mask, tokens)
        if not rope_limits(self.model).all:
            return nullcontext()
        return rows_of_lengths(self.model, [int(self.position_ids.max()) + 1] * self.num_rows)

    def _firsts(self, results: Sequence[torch.Tensor]) -> list[int]:
        """The first token that is returned of each result: router logits count in the loss at every token."""
        return [self.first_output, *(0 for _ in results[1:])]

    def _root(self, result: torch.Tensor, gradient: torch.Tensor | None, first: int, start: int) -> Root:
        """A result of the stretch from token `start` on, as far as it was returned, with the gradient of that part."""
        if gradient is None:
            return result, None
        stop = start + result.shape[1]
        if stop <= first:
            # Zeros, though they add nothing: a backward that skips a part of a layer under a checkpoint leaves what
            # was recomputed for that part in memory until its end, and hooks on weights in shards would never run.
            return result, torch.zeros_like(result)
        return result[:, max(first - start, 0) :], gradient[:, max(start - first, 0) : stop - first]

    def _by_row(self, results: Sequence[torch.Tensor | None]) -> list[Any]:
        """Router logits come as `(B * tokens, experts)`; everything as `(B, tokens, ...)`."""
        return [None if result is None else result.view(self.num_rows, -1, result.shape[-1]) for result in results]


class _AllStretches(torch.autograd.Function):
    """To autograd, the decoder is one function of its weights."""

    @staticmethod
    def forward(ctx: Any, run: StretchedDecoder, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.run = run
        return run.run_forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.run.run_backward(gradients)


def _results(outputs: Any) -> list[torch.Tensor]:
    """What a loss can be computed from: hidden states, and router logits."""
    return [outputs.last_hidden_state, *(outputs.get("router_logits") or ())]


def _key_value_roots(end: LayerEnd, piece: Piece | None) -> list[Root]:
    """A stretch's own keys and values, as far as later stretches read them, with the gradient they gave."""
    if piece is None or piece.gradient is None or end.keys is None or end.values is None:
        return []
    first = end.keys.shape[-2] - piece.keys.shape[-2]
    return [(end.keys[..., first:, :], piece.gradient[0]), (end.values[..., first:, :], piece.gradient[1])]


def _state_roots(ends: list[LayerEnd], of_states: list[torch.Tensor | None]) -> list[Root]:
    """The states that a stretch left behind, with the gradient that the next one gave them; none of the last."""
    if not of_states:
        return []
    return list(zip([state for end in ends for state in end.linear.tensors()], of_states, strict=True))


@contextmanager
def _random_state(state: RandomState, device_type: str) -> Iterator[None]:
    """Has what runs inside draw the same random numbers as when the state was taken."""
    on_cpu, devices, on_devices = state
    with torch.random.fork_rng(devices=devices, device_type=device_type):
        torch.set_rng_state(on_cpu)
        if devices:
            set_device_states(devices, on_devices, device_type=device_type)
        yield

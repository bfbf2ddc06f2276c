# SPDX-License-Identifier: Apache-2.0
"""What one step holds above weights, adapters and the cache, as formulas over the shape of the model.

Numbers are per token unless said otherwise; b is the bytes of a number that is computed with, h the hidden size, and
`wide`, `inner` are what a part of a layer makes of a hidden state and takes back to it (see `shapes`).

*A checkpointed layer* keeps its input: b h. Once per model there are the embedded tokens, and for the final norm a
copy in float32.

*A layer that is computed again* (or one without checkpoints) keeps for its backward pass:

| part | keeps | because |
| --- | --- | --- |
| norm of hidden states | 4 h | the input in float32 |
| adapter | b in | its input; where it is in another type than the computation, a copy for each |
| MLP | b (wide + inner) | gate, activation, and their product's factors |
| routed experts | b k (wide + inner + h) | the same for each of k experts, and what it gave, to be weighted |
| attention | b (wide + inner) | queries, keys, values, the output |
| norms of heads | 4 (queries + keys) | their inputs in float32 |
| an output gate | b inner | its sigmoid |
| gated delta rule | `_delta_rule` | conv in and out, normalised heads, the inverse of blocks, a norm in float32 |
| scan | `_scan` | as PyTorch's reference has it: products of all pairs in a chunk, states before chunks |

*Its backward pass* goes from the MLP to the mixer. The MLP's gradients (of the product, and of both factors) are as
large as what it keeps, while everything before is still held. When the mixer's are made, the MLP's part is gone.

*Attention that reads a frozen context* or earlier stretches where they lie holds three blocks of scores (scores,
weights, their gradient) of a size that does not grow with the context, and gradients in float32. Where a model keeps
its own attention in plain PyTorch, scores are heads times tokens times all tokens before; three of them are held.

*A prefill chunk* holds the residual stream, what goes into the layer, and the largest part of one layer at a time:
nothing is kept.

*The loss* is computed in tiles of logits. A GPU's kernel has one tile in place; PyTorch's reference eight in float32.

Factors that are not whole (of the reference of the delta rule, the scan, the divergence, and the head on a CPU) sum up
many small tensors: they were fitted to counts of every allocation of one step, of models from 32 to 5120 wide.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from frozen_peft.context.segments import CPU_SCORE_BLOCK, SCORE_BLOCK
from frozen_peft.planning.setting import DTYPE_BYTES, Setting
from frozen_peft.planning.shapes import Layer, ModelShape, Part

__all__ = ["HEAD_COLUMNS", "HEAD_ROWS", "StepMemory"]

# Tiles of TRL's head: entries of the vocabulary, and tokens.
HEAD_COLUMNS, HEAD_ROWS = 32768, 4096
# Of PyTorch's reference of the head: the tile, scaled, its log-probabilities and probabilities, their gradient, and
# where the target is.
REFERENCE_TILES = 8.25
# Of a divergence, in float32: logits of teacher or student, what is gathered from them, and their gradient.
DIVERGENCE_TILES = 7
SCORES_HELD = 3
# Tokens of a block of the delta rule, and of a chunk of a scan where a configuration does not say.
BLOCK, SCAN_CHUNK = 64, 256


@dataclass(frozen=True)
class PartBytes:
    """Bytes per token of a part of a layer.

    Attributes:
        forward: Held at a time by a forward without gradient.
        kept: Kept for the backward pass.
        backward: Held by the backward pass beside it.
    """

    forward: float
    kept: float
    backward: float


class StepMemory:
    """The memory of one step.

    Args:
        shape: The model.
        setting: The way of training; `batch` counts what runs together.
        adapted: Full names of the linear modules that are trained or have adapters.
    """

    def __init__(self, shape: ModelShape, setting: Setting, adapted: frozenset[str]):
        self.shape, self.setting, self.adapted = shape, setting, adapted
        self.number = setting.number_bytes
        self.residual = DTYPE_BYTES[setting.dtype]
        self.is_reference = setting.reference_kernels or not setting.accelerator
        self.score_block = SCORE_BLOCK if setting.accelerator else CPU_SCORE_BLOCK
        every = setting.checkpoint_every if setting.gradient_checkpointing else 1
        self.num_checkpoints = math.ceil(shape.num_layers / every) if setting.gradient_checkpointing else 0

    def prefill(self) -> int:
        """Bytes that encoding contexts takes above the cache that comes out."""
        setting = self.setting
        num_tokens = setting.longest_piece
        chunk = min(setting.prefill_chunk_size or num_tokens, num_tokens)
        first = later = 0.0
        for layer in self.shape.layers:
            widest = max((part.forward for part in self._parts(layer)), default=0.0)
            recurrent = max((part.forward for part in self._parts_of(layer, False)), default=0.0)
            first, later = max(first, widest), max(later, widest, recurrent + self._joined(layer))
        residual = 3 * self.number * self.shape.hidden_size
        linear = max(chunk * (first + residual), min(chunk, num_tokens - chunk) * (later + residual))
        attention = max(self._copies(layer, chunk, num_tokens - chunk) for layer in self.shape.layers)
        return math.ceil(setting.batch * (linear + attention))

    def kept(self, num_tokens: int, num_frozen: int = 0) -> int:
        """Bytes that a forward of so many tokens of each row keeps, behind a frozen context or behind none."""
        hidden_size = self.shape.hidden_size
        linear: float = (self.residual * self.num_checkpoints + self.residual + 4) * hidden_size
        attention = 0.0
        if not self.num_checkpoints:
            linear += self._sum(self._kept)
            attention = self._sum(lambda layer: self._pairs_kept(layer, num_tokens, num_frozen))
        return math.ceil(self.setting.batch * (num_tokens * linear + attention))

    def inside(self, num_tokens: int, num_before: int = 0, piece: int | None = None) -> int:
        """Bytes that the backward pass of one layer takes beyond `kept`, with what is computed again for it.

        Args:
            num_tokens: Tokens of each row.
            num_before: Tokens before them that attention reads.
            piece: As many of these lie together; None: all of them.
        """
        batch = self.setting.batch
        most = 0.0
        for layer in self.shape.layers:
            mlps, mixers = self._parts_of(layer, True), self._parts_of(layer, False)
            in_mixer = in_mlp = float(self.number * self.shape.hidden_size)
            in_mixer += max((part.backward for part in mixers), default=0.0)
            in_mlp += max((part.backward for part in mlps), default=0.0)
            pairs = self._pairs_kept(layer, num_tokens, num_before)
            copies = self._copies(layer, num_tokens, num_before)
            if self.num_checkpoints:
                again = self._kept(layer) + (self._joined(layer) if num_before else 0)
                in_mixer += again - sum(part.kept for part in mlps)
                in_mlp += again
            else:
                copies, pairs = max(copies - pairs, 0.0), 0.0
            # Rows of a batch are read one after another.
            reading = self._reading(layer, num_tokens, num_before if piece is None else piece)
            most = max(most, batch * (num_tokens * in_mlp + pairs), batch * (num_tokens * in_mixer + copies) + reading)
        if self.num_checkpoints:
            others = min(self.setting.checkpoint_every, self.shape.num_layers) - 1
            most += others * batch * num_tokens * self._sum(self._kept) / self.shape.num_layers
        if not self.setting.use_peft:
            # The embedding's gradient is made as a whole before it is added.
            most = max(most, self.shape.vocabulary * self.shape.hidden_size * self.residual)
        return math.ceil(most)

    def stretch(self, num_tokens: int, num_before: int, piece: int) -> int:
        """Bytes of one stretch's forward and backward beyond what is handed on, see `inside`."""
        own = self._sum(lambda layer: self.number * (layer.cache.keys + layer.cache.values))
        handed = math.ceil(self.setting.batch * num_tokens * own)
        return self.kept(num_tokens) + self.inside(num_tokens, num_before, piece) + handed

    def head(self) -> int:
        """Bytes that the loss takes, forward and backward, above the hidden states that it gets."""
        setting = self.setting
        num_rows = setting.batch * (setting.num_outputs - 1)
        if setting.accelerator:
            # Of supervised tokens alone.
            num_rows = min(setting.batch * (setting.decision_length - 1), num_rows)
        tile = min(num_rows, HEAD_ROWS) * min(HEAD_COLUMNS, self.shape.vocabulary)
        held = self.number * tile if setting.accelerator else 4 * REFERENCE_TILES * tile
        return math.ceil(held + num_rows * self.shape.hidden_size * (4 + self.number))

    def divergence(self, *, of_student: bool) -> int:
        """Bytes that comparing with a teacher takes above hidden states, what is kept of the teacher included."""
        setting, vocabulary = self.setting, self.shape.vocabulary
        num_rows = setting.batch * (setting.decision_length - of_student)
        logits = 4 * vocabulary * min(setting.distill_chunk_size, num_rows)
        kept = setting.distill_top_k
        # Of each likely token its number and log-probability; or the hidden state that gives all logits again.
        answer = 8 * kept + 4 if 0 < kept < vocabulary else self.number * self.shape.hidden_size
        return math.ceil(DIVERGENCE_TILES * logits + num_rows * answer)

    def answer(self) -> int:
        """Bytes of a teacher's forward behind its context, and of what is kept of it."""
        setting = self.setting
        forward = replace(setting, context_length=setting.decision_length, prefill_chunk_size=0, turns=1)
        hidden = setting.batch * setting.decision_length * self.shape.hidden_size * self.number
        return StepMemory(self.shape, forward, self.adapted).prefill() + hidden + self.divergence(of_student=False)

    def _joined(self, layer: Layer) -> float:
        """Of convolutions whose state is joined to the tokens behind it: what goes in and comes out, once more."""
        return 2 * self.number * sum(part.channels for part in layer.parts)

    def _sum(self, bytes_of: Callable[[Layer], float]) -> float:
        return sum(count * bytes_of(layer) for layer, count in self.shape.layers.items())

    def _kept(self, layer: Layer) -> float:
        norms = 4 * self.shape.hidden_size * layer.num_norms
        return norms + sum(part.kept for part in self._parts(layer))

    def _parts(self, layer: Layer) -> list[PartBytes]:
        return self._parts_of(layer, True) + self._parts_of(layer, False)

    def _parts_of(self, layer: Layer, mlps: bool) -> list[PartBytes]:
        parts = [part for part in layer.parts if (part.kind == "mlp") == mlps]
        return [self._with_adapters(part, self._part(part, layer)) for part in parts]

    def _part(self, part: Part, layer: Layer) -> PartBytes:
        number = self.number
        if part.kind in ("gated delta rule", "kimi delta rule"):
            return self._delta_rule(part, layer)
        if part.kind == "scan":
            return self._scan(part, layer)
        projected = number * (part.wide + part.inner)
        kept = projected
        if part.kind == "attention":
            kept += 4 * (part.inner + layer.cache.keys) if part.has_head_norms else 0
            is_gated = part.wide >= 2 * part.inner + layer.cache.keys + layer.cache.values
            kept += number * part.inner if is_gated else 0
        if part.expert is None:
            return PartBytes(projected, kept, projected)
        experts, hidden_size = self.shape.num_experts_per_token, self.shape.hidden_size
        routed = number * experts * sum(part.expert)
        return PartBytes(
            projected + max(number * experts * 4 * hidden_size, routed),
            kept + routed + number * experts * hidden_size,
            projected + routed + number * experts * 2 * hidden_size,
        )

    def _with_adapters(self, part: Part, plain: PartBytes) -> PartBytes:
        """Adapters keep what goes into them, and their products are as large as the widest of it."""
        inputs = [features for name, features in part.linears if name in self.adapted]
        if not inputs:
            return plain
        adapter = DTYPE_BYTES["bfloat16" if self.setting.load_in_4bit else "float32"]
        is_copied = self.setting.use_peft and adapter != self.number
        copy = self.number if self.setting.bf16 else adapter
        kept = copy * sum(inputs) if is_copied else self.number * min(inputs)
        widest = self.number * max(inputs)
        return PartBytes(plain.forward + widest, plain.kept + kept, plain.backward + widest)

    def _delta_rule(self, part: Part, layer: Layer) -> PartBytes:
        """Of flash-linear-attention (commit 0315a70, `chunk.py`) and causal-conv1d, or of PyTorch's references."""
        number, channels = self.number, part.channels
        heads, _, value_dim = layer.cache.state
        values, blocks, states = heads * value_dim, heads * BLOCK, layer.cache.num_state / BLOCK
        if self.is_reference or part.kind == "kimi delta rule":
            return PartBytes(
                4 * (9 * values + 3 * blocks + states),
                3 * number * channels + 4 * (17.5 * values + 5.5 * blocks + states),
                4 * (2 * blocks + 4 * values + states),
            )
        normalised = channels - values
        return PartBytes(
            number * (channels + normalised + blocks + 5 * values + states),
            number * (2 * channels + normalised + blocks + 2 * values) + 4 * 3 * values,
            number * (2 * states + 7 * values) + 4 * 3 * values,
        )

    def _scan(self, part: Part, layer: Layer) -> PartBytes:
        text, (heads, head_dim, state_dim) = self.shape.text, layer.cache.state
        chunk = getattr(text, "mamba_chunk_size", None) or getattr(text, "chunk_size", None) or SCAN_CHUNK
        values, expanded, states = heads * head_dim, heads * state_dim, 4 * layer.cache.num_state / chunk
        # Decays of all pairs in float32; scores and their product with them as they are multiplied.
        pairs = (4 + 2 * self.number) * chunk * heads
        return PartBytes(
            pairs + states + 4 * (6 * expanded + part.wide + part.channels),
            pairs + states + 4 * (4 * expanded + 4 * values) + 2 * self.number * part.channels,
            pairs + 4 * 2 * expanded,
        )

    def _reading(self, layer: Layer, num_tokens: int, num_before: int) -> float:
        """Scores, and gradients in float32, of attention that reads what lies before where it lies."""
        attention = [part for part in layer.parts if part.kind == "attention"]
        if not attention or not num_before or not self.shape.can_segment:
            return 0.0
        scores = self.shape.num_heads * num_tokens * max(num_before, num_tokens)
        return 4 * (SCORES_HELD * min(scores, self.score_block) + 5 * num_tokens * attention[0].inner)

    def _copies(self, layer: Layer, num_tokens: int, num_before: int) -> float:
        """Scores, masks, joined keys and values: what grows with the square of the length or what lies before."""
        keys = num_tokens + layer.cache.num_kept(num_before)
        pairs = num_tokens * keys
        if not layer.cache.keys:
            return 0.0
        held = 0.0
        if layer.cache.sliding_window is not None:
            held += (1 + self.number) * pairs
        if self.shape.is_eager:
            held += SCORES_HELD * self.number * self.shape.num_heads * pairs
        if num_before and not self.shape.can_segment:
            repeats = max(part.inner for part in layer.parts if part.kind == "attention") / layer.cache.keys
            held += self.number * (1 + repeats) * (layer.cache.keys + layer.cache.values) * keys
        return held

    def _pairs_kept(self, layer: Layer, num_tokens: int, num_frozen: int) -> float:
        """What of it is kept for the backward pass."""
        pairs = num_tokens * (num_tokens + layer.cache.num_kept(num_frozen))
        if not layer.cache.keys:
            return 0.0
        weights = self.number * self.shape.num_heads * pairs if self.shape.is_eager else 0.0
        return weights + (self.number * pairs if layer.cache.sliding_window is not None else 0.0)

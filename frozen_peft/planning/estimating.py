# SPDX-License-Identifier: Apache-2.0
"""The figures of a plan, term by term.

Weights, adapters, gradients, optimizer and cache follow from counts and are exact. Activations and workspace are
counted (see `traces`) on the first layers, and on lengths that are quick to run; longer ones follow by a quadratic,
since that is what they are: masks and scores go by the square of a length, all else by itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from frozen_peft.context.models import require_exact_continuation
from frozen_peft.context.segments import CPU_SCORE_BLOCK, SCORE_BLOCK
from frozen_peft.distillation.divergence import Divergence
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.gradient.stretched_decoder import stretch_bounds
from frozen_peft.planning.blueprint import Blueprint
from frozen_peft.planning.kernel_memory import reference_counted
from frozen_peft.planning.setting import DTYPE_BYTES, OPTIMIZER_BYTES, Setting
from frozen_peft.planning.traces import Cache, Tracer

__all__ = ["RESERVE_BYTES", "TERMS", "Estimator", "Figures", "Work", "estimator_of"]

TERMS = {
    "weights": "the base model as it is loaded",
    "adapters": "what is trained",
    "gradients": "of what is trained",
    "optimizer": "its state",
    "cache": "keys, values and states: of the context, or of what stretches hand on",
    "teacher": "of a distillation: what its contexts and forward take beyond a step of the student",
    "cache gradient": "of keys and values before a stretch, in float32",
    "last hidden states": "of the labelled end and their gradient, for the loss behind the stretches",
    "activations": "kept from the forward to the backward pass",
    "workspace": "needed for a moment: a prefill chunk, a layer's backward, tiles of logits, an unpacked 4-bit weight",
    "reserve": "assumed, not counted: the driver's context, kernels, fragmentation; on a CPU math libraries' buffers",
}
"""The terms of a plan, in the order they are shown."""

RESERVE_BYTES = 1 << 30
# Math libraries pack matrices into buffers that are no tensors, and an allocator wastes some: what was measured is 1.4
# to 7 MiB more than what is counted (`docs/benchmarks/plan.md`).
CPU_RESERVE_BYTES = 2 << 20
# Lengths that are counted. Without accelerated kernels, PyTorch's reference of linear attention loops over blocks of
# 64 tokens, which takes operations for each.
POINTS, REFERENCE_POINTS = (1024, 2048, 3072), (256, 512, 768)
# Of a frozen context that attention reads where it lies, which takes as much whatever its length.
FEW_FROZEN = 256
# Scores, weights and their gradient of one block of attention over two segments.
BLOCKS_HELD = 3
# With these a family's modeling code, or what runs it, says that it cannot be run without weights.
_NOT_COUNTABLE = (
    ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError, LookupError, AssertionError,
    UnsupportedArchitectureError, ContextMismatchError,
)  # fmt: skip


@dataclass
class Figures:
    """Terms of one setting, see `Plan`."""

    terms: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    host_bytes: int = 0
    num_parameters: int | None = None
    cache_token_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """Operations of a model, a multiplication and an addition counting as two.

    Attributes:
        token_flops: Of one token's products with the weights of all layers, of experts only those it is sent to.
        score_flops: Of one pair of tokens in one attention layer.
        head_flops: Of one token's logits.
        windows: Of each attention layer its window, None for full attention.
        cache_token_bytes: Bytes of a token's keys and values.
    """

    token_flops: float
    score_flops: float
    head_flops: float
    windows: tuple[int | None, ...]
    cache_token_bytes: int


class Estimator:
    """Counts for one configuration, and remembers what it has counted.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self.max_positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._memory: dict[Any, Any] = {}

    def weights(self, setting: Setting) -> Figures:
        """The terms that follow from counts alone: weights and what is trained."""
        figures = Figures()
        try:
            blueprint = self._blueprint(setting)
            blueprint.num_layers  # noqa: B018  (reads the layers, which may not be understood)
        except _NOT_COUNTABLE as error:
            figures.unknown += [f"{term}: {_reason(error)}" for term in TERMS if term != "reserve"]
            return figures
        figures.num_parameters = blueprint.num_parameters
        self._add_weights(figures, blueprint, setting)
        return figures

    def quick_figures(self, setting: Setting) -> Figures:
        """The terms that need no step to be counted."""
        figures = self.weights(setting)
        if figures.num_parameters is not None and setting.num_frozen:
            try:
                cache = self.cache(setting)
                figures.terms["cache"] = _frozen_bytes(cache, setting)
                figures.cache_token_bytes = cache.token_bytes
                if (teacher := _teacher(setting)) is not None:
                    # Both contexts are at hand while the teacher is asked.
                    figures.terms["teacher"] = _frozen_bytes(cache, teacher)
            except _NOT_COUNTABLE as error:
                figures.unknown.append(f"cache: {_reason(error)}")
        figures.unknown += [f"{term}: not counted" for term in ("activations", "workspace")]
        return figures

    def figures(self, setting: Setting) -> Figures:
        """All terms that can be known."""
        figures = self.weights(setting)
        if figures.num_parameters is None:
            return figures
        has_adapters = not setting.use_peft or "adapters" in figures.terms
        try:
            # Without roles there are no adapters, but the cache is the base's.
            tracer = self._tracer(setting if has_adapters else replace(setting, use_peft=False))
            cache = tracer.cache
        except _NOT_COUNTABLE as error:
            figures.unknown += [f"{term}: {_reason(error)}" for term in ("cache", "activations", "workspace")]
            return figures
        figures.cache_token_bytes = cache.token_bytes
        try:
            if not has_adapters:
                raise UnsupportedArchitectureError("without adapters there is no step to count")
            if setting.num_frozen or setting.sequence_chunk_size is not None:
                require_exact_continuation(tracer.pretrained)
            self._add_step(figures, tracer, cache, setting)
        except _NOT_COUNTABLE as error:
            figures.unknown += [f"{term}: {_reason(error)}" for term in ("activations", "workspace")]
            if setting.num_frozen:
                figures.terms["cache"] = _frozen_bytes(cache, setting)
        figures.terms["reserve"] = RESERVE_BYTES if setting.accelerator else CPU_RESERVE_BYTES
        if setting.accelerator:
            slow = reference_counted(tracer.pretrained)
            if slow:
                figures.notes.append(f"counted as PyTorch's reference, which takes more: {', '.join(slow)}")
        figures.terms = {term: figures.terms[term] for term in TERMS if term in figures.terms}
        return figures

    def cache(self, setting: Setting) -> Cache:
        """What the model keeps of a context.

        Raises:
            ValueError: The model's layers are not understood.
        """
        return self._tracer(setting).cache

    def work(self, setting: Setting) -> Work:
        """What a step of this model computes.

        Raises:
            ValueError: The model's layers are not understood.
        """
        blueprint, cache = self._blueprint(setting), self.cache(setting)
        text = self.config.get_text_config()
        share = getattr(text, "num_experts_per_tok", 0) / (blueprint.num_experts or 1)
        per_token = sum(
            parameter.numel() * (share if ".experts." in name else 1.0)
            for name, parameter in blueprint.decoder.named_parameters()
            if ".layers." in f".{name}" or ".h." in f".{name}"
        )
        heads, dim = text.num_attention_heads, blueprint.head_dim
        windows = tuple(layer.sliding_window for layer in cache.layers if layer.kv_bytes)
        head = blueprint.model.get_output_embeddings()
        return Work(
            2 * per_token,
            4 * heads * dim,
            2 * (head.weight.numel() if head is not None else 0),
            windows,
            cache.token_bytes,
        )

    def _add_weights(self, figures: Figures, blueprint: Blueprint, setting: Setting) -> None:
        figures.terms["weights"] = blueprint.weight_bytes
        number_bytes = DTYPE_BYTES[setting.dtype]
        num_trained = blueprint.num_parameters
        if setting.use_peft:
            number_bytes = blueprint.adapter_dtype_bytes
            try:
                num_trained = blueprint.num_adapter_parameters
            except UnsupportedArchitectureError as error:
                figures.unknown += [f"{term}: {_reason(error)}" for term in ("adapters", "gradients", "optimizer")]
                return
            figures.terms["adapters"] = num_trained * number_bytes
        figures.terms["gradients"] = num_trained * number_bytes
        if setting.optim not in OPTIMIZER_BYTES:
            figures.unknown.append(f"optimizer: the state of `{setting.optim}` is not known")
            return
        own_type, fixed = OPTIMIZER_BYTES[setting.optim]
        figures.terms["optimizer"] = math.ceil(num_trained * (own_type * number_bytes + fixed))

    def _add_step(self, figures: Figures, tracer: Tracer, cache: Cache, setting: Setting) -> None:
        frozen_bytes = _frozen_bytes(cache, setting)
        prefill = self._prefill(tracer, setting) if setting.num_frozen else 0
        # Decisions run by themselves, some of them together.
        rows = replace(setting, batch=setting.decisions_per_forward, turns=1)
        of_rows = self._tracer(rows)
        head = self._remembered(of_rows, "head", rows.num_outputs, of_rows.head)
        if setting.teacher_length is not None:
            key, divergence = _divergence(setting)
            count = self._remembered(
                of_rows, ("distilled", key), setting.decision_length - 1, lambda n: of_rows.distilled(n, divergence)
            )
            head = max(head, count)
        if setting.in_stretches:
            self._add_stretches(figures, of_rows, cache, rows, head)
            figures.terms["cache"] += frozen_bytes
        else:
            kept, peak = (self._graded(of_rows, rows, part) for part in ("kept", "peak"))
            figures.terms["activations"] = kept
            figures.terms["workspace"] = max(kept + head, peak, prefill) - kept
            if frozen_bytes:
                figures.terms["cache"] = frozen_bytes
        if setting.in_stretches and prefill:
            figures.terms["workspace"] = max(figures.terms["workspace"], prefill - figures.terms["activations"])
        if (teacher := _teacher(setting)) is not None:
            self._add_teacher(figures, cache, teacher)
        if setting.load_in_4bit:
            figures.terms["workspace"] += tracer.blueprint.largest_quantized * DTYPE_BYTES["bfloat16"]
        if setting.accelerator and tracer.can_segment and (setting.num_frozen or setting.in_stretches):
            figures.terms["workspace"] += BLOCKS_HELD * 4 * (SCORE_BLOCK - CPU_SCORE_BLOCK)

    def _add_teacher(self, figures: Figures, cache: Cache, teacher: Setting) -> None:
        """It is asked while the student's contexts are at hand, and before its decisions run; without adapters."""
        rows = replace(teacher, batch=teacher.decisions_per_forward, turns=1)
        of_rows, (key, divergence) = self._tracer(rows), _divergence(teacher)
        points = _points(rows)
        frozen = min(teacher.num_frozen, FEW_FROZEN if of_rows.can_segment else points[1])
        asked = self._sampled(
            of_rows, ("answered", key, frozen), rows.decision_length, points,
            lambda n: of_rows.answered(n, frozen, divergence),
        )  # fmt: skip
        prefill = self._prefill(self._tracer(teacher), teacher) if teacher.num_frozen else 0
        needed = _frozen_bytes(cache, teacher) + max(asked, prefill)
        figures.terms["teacher"] = max(needed - figures.terms["activations"] - figures.terms["workspace"], 0)

    def _add_stretches(self, figures: Figures, tracer: Tracer, cache: Cache, setting: Setting, head: int) -> None:
        size, batch = max(setting.sequence_chunk_size or 2, 2), setting.batch
        bounds = stretch_bounds(setting.num_graded, size)
        longest = max(stop - start for start, stop in bounds)
        handed = batch * _handed_on(cache, [stop - start for start, stop in bounds[:-1]])
        gradient = batch * cache.gradient_bytes(bounds[-1][0])
        number_bytes = DTYPE_BYTES["bfloat16" if setting.bf16 else setting.dtype]
        hidden = 2 * batch * setting.num_outputs * tracer.blueprint.hidden_size * number_bytes
        inside = self._inside_stretch(tracer, setting, longest)
        on_host = handed + gradient if setting.offload_stretches else 0
        if setting.offload_stretches:
            # One set of states, to start from, and what attention reads at a time.
            handed, gradient = batch * cache.state_bytes, 0
            figures.host_bytes = on_host
        figures.terms["cache"] = handed
        figures.terms["cache gradient"] = gradient
        figures.terms["last hidden states"] = hidden
        figures.terms["activations"] = inside
        figures.terms["workspace"] = max(head - gradient - inside, 0)

    def _inside_stretch(self, tracer: Tracer, setting: Setting, longest: int) -> int:
        """Bytes of one stretch's forward and backward beyond what is handed on."""
        own, batch = tracer.own_cache, setting.batch
        number_bytes = DTYPE_BYTES["bfloat16" if setting.bf16 else setting.dtype]

        def inside(stretch: int) -> int:
            peak = tracer.stretched(2 * stretch, min(setting.num_frozen, FEW_FROZEN), stretch).peak
            # The outputs of two stretches and their gradient; a stretch without labels has a gradient of zeros.
            hidden = (2 * 2 - 1) * batch * stretch * tracer.blueprint.hidden_size * number_bytes
            beside = batch * (_handed_on(own, [stretch]) + own.gradient_bytes(stretch))
            return max(peak - hidden - beside, 0)

        # Short ones: attention over what is handed on loops over blocks of it.
        return self._sampled(tracer, ("stretch", bool(setting.num_frozen)), longest, REFERENCE_POINTS, inside)

    def _graded(self, tracer: Tracer, setting: Setting, part: str) -> int:
        points = _points(setting)
        frozen = min(setting.num_frozen, FEW_FROZEN if tracer.can_segment else points[1])

        def traced(num_graded: int, num_frozen: int) -> int:
            key = ("graded", num_graded, num_frozen)
            trace = self._remembered(tracer, key, 0, lambda _: tracer.graded(num_graded, num_frozen))
            return getattr(trace, part)

        value = self._sampled(
            tracer, ("graded", part, frozen), setting.num_graded, points, lambda n: traced(n, frozen)
        )
        if setting.num_frozen <= points[1] or tracer.can_segment:
            return value
        # Keys and values, or scores over them, that grow with the context.
        few = min(setting.num_graded, points[0])
        short, long = traced(few, points[0]), traced(few, points[1])
        slope = (long - short) / (points[1] - points[0]) / few * setting.num_graded
        return value + math.ceil(slope * (setting.num_frozen - points[1]))

    def _prefill(self, tracer: Tracer, setting: Setting) -> int:
        num_tokens = setting.longest_piece
        chunk = min(setting.prefill_chunk_size or num_tokens, num_tokens)
        points = _points(setting)
        # The second chunk takes most, if it is a whole one; in quarters, so that few are counted.
        quarters = min(math.ceil(4 * num_tokens / chunk), 8)
        value = self._sampled(
            tracer, ("prefill", quarters), chunk, points, lambda size: tracer.prefill(quarters * size // 4, size)
        )
        if tracer.continues_in_segments or num_tokens <= 2 * chunk:
            return value
        size = min(chunk, points[0])

        def in_chunks(count: int) -> int:
            return self._remembered(tracer, ("prefill of", size), count, lambda n: tracer.prefill(n * size, size))

        short, long = in_chunks(2), in_chunks(3)
        return value + math.ceil((long - short) / size * (chunk / size) * (num_tokens - 2 * chunk))

    def _sampled(
        self, tracer: Tracer, name: Any, length: int, points: tuple[int, int, int], count: Callable[[int], int]
    ) -> int:
        """A count at a length, or carried on from three shorter ones by the quadratic through them."""
        if length <= points[0]:
            return self._remembered(tracer, name, length, count)
        values = [self._remembered(tracer, name, point, count) for point in points]
        total = 0.0
        for index, point in enumerate(points):
            others = [other for other in points if other != point]
            weight = math.prod((length - other) / (point - other) for other in others)
            total += weight * values[index]
        return max(math.ceil(total), 0)

    def _remembered(self, tracer: Tracer, name: Any, length: int, count: Callable[[int], Any]) -> Any:
        key = (id(tracer), name, length)
        if key not in self._memory:
            self._memory[key] = count(length)
        return self._memory[key]

    def _blueprint(self, setting: Setting) -> Blueprint:
        plain = _without_lengths(setting)
        key = replace(
            plain, tier=1, batch=1, gradient_checkpointing=True, checkpoint_every=1, bf16=False, decision_length=2,
            accelerator=True, reference_kernels=False,
        )  # fmt: skip
        if key not in self._memory:
            self._memory[key] = Blueprint(self.config, key)
        return self._memory[key]

    def _tracer(self, setting: Setting) -> Tracer:
        key = ("tracer", replace(_without_lengths(setting), tier=1))
        if key not in self._memory:
            self._memory[key] = Tracer(self._blueprint(setting), key[1])
        return self._memory[key]


def _points(setting: Setting) -> tuple[int, int, int]:
    return POINTS if setting.accelerator and not setting.reference_kernels else REFERENCE_POINTS


def _without_lengths(setting: Setting) -> Setting:
    """What a model, its adapters and its layers' operations depend on."""
    # Of the decision, an accelerator's head computes the supervised tokens alone.
    decision = setting.decision_length if setting.accelerator else 2
    return replace(
        setting,
        context_length=0,
        turns=1,
        turn_length=None,
        max_decisions_per_forward=1,
        teacher_length=None,
        distill_top_k=0,
        distill_chunk_size=1,
        decision_length=decision,
        gradient_horizon=0,
        prefill_chunk_size=0,
        sequence_chunk_size=None,
        offload_stretches=False,
        optim="sgd",
        context_cache_bytes=0,
    )


def _frozen_bytes(cache: Cache, setting: Setting) -> int:
    """What is kept of the contexts that are at hand together."""
    return setting.samples_at_a_time * cache.num_bytes(setting.num_frozen, setting.num_boundaries)


def _teacher(setting: Setting) -> Setting | None:
    """How the teacher of a distillation runs; None: there is none."""
    if setting.teacher_length is None or setting.tier is None:
        return None
    return replace(
        setting,
        tier=2,
        context_length=setting.teacher_length,
        gradient_horizon=0,
        sequence_chunk_size=None,
        turn_length=None,
        use_peft=False,
    )


def _divergence(setting: Setting) -> tuple[tuple[int, int], Divergence]:
    """What logits are made for, and by what it is remembered."""
    key = (setting.distill_top_k, setting.distill_chunk_size)
    return key, Divergence(top_k=key[0], chunk_size=key[1])


def _handed_on(cache: Cache, lengths: list[int]) -> int:
    """What stretches of these lengths leave for the next one: keys and values of each, and the states after each."""
    kept = sum(layer.kv_bytes * layer.num_kept(length) for layer in cache.layers for length in lengths)
    return kept + len(lengths) * cache.state_bytes


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


_estimators: dict[str, Estimator] = {}


def estimator_of(config: PretrainedConfig) -> Estimator:
    """The estimator of a configuration; the last few are remembered with what they have counted."""
    text = config.to_json_string(use_diff=False)
    if text not in _estimators:
        while len(_estimators) >= 4:
            _estimators.pop(next(iter(_estimators)))
        _estimators[text] = Estimator(config)
    return _estimators[text]

# SPDX-License-Identifier: Apache-2.0
"""The terms of a plan.

Weights, adapters, gradients, optimizer and cache follow from counts and are exact. Activations and workspace are
formulas, see `step_memory`.
"""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from frozen_peft.adapters import lora_config, quantization_config
from frozen_peft.context.models import require_exact_continuation
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.gradient.stretched_decoder import stretch_bounds
from frozen_peft.planning.setting import DTYPE_BYTES, OPTIMIZER_BYTES, Setting
from frozen_peft.planning.shapes import Cache, ModelShape
from frozen_peft.planning.step_memory import StepMemory

__all__ = ["TERMS", "Figures", "ModelTerms", "terms_of"]

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
# Math libraries pack matrices into buffers that are no tensors, and an allocator wastes some.
CPU_RESERVE_BYTES = 2 << 20
# NF4 with double quantization, as bitsandbytes lays it out: blocks of weights with a scale of one byte, blocks of
# scales with one of four; per weight the two code books (16 and 256 numbers) and an offset.
BLOCK, SCALE_BLOCK = 64, 256
CODE_BYTES = 16 * 4 + 256 * 4 + 4
# Mixers whose accelerated kernels are not known here.
REFERENCE_ONLY = {"scan": "mamba_chunk_scan_combined", "kimi delta rule": "chunk_kda"}
# With these a family's modeling code, or what reads it, says that it cannot be run without weights.
_NOT_KNOWN = (
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


class ModelTerms:
    """The terms of one model, which is read once.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self.max_positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape.

        Raises:
            ValueError: There is no such model, or its layers are not understood.
        """
        return ModelShape(self.config)

    def weights(self, setting: Setting) -> Figures:
        """The terms that follow from counts alone: weights and what is trained."""
        figures = Figures()
        try:
            shape = self.shape
        except _NOT_KNOWN as error:
            figures.unknown += [f"{term}: {_reason(error)}" for term in TERMS if term != "reserve"]
            return figures
        figures.num_parameters = num_trained = shape.num_parameters
        number_bytes = DTYPE_BYTES[setting.dtype]
        quantized = self._quantized(setting)
        figures.terms["weights"] = sum(
            _nf4_bytes(size) if name in quantized else size * number_bytes for name, size in shape.parameters.items()
        )
        if setting.use_peft:
            # TRL has adapters in bfloat16 on a 4-bit base, PEFT in float32 elsewhere.
            number_bytes = DTYPE_BYTES["bfloat16" if setting.load_in_4bit else "float32"]
            try:
                adapted = self._adapted(setting)
            except UnsupportedArchitectureError as error:
                figures.unknown += [f"{term}: {_reason(error)}" for term in ("adapters", "gradients", "optimizer")]
                return figures
            linears = [linear for linear in shape.linears if linear.name in adapted]
            num_trained = setting.lora_r * sum(linear.in_features + linear.out_features for linear in linears)
            figures.terms["adapters"] = num_trained * number_bytes
        figures.terms["gradients"] = num_trained * number_bytes
        if setting.optim not in OPTIMIZER_BYTES:
            figures.unknown.append(f"optimizer: the state of `{setting.optim}` is not known")
            return figures
        own_type, fixed = OPTIMIZER_BYTES[setting.optim]
        figures.terms["optimizer"] = math.ceil(num_trained * (own_type * number_bytes + fixed))
        return figures

    def figures(self, setting: Setting, *, quick: bool = False) -> Figures:
        """All terms that can be known; the quick ones leave out the step itself."""
        figures = self.weights(setting)
        if figures.num_parameters is None:
            return figures
        step_terms = ("activations", "workspace")
        try:
            cache = self.cache(setting)
        except _NOT_KNOWN as error:
            figures.unknown += [f"{term}: {_reason(error)}" for term in ("cache", *step_terms)]
            return figures
        figures.cache_token_bytes = cache.token_bytes
        if setting.num_frozen:
            figures.terms["cache"] = _frozen_bytes(cache, setting)
        teacher = _teacher(setting)
        if quick:
            if teacher is not None:
                # Both contexts are at hand while the teacher is asked.
                figures.terms["teacher"] = _frozen_bytes(cache, teacher)
            figures.unknown += [f"{term}: not counted" for term in step_terms]
            return figures
        try:
            if setting.use_peft and "adapters" not in figures.terms:
                raise UnsupportedArchitectureError("without adapters there is no step to count")
            if setting.num_frozen or setting.sequence_chunk_size is not None:
                require_exact_continuation(self.shape.model)
            self._add_step(figures, cache, setting)
            if teacher is not None:
                self._add_teacher(figures, cache, teacher)
        except _NOT_KNOWN as error:
            figures.unknown += [f"{term}: {_reason(error)}" for term in step_terms]
        figures.terms["reserve"] = RESERVE_BYTES if setting.accelerator else CPU_RESERVE_BYTES
        figures.terms = {term: figures.terms[term] for term in TERMS if term in figures.terms}
        return figures

    def cache(self, setting: Setting) -> Cache:
        """What the model keeps of a context.

        Raises:
            ValueError: The model's layers are not understood.
        """
        model_bytes = DTYPE_BYTES[setting.dtype]
        # Under autocast, rotary embeddings bring keys back to the model's type.
        return Cache(tuple(self.shape.caches), model_bytes, setting.number_bytes)

    def _step(self, setting: Setting) -> StepMemory:
        return StepMemory(self.shape, setting, self._adapted(setting))

    def _add_step(self, figures: Figures, cache: Cache, setting: Setting) -> None:
        # Decisions run by themselves, some of them together.
        rows = replace(setting, batch=setting.decisions_per_forward, turns=1)
        step = self._step(rows)
        prefill = self._step(setting).prefill() if setting.num_frozen else 0
        head = step.head()
        if setting.teacher_length is not None:
            head = max(head, step.divergence(of_student=True))
        if setting.in_stretches:
            kept = self._add_stretches(figures, step, cache, rows)
            head -= figures.terms["cache gradient"]
            figures.terms["workspace"] = max(head, prefill, kept) - kept
        else:
            kept = step.kept(rows.num_graded, rows.num_frozen)
            inside = step.inside(rows.num_graded, rows.num_frozen)
            figures.terms["workspace"] = max(kept + head, kept + inside, prefill) - kept
        figures.terms["activations"] = kept
        weights = self.shape.parameters
        largest = max((weights[name] for name in self._quantized(setting)), default=0)
        figures.terms["workspace"] += largest * DTYPE_BYTES["bfloat16"]
        kinds = {part.kind for layer in self.shape.layers for part in layer.parts}
        if setting.accelerator and (slow := [REFERENCE_ONLY[kind] for kind in REFERENCE_ONLY if kind in kinds]):
            figures.notes.append(f"planned as PyTorch's reference, which takes more: {', '.join(slow)}")

    def _add_stretches(self, figures: Figures, step: StepMemory, cache: Cache, setting: Setting) -> int:
        """What stretches hand on, and what one of them takes beside it."""
        bounds = stretch_bounds(setting.num_graded, max(setting.sequence_chunk_size or 2, 2))
        lengths = [stop - start for start, stop in bounds]
        handed = setting.batch * sum(cache.num_bytes(length) for length in lengths[:-1])
        gradient = setting.batch * cache.gradient_bytes(bounds[-1][0])
        if setting.offload_stretches:
            figures.host_bytes = handed + gradient
            # One set of states, to start from, and what attention reads at a time.
            handed, gradient = setting.batch * cache.state_bytes, 0
        figures.terms["cache"] = figures.terms.get("cache", 0) + handed
        figures.terms["cache gradient"] = gradient
        hidden_states = setting.batch * setting.num_outputs * self.shape.hidden_size
        figures.terms["last hidden states"] = 2 * hidden_states * setting.number_bytes
        longest, last = max(lengths), bounds[-1][0]
        piece = max(setting.num_frozen, longest if last else 0)
        return step.stretch(longest, setting.num_frozen + last, piece)

    def _add_teacher(self, figures: Figures, cache: Cache, teacher: Setting) -> None:
        """It is asked while the student's contexts are at hand, and before its decisions run; without adapters."""
        rows = replace(teacher, batch=teacher.decisions_per_forward, turns=1)
        asked = StepMemory(self.shape, rows, frozenset()).answer()
        prefill = StepMemory(self.shape, teacher, frozenset()).prefill() if teacher.num_frozen else 0
        needed = _frozen_bytes(cache, teacher) + max(asked, prefill)
        figures.terms["teacher"] = max(needed - figures.terms["activations"] - figures.terms["workspace"], 0)

    def _adapted(self, setting: Setting) -> frozenset[str]:
        return _adapted(self.shape, setting.lora_preset if setting.use_peft else None, setting.lora_roles)

    def _quantized(self, setting: Setting) -> frozenset[str]:
        return _quantized(self.shape) if setting.load_in_4bit else frozenset()


@lru_cache(maxsize=4)
def _quantized(shape: ModelShape) -> frozenset[str]:
    """Full names of the weights that 4-bit loading quantizes."""
    kept = quantization_config(shape.model).llm_int8_skip_modules
    linears = (nn.Linear, Conv1D)
    names = [name for name, module in shape.model.named_modules() if type(module) in linears]
    return frozenset(f"{name}.weight" for name in names if should_convert_module(name, kept))


@lru_cache(maxsize=4)
def _adapted(shape: ModelShape, preset: str | None, roles: tuple[str, ...] | None) -> frozenset[str]:
    """Full names of the linear modules that are trained; without a preset all are.

    Raises:
        UnsupportedArchitectureError: The architecture has no known roles.
    """
    linears = frozenset(linear.name for linear in shape.linears)
    if preset is None:
        return linears
    target = lora_config(shape.model, preset=preset, roles=None if roles is None else list(roles)).target_modules
    return frozenset(name for name in linears if re.fullmatch(target, name))


def _frozen_bytes(cache: Cache, setting: Setting) -> int:
    """What is kept of the contexts that are at hand together."""
    return setting.samples_at_a_time * cache.num_bytes(setting.num_frozen, setting.num_boundaries)


def _teacher(setting: Setting) -> Setting | None:
    """How the teacher of a distillation runs; None: there is none."""
    if setting.teacher_length is None or setting.tier is None:
        return None
    return replace(
        setting, tier=2, context_length=setting.teacher_length, gradient_horizon=0, sequence_chunk_size=None,
        turn_length=None,
    )  # fmt: skip


def _nf4_bytes(num_weights: int) -> int:
    """Bytes of a weight in NF4 with double quantization."""
    num_blocks = math.ceil(num_weights / BLOCK)
    return math.ceil(num_weights / 2) + num_blocks + 4 * math.ceil(num_blocks / SCALE_BLOCK) + CODE_BYTES


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


_known: dict[str, ModelTerms] = {}


def terms_of(config: PretrainedConfig) -> ModelTerms:
    """The terms of a configuration; the last few are remembered."""
    text = config.to_json_string(use_diff=False)
    if text not in _known:
        while len(_known) >= 4:
            _known.pop(next(iter(_known)))
        _known[text] = ModelTerms(config)
    return _known[text]

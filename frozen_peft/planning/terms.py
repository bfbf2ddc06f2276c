# SPDX-License-Identifier: Apache-2.0
"""The terms of a plan.

Weights, adapters, gradients, optimizer and cache follow from counts and are exact. Activations and workspace are
formulas, see `step_memory`.
"""

import math
import re
from dataclasses import replace
from functools import cached_property, lru_cache

from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from frozen_peft.adapters import lora_config, quantization_config
from frozen_peft.context.models import require_exact_continuation
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.gradient.stretched_decoder import stretch_bounds
from frozen_peft.planning.plan import Plan
from frozen_peft.planning.setting import DTYPE_BYTES, OPTIMIZER_BYTES, Setting
from frozen_peft.planning.shapes import Cache, ModelShape
from frozen_peft.planning.step_memory import StepMemory

__all__ = ["TERMS", "make_plan", "plan_of_weights", "terms_of"]

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


class ModelTerms:
    """The terms of one model, which is read once.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape.

        Raises:
            ValueError: There is no such model, or its layers are not understood.
        """
        return ModelShape(self.config)

    @cached_property
    def quantizable(self) -> frozenset[str]:
        """Full names of the weights that 4-bit loading quantizes."""
        kept = quantization_config(self.shape.model).llm_int8_skip_modules
        modules = self.shape.model.named_modules()
        linears = [name for name, module in modules if type(module) in (nn.Linear, Conv1D)]
        return frozenset(f"{name}.weight" for name in linears if should_convert_module(name, kept))

    def plan(self, setting: Setting, memory_limit: int | None, *, quick: bool) -> Plan:
        """All terms that can be known; the quick ones leave out the step itself."""
        name = self.config.name_or_path or self.config.model_type or "a model"
        plan = Plan(name, setting, memory_limit, lambda other: self.plan(other, memory_limit, quick=quick))
        try:
            plan.num_parameters = self.shape.num_parameters
        except _NOT_KNOWN as error:
            plan.unknown += [f"{term}: {_reason(error)}" for term in TERMS if term != "reserve"]
            return plan
        self._add_weights(plan)
        step_terms = ("activations", "workspace")
        try:
            cache = self.cache(setting)
        except _NOT_KNOWN as error:
            plan.unknown += [f"{term}: {_reason(error)}" for term in ("cache", *step_terms)]
            return plan
        plan.cache_token_bytes = cache.token_bytes
        if setting.num_frozen:
            plan.terms["cache"] = _frozen_bytes(cache, setting)
        teacher = _teacher(setting)
        if quick:
            if teacher is not None:
                # Both contexts are at hand while the teacher is asked.
                plan.terms["teacher"] = _frozen_bytes(cache, teacher)
            plan.unknown += [f"{term}: not counted" for term in step_terms]
            return plan
        try:
            if setting.use_peft and "adapters" not in plan.terms:
                raise UnsupportedArchitectureError("without adapters there is no step to count")
            if setting.num_frozen or setting.sequence_chunk_size is not None:
                require_exact_continuation(self.shape.model)
            self._add_step(plan, cache)
            if teacher is not None:
                self._add_teacher(plan, cache, teacher)
        except _NOT_KNOWN as error:
            plan.unknown += [f"{term}: {_reason(error)}" for term in step_terms]
        plan.terms["reserve"] = RESERVE_BYTES if setting.accelerator else CPU_RESERVE_BYTES
        plan.terms = {term: plan.terms[term] for term in TERMS if term in plan.terms}
        return plan

    def cache(self, setting: Setting) -> Cache:
        """What the model keeps of a context.

        Raises:
            ValueError: The model's layers are not understood.
        """
        model_bytes = DTYPE_BYTES[setting.dtype]
        # Under autocast, rotary embeddings bring keys back to the model's type.
        return Cache(tuple(self.shape.caches), model_bytes, setting.number_bytes)

    def _add_weights(self, plan: Plan) -> None:
        """Adds the terms that follow from counts alone: weights and what is trained."""
        setting, shape = plan.setting, self.shape
        number_bytes, quantized = DTYPE_BYTES[setting.dtype], self._quantized(setting)
        plan.terms["weights"] = sum(
            _nf4_bytes(size) if name in quantized else size * number_bytes for name, size in shape.parameters.items()
        )
        num_trained = shape.num_parameters
        if setting.use_peft:
            # TRL has adapters in bfloat16 on a 4-bit base, PEFT in float32 elsewhere.
            number_bytes = DTYPE_BYTES["bfloat16" if setting.load_in_4bit else "float32"]
            try:
                adapted = self._adapted(setting)
            except UnsupportedArchitectureError as error:
                plan.unknown += [f"{term}: {_reason(error)}" for term in ("adapters", "gradients", "optimizer")]
                return
            linears = [linear for linear in shape.linears if linear.name in adapted]
            num_trained = setting.lora_r * sum(linear.in_features + linear.out_features for linear in linears)
            plan.terms["adapters"] = num_trained * number_bytes
        plan.terms["gradients"] = num_trained * number_bytes
        if setting.optim not in OPTIMIZER_BYTES:
            plan.unknown.append(f"optimizer: the state of `{setting.optim}` is not known")
            return
        own_type, fixed = OPTIMIZER_BYTES[setting.optim]
        plan.terms["optimizer"] = math.ceil(num_trained * (own_type * number_bytes + fixed))

    def _add_step(self, plan: Plan, cache: Cache) -> None:
        setting, adapted = plan.setting, self._adapted(plan.setting)
        # Decisions run by themselves, some of them together.
        rows = replace(setting, batch=setting.decisions_per_forward, turns=1, answers=1)
        step = StepMemory(self.shape, rows, adapted)
        prefill = StepMemory(self.shape, setting, adapted).prefill() if setting.num_frozen else 0
        head = step.head()
        if setting.teacher_length is not None:
            head = max(head, step.divergence(of_student=True))
        if setting.in_stretches:
            kept = self._add_stretches(plan, step, cache, rows)
            head -= plan.terms["cache gradient"]
            plan.terms["workspace"] = max(head, prefill, kept) - kept
        else:
            kept = step.kept(rows.num_graded, rows.num_frozen)
            inside = step.inside(rows.num_graded, rows.num_frozen)
            plan.terms["workspace"] = max(kept + head, kept + inside, prefill) - kept
        plan.terms["activations"] = kept
        weights = self.shape.parameters
        largest = max((weights[name] for name in self._quantized(setting)), default=0)
        plan.terms["workspace"] += largest * DTYPE_BYTES["bfloat16"]
        kinds = {part.kind for layer in self.shape.layers for part in layer.parts}
        if setting.accelerator and (slow := [REFERENCE_ONLY[kind] for kind in REFERENCE_ONLY if kind in kinds]):
            plan.notes.append(f"planned as PyTorch's reference, which takes more: {', '.join(slow)}")

    def _add_stretches(self, plan: Plan, step: StepMemory, cache: Cache, setting: Setting) -> int:
        """What stretches hand on, and what one of them takes beside it."""
        bounds = stretch_bounds(setting.num_graded, max(setting.sequence_chunk_size or 2, 2))
        lengths = [stop - start for start, stop in bounds]
        handed = setting.batch * sum(cache.num_bytes(length) for length in lengths[:-1])
        gradient = setting.batch * cache.gradient_bytes(bounds[-1][0])
        if setting.offload_stretches:
            plan.host_bytes = handed + gradient
            # One set of states, to start from, and what attention reads at a time.
            handed, gradient = setting.batch * cache.state_bytes, 0
        plan.terms["cache"] = plan.terms.get("cache", 0) + handed
        plan.terms["cache gradient"] = gradient
        hidden_states = setting.batch * setting.num_outputs * self.shape.hidden_size
        plan.terms["last hidden states"] = 2 * hidden_states * setting.number_bytes
        longest, last = max(lengths), bounds[-1][0]
        piece = max(setting.num_frozen, longest if last else 0)
        return step.stretch(longest, setting.num_frozen + last, piece)

    def _add_teacher(self, plan: Plan, cache: Cache, teacher: Setting) -> None:
        """It is asked while the student's contexts are at hand, and before its decisions run; without adapters."""
        rows = replace(teacher, batch=teacher.decisions_per_forward, turns=1, answers=1)
        asked = StepMemory(self.shape, rows, frozenset()).answer()
        prefill = StepMemory(self.shape, teacher, frozenset()).prefill() if teacher.num_frozen else 0
        needed = _frozen_bytes(cache, teacher) + max(asked, prefill)
        plan.terms["teacher"] = max(needed - plan.terms["activations"] - plan.terms["workspace"], 0)

    def _adapted(self, setting: Setting) -> frozenset[str]:
        return _adapted(self.shape, setting.lora_preset if setting.use_peft else None, setting.lora_roles)

    def _quantized(self, setting: Setting) -> frozenset[str]:
        return self.quantizable if setting.load_in_4bit else frozenset()


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
    return setting.samples_at_a_time * cache.num_bytes(setting.num_encoded, setting.num_boundaries)


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


def make_plan(config: PretrainedConfig | str, setting: Setting, memory_limit: int | None = None) -> Plan:
    """Plans one way of training from a model's configuration alone; no weights are read.

    Args:
        config: The model's configuration, or a hub id or folder to load it from.
        setting: The way of training.
        memory_limit: Bytes that the device has; None: only what training takes.

    Raises:
        ValueError: The preset or roles do not exist.
    """
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    return terms_of(config).plan(setting, memory_limit, quick=False)


def plan_of_weights(config: PretrainedConfig, setting: Setting, memory_limit: int | None = None) -> Plan:
    """The terms of a plan that are quick to know: weights, what is trained, and a frozen context.

    Activations and workspace are among `unknown`, so that it tells only whether a run cannot fit.
    """
    return terms_of(config).plan(setting, memory_limit, quick=True)

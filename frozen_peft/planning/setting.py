# SPDX-License-Identifier: Apache-2.0
"""What a plan is made for: a way of training, with every choice that memory or time depends on."""

from dataclasses import dataclass
from typing import Any, Self

from frozen_peft.config import TIERS, ContextFields, FrozenContextConfig

__all__ = ["DTYPE_BYTES", "OPTIMIZER_BYTES", "Setting"]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

OPTIMIZER_BYTES: dict[str, tuple[int, float]] = {
    "adamw_torch": (2, 0.0),
    "adamw_torch_fused": (2, 0.0),
    "adamw_bnb_8bit": (0, 2 + 2 * 4 / 256),
    "adamw_8bit": (0, 2 + 2 * 4 / 256),
    "paged_adamw_8bit": (0, 2 + 2 * 4 / 256),
    "paged_adamw_32bit": (0, 8.0),
    "adamw_bnb_32bit": (0, 8.0),
    "sgd": (0, 0.0),
}
"""By optimizer: states as large as the weight in its own type, and bytes per weight whatever its type.

bitsandbytes keeps each of two moments in a byte, with a float32 scale per 256 weights. A paged optimizer's state may
move to the host; it is counted as if it stayed.
"""


@dataclass(frozen=True)
class Setting:
    """One way of training.

    Attributes:
        tier: 1, 2 or 3, as in `FrozenContextConfig`; None: `SFTTrainer`, which runs the whole sample as tier 1 does.
        context_length: Tokens of a sample before its decision.
        decision_length: Tokens of the decision.
        batch: Samples per forward (`per_device_train_batch_size`).
        turns: Decisions of a sample, each behind everything before it (`decision_mode: turns`). `context_length` is
            that of the last one, and `decision_length` that of each. Where nothing is frozen they are one.
        turn_length: Most context tokens from one decision to the next, or before the first; None: as many for each.
        branch_length: Context tokens of a sample that are encoded beside its longest context, since inference shows an
            earlier turn what it does not show a later one (`turn_contexts: inference`).
        answers: Decisions behind the whole context of each sample, which the model writes (`distill_on_policy`).
        max_decisions_per_forward: Decisions that run together, of several turns or answers.
        teacher_length: Tokens of a distillation's teacher before the last decision; None: nothing is distilled.
        distill_top_k: Tokens of the teacher's that are compared one by one; 0: all.
        distill_chunk_size: Tokens of decisions whose logits exist at a time.
        gradient_horizon: Context tokens before the decision that carry gradient, for tier 2.
        prefill_chunk_size: Context tokens per prefill forward; 0: one forward.
        sequence_chunk_size: Tokens per stretch of what carries gradient; None: all at once.
        offload_stretches: What stretches hand on lies in host memory.
        gradient_checkpointing: Layers are computed again in the backward pass.
        checkpoint_every: Layers per checkpoint.
        load_in_4bit: The base is in NF4 with double quantization.
        dtype: Of weights that are not in 4 bit.
        bf16: Computation under autocast to bfloat16.
        use_peft: Adapters are trained; otherwise all weights.
        lora_preset: Roles that are adapted.
        lora_roles: Roles in place of the preset.
        lora_r: Rank of the adapters.
        optim: Name of the optimizer, as transformers has it.
        context_cache_bytes: Memory for contexts kept for later steps.
        accelerator: Planned for a GPU; False: for a CPU.
        reference_kernels: Linear attention runs PyTorch's reference on the accelerator too.
    """

    tier: int | None
    context_length: int
    decision_length: int
    batch: int = 1
    turns: int = 1
    turn_length: int | None = None
    branch_length: int = 0
    answers: int = 1
    max_decisions_per_forward: int = 16
    teacher_length: int | None = None
    distill_top_k: int = 100
    distill_chunk_size: int = 128
    gradient_horizon: int = 0
    prefill_chunk_size: int = 2048
    sequence_chunk_size: int | None = None
    offload_stretches: bool = False
    gradient_checkpointing: bool = True
    checkpoint_every: int = 1
    load_in_4bit: bool = False
    dtype: str = "bfloat16"
    bf16: bool = True
    use_peft: bool = True
    lora_preset: str = "response"
    lora_roles: tuple[str, ...] | None = None
    lora_r: int = 16
    optim: str = "adamw_torch_fused"
    context_cache_bytes: int = 0
    accelerator: bool = True
    reference_kernels: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("context_length", 0),
            ("decision_length", 2),
            ("batch", 1),
            ("turns", 1),
            ("answers", 1),
            ("max_decisions_per_forward", 1),
            ("distill_top_k", 0),
            ("distill_chunk_size", 1),
            ("gradient_horizon", -1),
            ("prefill_chunk_size", 0),
            ("sequence_chunk_size", 1),
            ("turn_length", 0),
            ("branch_length", 0),
            ("teacher_length", 0),
            ("checkpoint_every", 1),
            ("lora_r", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be {least} or more, found {value}.")
        if self.tier not in (None, *TIERS):
            raise ValueError(f"`tier` must be 1, 2, 3 or None (SFTTrainer), found {self.tier!r}.")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPE_BYTES)}, found {self.dtype!r}.")

    @classmethod
    def from_config(cls, config: ContextFields, *, context_length: int, decision_length: int, **rest: Any) -> Self:
        """The setting of a run.

        Args:
            config: The trainer's configuration.
            context_length: Longest context of the data, in tokens.
            decision_length: Longest decision.
            rest: What the configuration does not say: the model's type and adapters, turns, the teacher's length.
        """
        freezes = config.gradient_horizon != -1
        distillation: dict[str, Any] = {}
        if isinstance(config, FrozenContextConfig):
            distillation = {"distill_top_k": config.distill_top_k, "distill_chunk_size": config.distill_chunk_size}
            if config.writes:
                distillation["answers"] = config.num_generations
                given = 0 if config.needs_no_completions else decision_length
                decision_length = max(given, 1 + config.max_completion_length)
        return cls(
            tier=2 if freezes else config.tier or 1,
            context_length=context_length,
            decision_length=max(decision_length, 2),
            batch=config.per_device_train_batch_size * config.rows_per_sample,
            gradient_horizon=max(config.gradient_horizon or 0, 0),
            max_decisions_per_forward=config.max_decisions_per_forward,
            **distillation,
            prefill_chunk_size=config.prefill_chunk_size,
            sequence_chunk_size=config.sequence_chunk_size,
            offload_stretches=config.offload_stretches,
            gradient_checkpointing=bool(config.gradient_checkpointing),
            checkpoint_every=config.checkpoint_every,
            bf16=bool(config.bf16),
            optim=getattr(config.optim, "value", str(config.optim)),
            **rest,
        )

    @property
    def number_bytes(self) -> int:
        """Bytes of a number that is computed with."""
        return DTYPE_BYTES["bfloat16" if self.bf16 else self.dtype]

    @property
    def num_frozen(self) -> int:
        """Context tokens of a sample that are encoded without gradient."""
        if self.tier != 2 or self.gradient_horizon == -1:
            return 0
        return max(self.context_length - self.gradient_horizon, 0)

    @property
    def num_encoded(self) -> int:
        """Tokens that are encoded for the contexts of a sample, what they share once."""
        return self.num_frozen + self.branch_length if self.num_frozen else 0

    @property
    def num_boundaries(self) -> int:
        """Places of a context whose states are kept: before each of its decisions."""
        return self.turns if self.num_frozen else 1

    @property
    def longest_piece(self) -> int:
        """Most context tokens that are encoded between two such places."""
        if self.num_boundaries == 1:
            return self.num_frozen
        even = -(-self.num_frozen // self.num_boundaries)
        return min(self.turn_length or even, self.num_frozen)

    @property
    def decisions_per_forward(self) -> int:
        """Decisions that run forward and backward together."""
        if self.answers > 1:
            return min(self.batch * self.answers, self.max_decisions_per_forward)
        if self.num_boundaries == 1:
            return self.batch
        return min(self.batch * self.turns, self.max_decisions_per_forward)

    @property
    def samples_at_a_time(self) -> int:
        """Samples whose contexts are at hand together: those that the decisions of one forward belong to."""
        if self.answers > 1:
            # They are written before any is trained.
            return self.batch
        size, turns = self.decisions_per_forward, self.num_boundaries
        total = self.batch * turns
        starts = range(0, total, size)
        return max((min(start + size, total) - 1) // turns - start // turns + 1 for start in starts)

    @property
    def num_graded(self) -> int:
        """Tokens of a sample that run forward and backward."""
        return self.context_length + self.decision_length - self.num_frozen

    @property
    def in_stretches(self) -> bool:
        """Whether what carries gradient runs in more than one piece."""
        size = self.sequence_chunk_size
        return size is not None and (self.num_frozen > 0 or self.num_graded > max(size, 2))

    @property
    def num_outputs(self) -> int:
        """Tokens of a sample whose last hidden states the loss gets.

        In stretches those from the batch's first label on: of several samples any may begin its decision early.
        """
        return self.decision_length if self.in_stretches and self.decisions_per_forward == 1 else self.num_graded

    @property
    def title(self) -> str:
        """What the setting is called in a table."""
        name = "SFTTrainer" if self.tier is None else f"tier {self.tier}"
        if self.num_boundaries > 1:
            name += f", {self.turns} turns"
        if self.teacher_length is not None and self.tier is not None:
            name += ", distilled" if self.answers == 1 else f", {self.answers} answers of its own"
        if self.sequence_chunk_size is not None:
            name += f", stretches of {self.sequence_chunk_size}"
        if self.offload_stretches:
            name += ", on the host"
        if not self.gradient_checkpointing:
            name += ", no checkpoints"
        elif self.checkpoint_every > 1:
            name += f", {self.checkpoint_every} layers per checkpoint"
        return name

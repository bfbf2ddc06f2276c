# SPDX-License-Identifier: Apache-2.0
"""What a configuration says of contexts, whatever the loss."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from frozen_peft.config.field_checks import require, require_choice, require_rows_of_one, require_size

# Any configuration of TRL; a type checker is told of the one whose fields they have in common.
if TYPE_CHECKING:
    from trl import SFTConfig as Config
else:
    Config = object

__all__ = ["TIERS", "ContextFields"]

logger = logging.get_logger(__name__)

# The `gradient_horizon` of each tier. Tier 3 is tier 1 with recomputation, which TRL turns on by default; what a
# recipe of tier 3 adds is how (`checkpoint_every`).
TIERS = {1: -1, 2: 0, 3: -1}


@dataclass
class ContextFields(Config):
    """What a configuration says of contexts, whatever the loss: stands before a configuration of TRL.

    The fields are described by their `help`, which `docs/configuration.md` and `frozen-peft train --help` are made
    from.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    tier: int | None = HfArg(
        default=None,
        help="Preset of the fields below. 1: short corrections, full gradient. 2: behaviour, frozen context. "
        "3: deep changes, full gradient with recomputation. A field that is given wins over its tier.",
        metadata={"choices": [1, 2, 3]},
    )
    gradient_horizon: int | None = HfArg(
        default=None,
        help="Context tokens just before the decision that carry gradient; 0: none, -1: the whole context. "
        "Defaults to what the tier says, and to 0 without one.",
    )
    context_adapters: bool = HfArg(
        default=True,
        help="Whether adapters are active while the context is encoded. True: the trained model is the merged "
        "model. False: the context is encoded by the base model (PEFT's activated LoRA); exact at inference only "
        "when served the same way.",
    )
    decision_mode: Literal["tail", "turns"] = HfArg(
        default="tail",
        help="'tail': everything from the first supervised label on is one decision. 'turns': each supervised "
        "span of a conversation is a decision of its own, everything before it its context, encoded once.",
    )
    max_decisions_per_forward: int = HfArg(
        default=16,
        help="Decisions of a micro-batch that run together with `decision_mode='turns'`; bounds memory and "
        "changes nothing else.",
    )
    invocation: str | None = HfArg(
        default=None,
        help="Text whose tokens every decision begins with when `context_adapters=False`: there the adapter is "
        "switched on. Defaults to the chat template's generation prompt.",
    )
    prefill_chunk_size: int = HfArg(
        default=2048,
        help="Context tokens per prefill forward, which bounds the memory of activations; 0: one forward.",
    )
    max_context_length: int | None = HfArg(
        default=None, help="Keep this many context tokens, the latest. The decision is never cut."
    )
    keep_context_start: str = HfArg(
        default="0",
        help="What stays of a cut context's start, besides a beginning-of-sequence token: 'system', its system "
        "message, or so many tokens.",
    )
    context_cache_size: str = HfArg(
        default="0",
        help="Memory for frozen contexts kept for later steps and epochs, such as '8GiB': on the GPU while it "
        "has room, else in host memory.",
    )
    context_cache_dir: str | None = HfArg(
        default=None, help="Directory for frozen contexts kept for later epochs and other runs."
    )
    context_cache_dtype: Literal["auto", "int8"] = HfArg(
        default="auto",
        help="'auto': contexts are kept as encoded. 'int8': keys and values in 8 bit, about half as large, and "
        "rounded before use.",
    )
    max_context_staleness: int = HfArg(
        default=0,
        help="Optimizer steps for which a frozen context may be reused when `context_adapters=True`, although "
        "the adapter has moved on since it was encoded; 0 is exact. Evaluation never reuses one.",
    )
    group_by_context: bool = HfArg(
        default=False,
        help="Whether samples whose contexts begin alike come into the same optimizer step, and within it onto "
        "the same process, where the common part is encoded once. Steps are in random order, but less mixed.",
    )
    sequence_chunk_size: int | None = HfArg(
        default=None,
        help="Tokens per stretch of the sequence. What carries gradient (`gradient_horizon`) runs one stretch "
        "at a time, forward and backward: the exact gradient, with the activations of one stretch in memory. 1 "
        "means 2.",
    )
    offload_stretches: bool = HfArg(
        default=False,
        help="Keep in host memory what the stretches of `sequence_chunk_size` hand on to each other (keys, "
        "values, their gradients, states), so that it bounds the length of a sequence.",
    )
    checkpoint_every: int = HfArg(default=1, help="Layers per checkpoint, with `gradient_checkpointing`.")
    verify_context: Literal["first_batch", "always", "never"] = HfArg(
        default="first_batch",
        help="When to compare the decision's log-probabilities with a plain full forward, on one sample cut to "
        "a bounded length. A difference is a `ContextMismatchError`.",
    )

    def __post_init__(self) -> None:
        self._apply_tier()
        super().__post_init__()
        self._check_ranges()
        self._check_store()
        if self.checkpoint_every > 1:
            self._check_checkpointing()
        self._check_stretches()
        self._check_noise()
        if self.group_by_context:
            self._check_grouping()

    def __getstate__(self) -> dict[str, Any]:
        # The trainer pickles this beside the weights, in `training_args.bin`, to be handed on with them.
        return {**self.__dict__, "hub_token": None}

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> Self:
        """Converts a plain configuration of TRL, or `TrainingArguments`, keeping every field it has.

        TRL cuts samples at 1024 tokens unless told otherwise, which would cut off decisions behind long contexts: that
        default becomes None here. A `max_length` other than 1024 is kept.
        """
        known = {f.name for f in fields(cls) if f.init}
        values = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
        # The old names mirror the new ones and would warn if they were passed as well.
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            values.pop(name, None)
        plain: Any = next(base for base in cls.__mro__ if base.__module__.partition(".")[0] == "trl")
        if isinstance(args, plain) and values["max_length"] == plain.max_length:
            logger.info(
                f"`max_length={plain.max_length}` is the default of {plain.__name__}, where it cuts decisions off; "
                f"None is used instead. Use {cls.__name__} to set it."
            )
            values["max_length"] = None
        return cls(**values)

    @property
    def runs_in_parts(self) -> bool:
        """Whether a sample is run in parts: a context and its decision, or stretches."""
        return self.gradient_horizon != -1 or self.sequence_chunk_size is not None

    @property
    def renders_turns(self) -> bool:
        """Whether the turns of a conversation are rendered one by one."""
        return False

    @property
    def base_needed_for(self) -> str | None:
        """What has the model without its adapters for what: subject and verb of a sentence; None: nothing."""
        return None if self.context_adapters else "`context_adapters=False` encodes contexts by the base model"

    @property
    def rows_per_sample(self) -> int:
        """Decisions, and contexts at hand, for each sample of a batch, beside what turns make of it."""
        return 1

    @property
    def keeps_other_contexts(self) -> bool:
        """Whether another model's contexts, which adapters do not change, are kept where those of this one are."""
        return False

    def _apply_tier(self) -> None:
        if self.tier is not None and self.tier not in TIERS:
            raise ValueError(f"`tier` must be 1, 2 or 3, found {self.tier!r}.")
        if self.gradient_horizon is None:
            self.gradient_horizon = 0 if self.tier is None else TIERS[self.tier]

    def _check_ranges(self) -> None:
        assert self.gradient_horizon is not None
        for name, least, expected in (
            ("gradient_horizon", -1, "-1, 0 or a number of tokens"),
            ("prefill_chunk_size", 0, "0 or more tokens"),
            ("checkpoint_every", 1, "1 layer or more"),
            ("max_context_staleness", 0, "0 or more"),
            ("max_decisions_per_forward", 1, "1 decision or more"),
        ):
            require(getattr(self, name) >= least, name, getattr(self, name), expected)
        for name in ("max_context_length", "max_length", "sequence_chunk_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 token or more, or None")
        self._check_start()
        for name in ("decision_mode", "context_cache_dtype", "verify_context"):
            require_choice(self, name)

    def _check_start(self) -> None:
        # A recipe's number arrives as one.
        self.keep_context_start = kept = str(self.keep_context_start)
        is_number = kept.isascii() and kept.isdigit()
        require(kept == "system" or is_number, "keep_context_start", kept, "'system' or a number of tokens")
        if is_number and self.max_context_length is not None and int(kept) > self.max_context_length:
            raise ValueError(
                f"`keep_context_start={kept}` keeps more tokens than `max_context_length={self.max_context_length}` "
                "does. Lower it, or raise that."
            )
        if kept != "0" and self.max_context_length is None and self.max_length is None:
            logger.warning(
                f"No effect of `keep_context_start={kept}`: `max_context_length` and `max_length` drop nothing."
            )

    def _check_store(self) -> None:
        assert self.gradient_horizon is not None
        keeps = require_size(self, "context_cache_size") > 0 or self.context_cache_dir is not None
        if not self.context_adapters and self.gradient_horizon != 0:
            raise ValueError(
                f"`context_adapters=False` needs `gradient_horizon=0`, found {self.gradient_horizon}: context tokens "
                "that carry gradient would see the adapters. Set `tier: 2`, or `context_adapters=True`."
            )
        if self.invocation is not None and self.context_adapters:
            raise ValueError(
                "`invocation` is where an adapter is switched on, and with `context_adapters=True` it is never off. "
                "Remove `invocation`, or set `context_adapters=False`."
            )
        if self.context_cache_dtype != "auto" and not keeps:
            raise ValueError(
                f"`context_cache_dtype={self.context_cache_dtype!r}` is how contexts are kept, and "
                "`context_cache_size` and `context_cache_dir` keep none. Set one of them, or leave "
                "`context_cache_dtype` at 'auto'."
            )
        without_effect = []
        if keeps and self.gradient_horizon == -1:
            names = "`context_cache_size`, `context_cache_dir` and `context_cache_dtype`"
            without_effect.append(f"{names}: no context is frozen")
        if self.max_context_staleness and not self.context_adapters:
            without_effect.append("`max_context_staleness`: with `context_adapters=False` nothing goes stale")
        if self.max_context_staleness and not keeps:
            without_effect.append("`max_context_staleness`: `context_cache_size` and `context_cache_dir` keep nothing")
        lasting = not self.context_adapters or self.max_context_staleness or self.keeps_other_contexts
        if self.context_cache_dir is not None and not lasting:
            without_effect.append(
                "`context_cache_dir` beyond one optimizer step, since adapters change the contexts in each: set "
                "`context_adapters=False` or `max_context_staleness`"
            )
        for reason in without_effect:
            logger.warning(f"No effect of {reason}.")

    def _check_noise(self) -> None:
        if self.neftune_noise_alpha and (self.gradient_horizon != -1 or self.sequence_chunk_size is not None):
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha}` adds noise to the embeddings of a forward, the "
                "more the shorter it is. A frozen context, encoded once and shared, would get none and its decision "
                "that of a short text; so would a stretch of a sequence (`sequence_chunk_size`). Leave it out, or "
                "train with `tier: 1` (or `tier: 3`) without `sequence_chunk_size`, where a sample is one forward and "
                "the noise is that of SFTTrainer."
            )

    def _check_checkpointing(self) -> None:
        kwargs = self.gradient_checkpointing_kwargs or {}
        if not self.gradient_checkpointing:
            raise ValueError(
                f"`checkpoint_every={self.checkpoint_every}` has no effect with `gradient_checkpointing=False`. Turn "
                "that on, or leave `checkpoint_every` at 1."
            )
        for name in ("use_reentrant", "selective"):
            if kwargs.get(name):
                raise ValueError(
                    f"`checkpoint_every={self.checkpoint_every}` needs non-reentrant checkpoints over whole layers; "
                    f"remove `{name}` from `gradient_checkpointing_kwargs`, or leave `checkpoint_every` at 1."
                )

    def _check_stretches(self) -> None:
        if self.sequence_chunk_size is None:
            if self.offload_stretches:
                raise ValueError("`offload_stretches=True` has no effect without `sequence_chunk_size`. Set that too.")
            return
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                f"`sequence_chunk_size={self.sequence_chunk_size}` needs non-reentrant checkpoints; remove "
                "`use_reentrant` from `gradient_checkpointing_kwargs`."
            )
        require_rows_of_one(
            self, f"`sequence_chunk_size={self.sequence_chunk_size}` runs through each sample by itself"
        )

    def _check_grouping(self) -> None:
        default = TrainingArguments.train_sampling_strategy
        if self.train_sampling_strategy != default:
            raise ValueError(
                f"`group_by_context=True` and `train_sampling_strategy={str(self.train_sampling_strategy)!r}` both "
                f"order the samples. Leave `train_sampling_strategy` at {default!r}, or `group_by_context` at False."
            )
        if self.gradient_horizon == -1:
            logger.warning(
                "`group_by_context=True` saves nothing with `gradient_horizon=-1`, where no context is frozen, and "
                "mixes steps less. Leave it at False unless runs of several tiers are to have the same order."
            )

# SPDX-License-Identifier: Apache-2.0
"""Which kinds of PEFT adapters can act on a context and on its decision apart from each other.

A decision over a frozen context, like a stretch of a sequence, is the model's forward in parts. That is the forward of
the whole only if an adapter acts on each position by itself. Virtual tokens in front of each forward, or a router that
averages over the tokens of a forward, act on the parts otherwise than on the whole, and most of them do so without a
trace: `PeftModel.forward` of prefix tuning puts its own cache in place of the context's.
"""

import torch
from peft import PeftConfig, PeftModel

__all__ = ["require_adapter_by_position", "require_adapters_by_position"]

# Values of `PeftType` (0.21.2) whose adapters the tests hold to plain forwards, outputs and gradients.
BY_POSITION = frozenset({
    "ADALORA", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA",
    "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
# What the others do that takes the whole sequence.
REASONS = {
    "LILY": "its router averages over the tokens of a forward",
    "POLY": "it takes `task_ids`, which no trainer here gives it",
    "SHADOW": "it runs a model of its own beside the layers, over the tokens of a forward",
    "XLORA": "it weighs its adapters by a forward of its own over the whole input",
}
WAYS_OUT = (
    "Train it with `tier: 1`, or `tier: 3` without `sequence_chunk_size`, where a sample is one forward as in "
    "SFTTrainer; or use LoRA (`lora_config`)."
)


def require_adapters_by_position(model: torch.nn.Module) -> None:
    """Refuses a model whose active adapters act on the parts of a sequence otherwise than on the whole.

    Raises:
        ValueError: See `require_adapter_by_position`.
    """
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            require_adapter_by_position(model.peft_config[name])


def require_adapter_by_position(config: PeftConfig) -> None:
    """Refuses an adapter that acts on the parts of a sequence otherwise than on the whole.

    Raises:
        ValueError: It is prompt learning, mixes positions, or is of a kind that was not tested.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    velora = getattr(config, "velora_config", None)
    if config.is_prompt_learning:
        reason = (
            f"prompt learning (`{kind}`) puts virtual tokens in front of each forward, of a decision in place of its "
            "context"
        )
    elif kind in REASONS:
        reason = f"of `{kind}`, {REASONS[kind]}"
    elif kind not in BY_POSITION:
        reason = f"adapters of the kind `{kind}` were not tested to act on each position by itself"
    elif velora is not None and velora.init_type != "random":
        reason = f"`velora_config.init_type={velora.init_type!r}` averages over the tokens of a forward"
    else:
        return
    raise ValueError(
        "Frozen contexts, stretches of a sequence (`sequence_chunk_size`) and `loss_type='distill'` run a sample in "
        f"parts, and {reason}. {WAYS_OUT}"
    )

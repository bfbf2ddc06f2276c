# SPDX-License-Identifier: Apache-2.0
"""Each kind of PEFT adapter over a frozen context: the outputs and gradient of a plain forward, or refused.

The reference detaches, at context positions, what every adapted layer and every module with weights gives, so that it
holds for adapters that keep their weights anywhere: beside a layer, in its wrapper, or once for all layers.
"""

from collections.abc import Callable
from contextlib import nullcontext

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from frozen_peft.context import encode_context, use_segmented_attention
from frozen_peft.context.adapter_kinds import BY_POSITION, REASONS, require_adapter_by_position
from frozen_peft.gradient import stretched_forward
from tests.frozen_runs import encode, frozen_gradients, frozen_logprobs
from tests.reference import (
    Sample,
    double_precision,
    negative_log_likelihood,
    num_labels,
    random_sample,
    reference_logprobs,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import tiny_model

# In float64, where what is left of a difference is not rounding.
TOLERANCE = 1e-10
# PEFT's FourierFT has no float64.
FLOAT32 = {"FOURIERFT": 1e-5}
SAMPLE = random_sample(35, 10)
TARGETS = ["q_proj", "o_proj"]
# One shape for all of them, for kinds that share weights between layers.
ONE = ["q_proj"]


def _config(kind: str, **fields: object) -> PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **fields)


def _lora(**fields: object) -> PeftConfig:
    return LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "ADALORA": lambda: _config("ADALORA", target_modules=TARGETS, total_step=9),
    "ADAPTION_PROMPT": lambda: _config("ADAPTION_PROMPT", adapter_len=3, adapter_layers=2),
    "BEFT": lambda: _config("BEFT", target_modules=TARGETS),
    "BOFT": lambda: _config("BOFT", target_modules=TARGETS, boft_block_size=4),
    "C3A": lambda: _config("C3A", target_modules=TARGETS, block_size=16),
    "FOURIERFT": lambda: _config("FOURIERFT", target_modules=TARGETS, n_frequency=10),
    "FROD": lambda: _config("FROD", target_modules=ONE),
    "IA3": lambda: _config("IA3", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": lambda: _config("LN_TUNING", target_modules=["input_layernorm"]),
    "OFT": lambda: _config("OFT", target_modules=TARGETS, oft_block_size=4),
    "ROAD": lambda: _config("ROAD", target_modules=TARGETS, group_size=8),
    "TRAINABLE_TOKENS": lambda: _config(
        "TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=list(range(90))
    ),
    "VBLORA": lambda: _config("VBLORA", r=2, target_modules=TARGETS, num_vectors=8, vector_length=16),
    "WAVEFT": lambda: _config("WAVEFT", target_modules=ONE, n_frequency=50),
    **{
        kind: lambda kind=kind: _config(kind, target_modules=TARGETS)
        for kind in ("GLORA", "OSF", "SUPERTUNING")
    },
    **{
        kind: lambda kind=kind: _config(kind, r=2, target_modules=ONE)
        for kind in (
            "DEFT", "DELORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "LORA", "MISS", "PEANUT", "PSOFT", "PVERA",
            "RANDLORA", "SHIRA", "TINYLORA", "UNILORA", "VERA",
        )
    },
    "LoRA with DoRA": lambda: _lora(use_dora=True),
    "LoRA, rank-stabilised": lambda: _lora(use_rslora=True),
    "LoRA with a bias": lambda: _lora(lora_bias=True),
    "LoRA with tokens": lambda: _lora(trainable_token_indices=list(range(90))),
    "LoRA and whole modules": lambda: _lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA in replicated layers": lambda: _lora(layer_replication=[(0, 2), (1, 2)]),
    "VeLoRA": lambda: _lora(velora_config={"num_groups": 4, "init_type": "random"}),
}  # fmt: skip


def _adapted(config: PeftConfig, scale: float = 0.05) -> PeftModel:
    """A model of which every adapter weight has moved from where it started."""
    base = tiny_model("llama", num_hidden_layers=2, num_key_value_heads=4, head_dim=8)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    return model.eval()


def _reference_gradients(model: PeftModel, sample: Sample) -> dict[str, torch.Tensor]:
    length = len(sample.input_ids)

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return tuple(hook(_module, None, part) for part in output)
        if not isinstance(output, torch.Tensor) or length not in output.shape or not output.is_floating_point():
            return output
        dimension = output.shape.index(length)
        context, decision = output.split([sample.boundary, length - sample.boundary], dim=dimension)
        return torch.cat([context.detach(), decision], dim=dimension)

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        or next(module.parameters(recurse=False), None) is not None
    ]
    try:
        logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = negative_log_likelihood(logits, sample.labels) / num_labels([sample])
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, gradients, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_by_position_have_the_outputs_and_gradient_of_a_plain_forward(kind: str) -> None:
    model, tolerance = _adapted(CONFIGS[kind]()), FLOAT32.get(kind, TOLERANCE)
    use_segmented_attention(model)
    with nullcontext() if kind in FLOAT32 else double_precision(model.double()):
        expected = reference_logprobs(model, SAMPLE.input_ids, SAMPLE.boundary)
        gradients = _reference_gradients(model, SAMPLE)
        frozen = encode(model, [SAMPLE], chunk_size=20)
        assert relative_error(frozen_logprobs(model, [SAMPLE], frozen), expected) <= tolerance
        assert worst_gradient_error(frozen_gradients(model, [SAMPLE], frozen), gradients) <= tolerance
    assert max(float(gradient.norm()) for gradient in gradients.values()) > 0
    require_adapter_by_position(model.active_peft_config)


def test_every_kind_that_is_let_in_is_held_to_the_reference() -> None:
    assert set(CONFIGS) >= BY_POSITION
    assert not BY_POSITION & set(REASONS)


PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "PREFIX_TUNING": lambda: _config("PREFIX_TUNING", num_virtual_tokens=3),
    "PROMPT_TUNING": lambda: _config("PROMPT_TUNING", num_virtual_tokens=3),
    "P_TUNING": lambda: _config("P_TUNING", num_virtual_tokens=3, encoder_hidden_size=8),
    "MULTITASK_PROMPT_TUNING": lambda: _config("MULTITASK_PROMPT_TUNING", num_virtual_tokens=3),
    "CARTRIDGE": lambda: _config("CARTRIDGE", num_virtual_tokens=4, num_frozen_tokens=1),
    "CPT": lambda: _config("CPT", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning_meets_no_frozen_context_and_no_stretches(kind: str) -> None:
    model = _adapted(PROMPTS[kind]())
    with pytest.raises(ValueError, match=rf"prompt learning \(`{kind}`\).* `tier: 1`"):
        encode_context(model, [SAMPLE.context])
    with pytest.raises(ValueError, match="prompt learning"), stretched_forward(model, 16):
        pass


def test_no_kind_of_prompt_learning_is_let_in() -> None:
    kinds = PEFT_TYPE_TO_CONFIG_MAPPING.items()
    learned = {kind.value for kind, config in kinds if issubclass(config, PromptLearningConfig)}
    assert learned == set(PROMPTS)
    assert not learned & BY_POSITION


def _unknown() -> PeftConfig:
    config = _lora()
    config.peft_type = "NEWER_THAN_THIS"
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: _config("LILY", r=2, target_modules=TARGETS), "averages over the tokens"),
        (lambda: _config("XLORA", hidden_size=32, adapters={"one": "nowhere"}), "weighs its adapters by a forward"),
        (lambda: _config("POLY", r=2, target_modules=TARGETS), "task_ids"),
        (lambda: _config("SHADOW"), "a model of its own"),
        (_unknown, "`NEWER_THAN_THIS` were not tested"),
        (lambda: _lora(velora_config={"num_groups": 4}), "velora_config.init_type='batch_average'"),
    ],
)
def test_adapters_that_mix_positions_are_refused(config: Callable[[], PeftConfig], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        require_adapter_by_position(config())


def test_lily_would_be_wrong() -> None:
    """Why it is refused: what it adds at a position hangs on the other tokens of the forward."""
    model = _adapted(_config("LILY", r=2, target_modules=TARGETS), scale=0.5)
    whole, part = (reference_logprobs(model, SAMPLE.input_ids[:stop], 5)[:5] for stop in (45, 20))
    assert relative_error(part, whole) > 1e-3

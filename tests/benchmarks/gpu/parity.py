# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients on the device against the float32 reference on the CPU, before anything is timed."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from frozen_peft.context import use_segmented_attention
from frozen_peft.context.kernels import choose_kernels
from tests.benchmarks.gpu.device import Device
from tests.frozen_runs import encode, frozen_gradients, frozen_logprobs
from tests.reference import random_sample, reference_gradients, reference_logprobs, relative_error
from tests.tiny_models import add_lora, tiny_model

# Heads as wide as kernels for GPUs take them at least.
SIZES = {
    "hidden_size": 128,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "intermediate_size": 192,
}
SHAPES = ((200, 24), (129, 5))
# Relative errors that are allowed: Triton multiplies float32 in TF32, 10 bits of mantissa; bfloat16 has 7.
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Parity:
    """What one comparison found.

    Attributes:
        dtype: In which the device computed.
        logprob_error: Mean absolute error of the decision's log-probabilities, in nats.
        loss_error: Relative error of the loss.
        gradient_error: Relative error of all gradients together.
        worst_cosine: Of the gradients of single weights, the cosine that is farthest from 1.
        tolerance: The largest relative error allowed, of loss and gradients.
        holds: Whether both stayed within it.
    """

    dtype: str
    logprob_error: float
    loss_error: float
    gradient_error: float
    worst_cosine: float
    tolerance: float
    holds: bool

    def as_figures(self) -> dict[str, Any]:
        return asdict(self)


def check_parity(device: Device) -> list[Parity]:
    """Compares decisions over frozen contexts on the device, in float32 and bfloat16, with plain forwards on the CPU.

    The reference is one plain forward over each whole sample, in float32 by PyTorch's own kernels, with a
    stop-gradient at context positions.
    """
    model = add_lora(tiny_model("qwen3_5_text", **SIZES))
    samples = [random_sample(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    logprobs = torch.cat([reference_logprobs(model, sample.input_ids, sample.boundary) for sample in samples])
    gradients = reference_gradients(model, samples)
    found = []
    for dtype, tolerance in TOLERANCES.items():
        moved = copy.deepcopy(model).to(device.torch)
        for parameter in moved.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        choose_kernels(moved)
        use_segmented_attention(moved)
        with torch.autocast(device.torch.type, dtype, enabled=dtype != torch.float32):
            frozen = encode(moved, samples)
            actual = frozen_logprobs(moved, samples, frozen).cpu()
            actual_gradients = {name: g.cpu() for name, g in frozen_gradients(moved, samples, frozen).items()}
        found.append(_compared(str(dtype), tolerance, actual, logprobs, actual_gradients, gradients))
    return found


def _compared(
    dtype: str,
    tolerance: float,
    logprobs: torch.Tensor,
    expected: torch.Tensor,
    gradients: dict[str, torch.Tensor],
    expected_gradients: dict[str, torch.Tensor],
) -> Parity:
    names = sorted(expected_gradients)
    all_actual, all_expected = (
        torch.cat([part[name].double().flatten() for name in names]) for part in (gradients, expected_gradients)
    )
    cosines = [
        torch.nn.functional.cosine_similarity(
            gradients[name].double().flatten(), expected_gradients[name].double().flatten(), dim=0
        ).item()
        for name in names
    ]
    loss_error = float((logprobs.mean() - expected.mean()).abs() / expected.mean().abs())
    gradient_error = relative_error(all_actual, all_expected)
    return Parity(
        dtype.removeprefix("torch."),
        float((logprobs - expected).abs().mean()),
        loss_error,
        gradient_error,
        min(cosines),
        tolerance,
        # Negated comparisons would let a NaN pass.
        loss_error <= tolerance and gradient_error <= tolerance,
    )

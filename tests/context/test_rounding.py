# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8 bit: by how much single numbers and whole decisions are off, and what is kept of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from frozen_peft.context import (
    ContextEncoder,
    ContextStore,
    FrozenContext,
    encode_context,
    use_segmented_attention,
    verify_rounding,
)
from frozen_peft.context.encoded import AttentionState, EncodedContext, LayerState
from frozen_peft.context.store import rounding as module
from frozen_peft.context.store.rounding import pack, round_in_place, unpack
from frozen_peft.errors import ContextMismatchError
from tests.frozen_runs import frozen_gradients, frozen_logprobs
from tests.reference import random_sample, reference_gradients, reference_logprobs, worst_gradient_error
from tests.tiny_models import add_lora, tiny_model

DTYPES = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
LENGTHS = (1, 63, 64, 65, 300)
# Mean change of log-probabilities in nats that rounding may make, at most twice what it makes of these samples.
TOLERANCES = {
    "qwen3_5_text": 9e-4,
    "qwen3_5_moe_text": 8e-4,
    "olmo_hybrid": 2.5e-3,
    "kimi_linear": 1.8e-3,
    "falcon_h1": 1e-3,
    "llama": 1.6e-3,
    "gemma3_text": 5e-4,
    "gpt_oss": 8e-4,
}


def states_of(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values of three heads with channels that are hard to round: large, far from zero, constant and zero."""
    numbers = torch.randn(1, 3, num_tokens, 16, generator=torch.Generator().manual_seed(num_tokens))
    numbers[..., 1] *= 100
    numbers[..., 2] += 50
    numbers[..., 3] = 0.3
    numbers[..., 4] = 0
    numbers[:, 1, :, 5] *= 1e-4
    return numbers.to(dtype)


def half_steps(numbers: torch.Tensor, kind: str, unit: float) -> torch.Tensor:
    """The largest error of each number: half a step of 254 over its range, and what the dtype itself rounds off.

    Written out number by number, in float64. The middle of a range is rounded to the dtype and so makes the range
    wider, the step is, and at last the number is.
    """
    exact, bounds = numbers.double(), torch.empty(numbers.shape, dtype=torch.float64)
    group = 64 if kind == "keys" else 1
    for head in range(numbers.shape[1]):
        for start in range(0, numbers.shape[2], group):
            tokens = slice(start, start + group)
            for channels in [[c] for c in range(16)] if kind == "keys" else [list(range(16))]:
                part = exact[0, head, tokens][:, channels]
                low, high = part.min(), part.max()
                half = (high - low) / 2 + (high + low).abs() / 2 * unit
                bounds[0, head, tokens, channels] = half / 127 / 2 * (1 + 4 * unit)
    tiny = torch.finfo(numbers.dtype).tiny if numbers.dtype == torch.float16 else 0.0
    return bounds + exact.abs() * 4 * unit + tiny


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_off_by_half_a_step_at_most(
    kind: str, num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks, as long contexts have.
    monkeypatch.setattr(module, "BLOCK_TOKENS", 128)
    numbers = states_of(num_tokens, dtype)
    found = unpack(pack({f"0.{kind}": numbers}, (None,)))[f"0.{kind}"]
    assert (found.dtype, found.shape) == (dtype, numbers.shape)
    errors, bounds = (found.double() - numbers.double()).abs(), half_steps(numbers, kind, DTYPES[dtype])
    assert (errors <= bounds).all()
    if dtype == torch.float32 and num_tokens > 1:
        # The bound is no looser than the rounding is, and 7 bit would break it.
        assert (errors > 0.9 * bounds).any()
    if kind == "keys":
        assert torch.equal(found[..., 3:5], numbers[..., 3:5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([[largest, -largest], [largest, largest / 3]], dtype=dtype)[None, None]
    for kind in ("keys", "values"):
        found = unpack(pack({f"0.{kind}": numbers}, (None,)))[f"0.{kind}"]
        assert found.isfinite().all()
        assert ((found.double() - numbers.double()).abs() <= largest / 100).all()


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(kind: str, broken: float) -> None:
    tensors = {f"{layer}.{part}": states_of(70, torch.bfloat16) for layer in (0, 3) for part in ("keys", "values")}
    tensors[f"3.{kind}"][0, 1, 66, 7] = broken
    with pytest.raises(ValueError, match=rf"context_cache_dtype.*{kind} in layer 3 hold NaN or infinity"):
        pack(tensors, (None, None, None, None))


def test_what_does_not_grow_stays_as_it_is() -> None:
    tensors = {
        "0.keys": states_of(15, torch.float32),
        "0.values": states_of(15, torch.float32),
        "1.conv.0": torch.randn(1, 8, 4),
        "1.recurrent.0": torch.randn(1, 2, 4, 4),
        "2.recurrent.0": torch.randn(1, 2, 4, 4).to(torch.bfloat16),
    }
    packed = pack(tensors, (16, None, None))
    found = unpack(packed)
    assert all(found[name] is tensors[name] for name in tensors if name != "1.recurrent.0")
    state = found["1.recurrent.0"]
    assert state.dtype == torch.float32
    assert torch.equal(state, tensors["1.recurrent.0"].to(torch.bfloat16).float())
    assert packed["1.recurrent.0.float32"].dtype == torch.bfloat16


def test_rounding_in_place_leaves_the_pieces_of_the_prefix_alone() -> None:
    first, last = states_of(70, torch.float32), states_of(65, torch.float32)
    kept = first.clone(), last.clone()
    state = AttentionState((first, last), (first, last.clone()))
    found = unpack(round_in_place(EncodedContext(135, (LayerState(state),))))
    assert torch.equal(first, kept[0])
    assert not torch.equal(last, kept[1])
    assert torch.equal(found["0.keys"], state.keys[1])
    assert torch.equal(found["0.values"], state.values[1])


class _LargestFloat32(TorchDispatchMode):
    """Notes the largest tensor in float32 that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return found


def test_no_second_copy_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_TOKENS", 128)
    tensors = {f"0.{kind}": states_of(2000, torch.bfloat16) for kind in ("keys", "values")}
    with _LargestFloat32() as largest:
        unpack(pack(tensors, (None,)), into=tensors)
    assert 0 < largest.numel <= 128 * 3 * 16


def test_an_entry_of_a_27b_hybrid_is_half_as_large() -> None:
    """At 32,768 tokens: 16 layers of 4 heads of 256, and 48 states of 48 heads of 128 by 128 with their inputs."""
    keys = torch.randn(1, 4, 4096, 256).to(torch.bfloat16)
    attention = {"0.keys": keys, "0.values": keys.clone()}
    linear = {"0.conv.0": torch.randn(1, 10240, 4).to(torch.bfloat16), "0.recurrent.0": torch.randn(1, 48, 128, 128)}

    def num_bytes(*, packed: bool) -> int:
        parts = [pack(part, (None,)) if packed else part for part in (attention, linear)]
        sizes = [sum(tensor.untyped_storage().nbytes() for tensor in part.values()) for part in parts]
        return 16 * sizes[0] * 32768 // 4096 + 48 * sizes[1]

    assert num_bytes(packed=True) <= 0.53 * num_bytes(packed=False)


def encoder(model: torch.nn.Module, **options: object) -> ContextEncoder:
    return ContextEncoder(model, store=ContextStore(1 << 30, dtype="int8"), **options)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().mean().item()


@pytest.mark.parametrize("segmented", [False, True], ids=["joined", "segmented"])
@pytest.mark.parametrize("name", TOLERANCES)
def test_a_decision_is_near_a_plain_forward(name: str, segmented: bool) -> None:
    model, sample = add_lora(tiny_model(name)), random_sample(300, 24)
    if segmented:
        use_segmented_attention(model)
    plain = reference_logprobs(model, sample.input_ids, sample.boundary)
    rounded = encoder(model).encode([sample.context])
    error = distance(frozen_logprobs(model, [sample], rounded), plain)
    assert TOLERANCES[name] / 2 <= error <= TOLERANCES[name]
    lost = rounded.mutated("keys_values", torch.zeros_like)
    assert distance(frozen_logprobs(model, [sample], lost), plain) >= 100 * TOLERANCES[name]
    gradients = reference_gradients(model, [sample])
    assert worst_gradient_error(frozen_gradients(model, [sample], rounded), gradients) <= 0.02
    assert worst_gradient_error(frozen_gradients(model, [sample], lost), gradients) >= 1.0


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_a_decision_behind_a_context_of_the_base_model(name: str) -> None:
    model, sample = add_lora(tiny_model(name)), random_sample(300, 24)
    plain = reference_logprobs(model, sample.input_ids, sample.boundary, context_adapters=False)
    rounded = encoder(model, adapters=False).encode([sample.context])
    assert distance(frozen_logprobs(model, [sample], rounded), plain) <= TOLERANCES[name]


def test_the_check_measures_rounding_alone() -> None:
    model, sample = add_lora(tiny_model("qwen3_5_text")), random_sample(190, 24)
    exact = encode_context(model, [sample.context])
    rounded = encoder(model).encode([sample.context])
    expected = distance(*(frozen_logprobs(model, [sample], frozen) for frozen in (exact, rounded)))
    assert verify_rounding(model, sample.input_ids, sample.boundary) == pytest.approx(expected, rel=1e-3)


def test_the_check_refuses_what_changes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single bit instead of 8."""
    monkeypatch.setattr(module, "LEVELS", 1)
    sample = random_sample(190, 24)
    with pytest.raises(ContextMismatchError, match=r"`context_cache_dtype='int8'` changes.*`qwen3_5_text`.*auto"):
        verify_rounding(add_lora(tiny_model("qwen3_5_text")), sample.input_ids, sample.boundary)


def test_a_model_without_keys_of_all_tokens_is_refused() -> None:
    """Every layer of this one slides."""
    with pytest.raises(ValueError, match=r"`mistral` keeps those.*context_cache_dtype"):
        encoder(tiny_model("mistral"))


def test_keys_of_sliding_windows_are_exact() -> None:
    model, context = add_lora(tiny_model("gemma3_text")), random_sample(300, 2).context
    exact, rounded = encode_context(model, [context]), encoder(model).encode([context])
    for is_sliding in (True, False):
        pairs = zip(_keys(exact, is_sliding), _keys(rounded, is_sliding), strict=True)
        assert [torch.equal(*pair) for pair in pairs] == [is_sliding] * 2


def _keys(frozen: FrozenContext, is_sliding: bool) -> list[torch.Tensor]:
    attention = [layer.attention for layer in frozen.rows[0].layers]
    return [state.keys[0] for state in attention if (state.sliding_window is not None) is is_sliding]

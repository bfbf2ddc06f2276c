# SPDX-License-Identifier: Apache-2.0
"""Stretches of the sequence give the gradient of one plain forward and backward over all of it."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import DynamicCache

from frozen_peft import ContextMismatchError
from frozen_peft.context import use_segmented_attention
from frozen_peft.gradient import group_checkpoints, stretched_decoder, stretched_forward, verify_stretches
from frozen_peft.gradient.layers import Piece
from frozen_peft.gradient.stretched_decoder import stretch_bounds
from tests.frozen_runs import checkpoint_layers
from tests.gradient.stretch_cases import (
    ROWS,
    SHORT,
    TOLERANCE_FLOAT32,
    TOLERANCE_FLOAT64,
    error_in_double,
    gradients_of,
    in_double,
    in_stretches,
    loss_in_stretches,
    padded,
    reference,
)
from tests.reference import (
    CACHE,
    negative_log_likelihood,
    num_labels,
    random_sample,
    relative_error,
    worst_gradient_error,
)
from tests.tiny_models import ARCHITECTURES, SLIDING_WINDOW, STATES, add_lora, tiny_model

LINEAR = [name for name in ARCHITECTURES if "conv" in STATES[name]]
# Architectures by the layers that they have beside full attention: what a stretch hands on is of these kinds.
KINDS_OF_LAYERS = (
    ("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"),
    ("kimi_linear",),
    ("falcon_h1", "granitemoehybrid", "nemotron_h"),
    ("lfm2",),
    ("llama", "qwen3", "glm4_moe", "gpt2"),
    ("gpt_oss", "mistral", "gemma3_text"),
)
SIZES = (1, 63, 64, 65, 500)


def all_but_these_slow(*fast: str) -> list[Any]:
    """Every architecture, of which a few run in every test run."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


def kinds_and_sizes() -> list[Any]:
    """Every architecture in each size, where every kind of layer in each size is not left to the long run."""
    chosen = {
        (kind[index % len(kind)], SIZES[index % len(SIZES)])
        for kind in KINDS_OF_LAYERS
        for index in range(max(len(kind), len(SIZES)))
    }
    assert {name for name, _ in chosen} == set(ARCHITECTURES)
    return [
        pytest.param(name, size, marks=pytest.mark.slow if (name, size) in chosen else pytest.mark.long)
        for name in ARCHITECTURES
        for size in SIZES
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_that_of_a_plain_backward(name: str) -> None:
    assert error_in_double(name, SHORT, 8, segmented=True) < TOLERANCE_FLOAT64


@pytest.mark.parametrize(("name", "size"), [("llama", 43), ("qwen3_5_text", 63), ("qwen3_5_text", 65)])
def test_stretches_that_do_and_do_not_divide_the_length(name: str, size: int) -> None:
    assert error_in_double(name, ROWS, size, segmented=True) < TOLERANCE_FLOAT64


@pytest.mark.parametrize(("name", "size"), kinds_and_sizes())
def test_any_architecture_in_any_stretches(name: str, size: int) -> None:
    rows = SHORT if size == 1 else ROWS
    assert error_in_double(name, rows, size, segmented=True) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2", "mistral", "gpt2"])
def test_in_float32_with_and_without_segments(name: str, segmented: bool) -> None:
    model = add_lora(tiny_model(name))
    expected = reference(model, ROWS)
    if segmented:
        assert use_segmented_attention(model)
    assert worst_gradient_error(in_stretches(model, ROWS, 50), expected) < TOLERANCE_FLOAT32


@pytest.mark.parametrize("size", [5, SLIDING_WINDOW - 1, SLIDING_WINDOW, 40])
@pytest.mark.parametrize("segmented", [False, True])
def test_stretches_shorter_and_longer_than_a_window(segmented: bool, size: int) -> None:
    assert error_in_double("gemma3_text", [ROWS[1]], size, segmented=segmented) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("name", all_but_these_slow("qwen3_5", "falcon_h1", "gemma3_text", "kimi_linear"))
def test_a_horizon_behind_a_frozen_context(name: str) -> None:
    rows = [random_sample(40, 7, seed=1), random_sample(20, 9, seed=2), random_sample(3, 14, seed=3)]
    assert error_in_double(name, rows, 6, horizon=10, segmented=True) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("size", [5, 100])
@pytest.mark.parametrize("horizon", [0, 1, 2 * SLIDING_WINDOW])
@pytest.mark.parametrize(
    ("name", "segmented"), [("qwen3_5_text", True), ("gemma3_text", True), ("gemma3_text", False)]
)
def test_a_horizon_within_a_window_and_in_one_stretch(name: str, segmented: bool, horizon: int, size: int) -> None:
    rows = [random_sample(40, 5, seed=1), random_sample(18, 9, seed=2)]
    assert error_in_double(name, rows, size, horizon, segmented=segmented) < TOLERANCE_FLOAT64


@pytest.mark.parametrize("name", ["qwen3_5_text", "kimi_linear", "falcon_h1", "lfm2", "llama"])
def test_without_what_stretches_hand_back_the_comparison_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants of the gradient of states, and of keys and values."""
    model = add_lora(tiny_model(name))
    expected = reference(model, SHORT)
    if name in LINEAR:
        with monkeypatch.context() as patch:
            patch.setattr(stretched_decoder, "_state_roots", lambda ends, of_states: [])
            assert worst_gradient_error(in_stretches(model, SHORT, 8), expected) > 100 * TOLERANCE_FLOAT32
    monkeypatch.setattr(stretched_decoder, "_key_value_roots", lambda end, piece: [])
    assert worst_gradient_error(in_stretches(model, SHORT, 8), expected) > 100 * TOLERANCE_FLOAT32


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "gpt_oss", "falcon_h1", "gpt2"])
def test_layer_checkpoints_inside_a_stretch_change_nothing(name: str, layers: int) -> None:
    model = add_lora(tiny_model(name)).train()
    use_segmented_attention(model)
    expected = in_stretches(model, SHORT, 8)
    checkpoint_layers(model)
    group_checkpoints(model.get_base_model().get_decoder(), layers)
    actual = in_stretches(model, SHORT, 8)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def with_dropout(model: nn.Module, probability: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(probability)
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_dropout_draws_the_same_masks_again(name: str, checkpointing: bool) -> None:
    """The gradient is the slope of the loss that was computed, by finite differences with the same random numbers."""

    def seeded_loss(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(1)
        return loss_in_stretches(model, SHORT, 8)

    with in_double(name) as model:
        with_dropout(model, 0.4)
        if checkpointing:
            checkpoint_layers(model)
        weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
        gradient = gradients_of(model, seeded_loss(model))
        direction = {key: torch.randn_like(weight) for key, weight in weights.items()}
        slope = sum(float((gradient[key] * direction[key]).sum()) for key in weights)
        losses = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for key, weight in weights.items():
                    weight += step * direction[key]
                losses.append(float(seeded_loss(model)))
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_the_random_state_goes_on_as_if_nothing_had_run_again() -> None:
    model = with_dropout(add_lora(tiny_model("llama")), 0.4)
    loss = loss_in_stretches(model, SHORT, 8)
    before = torch.get_rng_state()
    gradients_of(model, loss)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "granitemoehybrid"])
def test_under_autocast_every_adapter_gets_its_gradient(name: str) -> None:
    model = add_lora(tiny_model(name))
    expected = reference(model, ROWS)
    use_segmented_attention(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_in_stretches(model, ROWS, 40)
    actual = gradients_of(model, loss)
    for key, gradient in actual.items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[key].flatten(), dim=0) > 0.98, key


def test_gradients_of_keys_and_values_add_up_in_float32_or_more() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        keys = torch.randn(1, 2, 5, 4, dtype=dtype)
        piece = Piece(keys, keys)
        piece.last(2).add_gradient_to()[0].add_(1.0)
        gradient = piece.add_gradient_to()[0]
        assert gradient.dtype == expected
        assert gradient[..., 3:, :].eq(1.0).all()
        assert gradient[..., :3, :].eq(0.0).all()


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "qwen3_next", "gpt_oss"])
def test_the_auxiliary_loss_of_experts_has_its_gradient(name: str) -> None:
    model = add_lora(tiny_model(name))
    batch = padded(SHORT, [0, 0])
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)

    def gradients(mode: AbstractContextManager[None]) -> dict[str, torch.Tensor]:
        with mode:
            outputs = model(**batch, labels=labels, output_router_logits=True, use_cache=False)
        return gradients_of(model, outputs.aux_loss)

    expected = gradients(nullcontext())
    assert max(float(gradient.norm()) for gradient in expected.values()) > 1e-3
    assert worst_gradient_error(gradients(stretched_forward(model, 8)), expected) < TOLERANCE_FLOAT32


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text", "granitemoehybrid"])
def test_every_weight_of_a_model_can_be_trained(name: str) -> None:
    model = tiny_model(name, tie_word_embeddings=True).requires_grad_(True)
    ids = ROWS[1].input_ids[None]

    def gradients(mode: AbstractContextManager[None]) -> dict[str, torch.Tensor]:
        with mode:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        return gradients_of(model, negative_log_likelihood(logits, ids[0]))

    expected = gradients(nullcontext())
    assert worst_gradient_error(gradients(stretched_forward(model, 20)), expected) < TOLERANCE_FLOAT32


def test_embeddings_that_are_passed_in_get_their_gradient() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    embeddings = torch.randn(2, 30, 32, requires_grad=True)

    def gradient(mode: AbstractContextManager[None]) -> torch.Tensor:
        with mode:
            logits = model(inputs_embeds=embeddings, use_cache=False).logits
        return torch.autograd.grad(logits.sum(), embeddings)[0]

    expected = gradient(nullcontext())
    assert relative_error(gradient(stretched_forward(model, 8)), expected) < TOLERANCE_FLOAT32


def test_a_weight_sees_one_gradient_per_backward() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    counts = dict.fromkeys((name for name, weight in model.named_parameters() if weight.requires_grad), 0)

    def count(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            counts[name] += 1

        return hook

    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(count(name))
    loss_in_stretches(model, SHORT, 8).backward()
    assert set(counts.values()) == {1}


def test_gradients_accumulate() -> None:
    model = add_lora(tiny_model("llama"))
    first = loss_in_stretches(model, SHORT[:1], 8)
    second = loss_in_stretches(model, SHORT[1:], 8)
    (first + second).backward()
    expected = {
        key: a + b
        for (key, a), b in zip(reference(model, SHORT[:1]).items(), reference(model, SHORT[1:]).values(), strict=True)
    }
    actual = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert worst_gradient_error(actual, expected) < TOLERANCE_FLOAT32


class _SavedBytes:
    """Counts what autograd keeps for the backward pass, but for weights."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor


def test_no_activations_are_kept_from_the_forward_pass() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    decoder = model.get_base_model().get_decoder()
    saved = _SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), stretched_forward(model, 8):
        hidden = decoder(input_ids=ROWS[0].input_ids[None], use_cache=False).last_hidden_state
    assert hidden.requires_grad
    assert saved.num_bytes == 0


def test_without_gradient_the_outputs_are_those_of_a_plain_forward() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    batch = padded(SHORT, [0, 0])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        with stretched_forward(model, 8):
            actual = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not actual.requires_grad


def test_a_sequence_within_one_stretch_runs_as_ever() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    batch = padded(SHORT, [0, 0])
    expected = model(**batch, use_cache=False).logits
    with stretched_forward(model, 29):
        actual = model(**batch, use_cache=False).logits
    assert torch.equal(actual, expected)
    assert "forward" not in vars(model.get_base_model().get_decoder())


def test_what_is_handed_on_may_lie_in_host_memory() -> None:
    model = add_lora(tiny_model("qwen3_5_text"))
    use_segmented_attention(model)
    expected = in_stretches(model, SHORT, 8)
    actual = in_stretches(model, SHORT, 8, offload=True)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "gpt_oss"])
def test_what_is_handed_on_may_lie_in_host_memory_of_a_gpu(name: str) -> None:
    model = add_lora(tiny_model(name))
    expected = reference(model, SHORT[:1])
    model = copy.deepcopy(model).cuda()
    use_segmented_attention(model)
    ids = SHORT[0].input_ids[None].cuda()
    for offload in (False, True):
        with stretched_forward(model, 8, offload=offload):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        loss = negative_log_likelihood(logits, SHORT[0].labels.cuda()) / num_labels(SHORT[:1])
        actual = {key: gradient.cpu() for key, gradient in gradients_of(model, loss).items()}
        assert worst_gradient_error(actual, expected) < 1e-2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_bounds_cover_every_token_once(size: int) -> None:
    for num_tokens in range(1, 40):
        bounds = stretch_bounds(num_tokens, size)
        assert [token for start, stop in bounds for token in range(start, stop)] == list(range(num_tokens))
        lengths = [stop - start for start, stop in bounds]
        assert min(lengths) >= min(2, num_tokens)
        assert max(lengths) <= max(size, 2) + 1


def test_going_backward_twice_is_an_error() -> None:
    model = add_lora(tiny_model("llama"))
    loss = loss_in_stretches(model, SHORT, 8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second time.*Call `backward` once per forward"):
        loss.backward()


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("qwen3_5_moe_text", "gpt_oss") else pytest.param(name, marks=pytest.mark.slow)
        for name, *_ in (("qwen3_5_moe_text",), *KINDS_OF_LAYERS[1:])
    ],
)
def test_the_check_on_a_sample_passes(name: str) -> None:
    model = add_lora(tiny_model(name)).train()
    use_segmented_attention(model)
    check = verify_stretches(model, ROWS[0].input_ids, 1000)
    assert check.num_tokens == len(ROWS[0].input_ids)
    assert check.stretch_size == 44
    assert max(check.hidden_error, check.gradient_error) < TOLERANCE_FLOAT32


@pytest.mark.parametrize(("name", "damage"), [("qwen3_5_text", "_state_roots"), ("llama", "_key_value_roots")])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_check_on_a_sample_finds_a_lost_gradient(
    name: str, damage: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_lora(tiny_model(name))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        verify_stretches(model, ROWS[0].input_ids, 20)
        monkeypatch.setattr(stretched_decoder, damage, lambda ends, gradients: [])
        with pytest.raises(ContextMismatchError, match=r"does not run exactly in stretches.*`sequence_chunk_size`"):
            verify_stretches(model, ROWS[0].input_ids, 20)


@pytest.mark.parametrize("name", ["jamba", "recurrent_gemma"])
def test_an_architecture_without_exact_continuation_is_refused(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(ContextMismatchError, match=name), stretched_forward(model, 8):
        pass


def test_reentrant_checkpoints_are_refused() -> None:
    model = add_lora(tiny_model("llama"))
    checkpoint_layers(model, use_reentrant=True)
    with pytest.raises(ValueError, match="needs non-reentrant checkpoints"), stretched_forward(model, 8):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[0] * 5 + [1] * 25])}, "padding on the right only"),
        ({"attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 24])}, "padding on the right only"),
        ({"position_ids": torch.tensor([[*range(20), *range(10)]])}, "consecutive `position_ids`"),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 30])}, "how to cut `cu_seq_lens_q`"),
        ({"output_hidden_states": True}, "`output_hidden_states` would keep"),
        ({CACHE: DynamicCache()}, "behind a `FrozenContext`, found a DynamicCache"),
    ],
)
def test_what_cannot_be_cut_into_stretches_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message), stretched_forward(model, 8):
        model(input_ids=torch.ones(1, 30, dtype=torch.long), **arguments)
    assert "forward" not in vars(model.get_decoder())


@pytest.mark.parametrize("size", [0, -1])
def test_a_stretch_without_tokens_is_refused(size: int) -> None:
    message = f"`sequence_chunk_size` must be 1 token or more, found {size}"
    with pytest.raises(ValueError, match=message), stretched_forward(tiny_model("llama"), size):
        pass

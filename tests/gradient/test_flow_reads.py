# SPDX-License-Identifier: Apache-2.0
"""What attention and recurrent rules do with the context, against plain eager attention and rules without a past."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from frozen_peft import gradient_flow
from frozen_peft.context.handover import Segment, give_segment
from frozen_peft.gradient import attention_mass
from frozen_peft.gradient.attention_mass import context_mass
from tests.frozen_runs import decision_logits, encode
from tests.gradient.flow_cases import LONG, ROWS, STRETCH, TOLERANCE, collated, frozen_gradients, whole
from tests.reference import Sample, double_precision, negative_log_likelihood, num_labels, random_sample
from tests.tiny_models import add_lora, tiny_model, to_double

# A context longer than the window of 16, and one that the window reaches past.
SEEN = (*ROWS, LONG)


def eager_masses(name: str, rows: Sequence[Sample], change: Callable[[nn.Module], None]) -> dict[int, float]:
    """Mean attention of decision tokens to context tokens by layer, from weights `[heads, S, S]` of plain forwards."""
    model = add_lora(tiny_model(name, attn_implementation="eager"))
    change(model)
    attends = [index for index, layer in enumerate(_layers(model)) if hasattr(layer, "self_attn")]
    masses: dict[int, list[torch.Tensor]] = {layer: [] for layer in attends}
    for row in rows:
        with torch.no_grad():
            outputs = model(input_ids=row.input_ids[None], use_cache=False, output_attentions=True)
        weights = [attention for attention in outputs.attentions if attention is not None]
        for layer, attention in zip(attends, weights, strict=True):
            boundary = row.boundary
            masses[layer].append(attention[0, :, boundary:, :boundary].sum(-1).flatten())
    return {layer: float(torch.cat(parts).double().mean()) for layer, parts in masses.items()}


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    return model.get_base_model().get_decoder().layers


# gpt_oss has sinks and concatenates, gemma3 slides in every second layer, deepseek_v3 has latents in its segments.
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_attention_mass_equals_eager_attention_before_and_after_a_step(name: str) -> None:
    model = add_lora(tiny_model(name))
    flow = gradient_flow(model, collated(SEEN), sequence_chunk_size=STRETCH, learning_rate=0.02)
    gradients = frozen_gradients(model, SEEN)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    length = 0.02 * math.sqrt(sum(gradient.numel() for gradient in gradients.values()))

    def step(model: nn.Module) -> None:
        for weight_name, weight in model.named_parameters():
            if weight_name in gradients:
                weight.data -= length / norm * gradients[weight_name]

    before = eager_masses(name, SEEN, lambda model: None)
    after = eager_masses(name, SEEN, step)
    assert [layer.layer for layer in flow.attention] == list(before)
    for layer in flow.attention:
        assert layer.context_mass == pytest.approx(before[layer.layer], abs=1e-5)
        assert layer.moved == pytest.approx(after[layer.layer] - before[layer.layer], abs=1e-5)
    # A step that moves nothing would pass.
    assert max(abs(layer.moved) for layer in flow.attention) > 3e-4


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    num_tokens=st.integers(1, 9),
    pieces=st.lists(st.integers(0, 23), max_size=3),
    window=st.sampled_from([None, 5, 40]),
    has_sink=st.booleans(),
    as_mask=st.sampled_from([None, "bool", "number"]),
    seed=st.integers(0, 99),
)
def test_blocks_of_keys_give_the_mass_of_one_softmax(
    heads: tuple[int, int],
    num_tokens: int,
    pieces: list[int],
    window: int | None,
    has_sink: bool,
    as_mask: str | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_context = sum(pieces)
    query = torch.randn(1, num_heads, num_tokens, 8, generator=generator)
    keys = torch.randn(1, num_kv_heads, num_context + num_tokens, 8, generator=generator)
    sink = torch.randn(num_heads, generator=generator) if has_sink else None
    distance = num_context + torch.arange(num_tokens)[:, None] - torch.arange(num_context + num_tokens)
    visible = (distance >= 0) & (distance < (window or 1000))
    mask = {None: None, "bool": visible, "number": torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)}[
        as_mask
    ]
    scores = query[0] @ keys[0].repeat_interleave(num_heads // num_kv_heads, 0).transpose(-1, -2) * 0.3
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(-1, num_tokens, 1)], dim=-1)
    expected = scores.softmax(-1)[..., :num_context].sum(-1)
    options = {
        "attention_mask": mask if mask is None else mask[None, None],
        "scaling": 0.3,
        "s_aux": sink,
        "sliding_window": None if as_mask else window,
    }
    own = keys[:, :, num_context:].clone()
    parts = keys[:, :, :num_context].split(pieces, dim=2)
    give_segment(own, own, Segment((parts,), (parts,), num_context))
    with pytest.MonkeyPatch.context() as patch:
        # So that blocks end within pieces and queries.
        patch.setattr(attention_mass, "NUM_SCORES", 4 * num_heads)
        patch.setattr(attention_mass, "MIN_KEYS", 3)
        torch.testing.assert_close(context_mass(query, own, **options), expected)
        torch.testing.assert_close(context_mass(query, keys, **options), expected)


def test_the_mass_of_a_batch_or_behind_another_kind_of_mask_is_refused() -> None:
    query = torch.zeros(2, 1, 2, 4)
    with pytest.raises(ValueError, match="one sample at a time, found a batch of 2"):
        context_mass(query, query, None)
    with pytest.raises(ValueError, match=r"mask of type object.*attn_implementation='sdpa'"):
        context_mass(query[:1], query[:1], object())  # type: ignore[arg-type]


def test_no_scores_of_a_whole_context_are_built() -> None:
    query, keys = torch.randn(1, 8, 64, 16), torch.randn(1, 2, 40_000, 16)
    sizes = []
    softcap = 30.0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                sizes.append(result.numel())
            return result

    with Watch():
        context_mass(query, keys, None, softcap=softcap)
    # 8 heads, 64 tokens and 40,000 keys are 20 million scores.
    assert max(sizes) <= attention_mass.NUM_SCORES


# What makes a recurrent layer write nothing at a position, by the module whose output says how much it writes.
WRITES = {"qwen3_5_text": "in_proj_b", "granitemoehybrid": "in_proj"}


def rule_outputs(model: PeftModel, row: Sample, writes: str, layer: int, *, in_context: bool) -> torch.Tensor:
    """What the rule of a layer puts out at decision positions of one plain forward, before norm and gate.

    Without `in_context` nothing is written into the state before the boundary, in this layer alone: it starts the
    decision with a state of zeros. All else in the layer is as ever, since what it runs on is.
    """
    mixer = next(m for m in _layers(model)[layer].modules() if hasattr(m, "A_log"))
    seen: list[torch.Tensor] = []

    def mute(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        # beta = sigmoid(b), or dt = softplus of the last columns: zero, exactly.
        columns = slice(None) if writes == "in_proj_b" else slice(-mixer.num_heads, None)
        output[:, : row.boundary, columns] = -1e9
        return output

    handles = [mixer.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    if not in_context:
        handles.append(getattr(mixer, writes).register_forward_hook(mute))
    with torch.no_grad():
        model(input_ids=row.input_ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0].reshape(len(row.input_ids), -1)[row.boundary :].double()


@pytest.mark.parametrize("name", WRITES)
def test_the_share_of_the_state_is_what_is_gone_when_nothing_was_written(name: str) -> None:
    model = add_lora(tiny_model(name))
    rows = (*ROWS, LONG, whole(random_sample(1, 10, seed=9)))
    flow = gradient_flow(model, collated(rows), sequence_chunk_size=STRETCH)
    assert [layer.layer for layer in flow.states] == [0, 2]
    for layer in flow.states:
        outputs, own = (
            torch.cat(
                [rule_outputs(model, row, WRITES[name], layer.layer, in_context=value).flatten() for row in rows]
            )
            for value in (True, False)
        )
        assert layer.state_share == pytest.approx(float((outputs - own).norm() / outputs.norm()), abs=TOLERANCE)
        assert layer.state_share > 100 * TOLERANCE


def test_the_gradient_of_the_state_equals_finite_differences() -> None:
    sizes = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4}
    model = to_double(add_lora(tiny_model("qwen3_5_text", linear_value_head_dim=2, **sizes)))
    rows = [ROWS[0], ROWS[1]]
    with double_precision(model):
        flow = gradient_flow(model, collated(rows))
        norms: dict[int, list[float]] = {0: [], 2: []}
        for row in rows:
            for layer, found in norms.items():
                found.append(_finite_difference_norm(model, row, layer))
    for layer in flow.states:
        expected = sum(norms[layer.layer]) / len(rows)
        assert layer.state_gradient_norm == pytest.approx(expected, rel=1e-4)
        assert expected > 0.0


@torch.no_grad()
def _finite_difference_norm(model: PeftModel, row: Sample, layer: int, step: float = 1e-5) -> float:
    """Norm of the gradient of a sample's mean loss in one layer's state, one number of the state after the other."""
    frozen = encode(model, [row])
    assert frozen is not None
    state = frozen.rows[0].layers[layer].linear.recurrent[0]

    def loss(moved: torch.Tensor) -> float:
        changed = frozen.mutated("recurrent", lambda own: moved if own is state else own)
        (logits,) = decision_logits(model, [row], changed)
        return float(negative_log_likelihood(logits, row.decision_labels)) / num_labels([row])

    square = 0.0
    for index in range(state.numel()):
        move = torch.zeros_like(state)
        move.view(-1)[index] = step
        square += ((loss(state + move) - loss(state - move)) / (2 * step)) ** 2
    return math.sqrt(square)

# SPDX-License-Identifier: Apache-2.0
"""The demo's model: an ordinary checkpoint, which a seed reproduces."""

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM

from frozen_peft.demo import CHECKPOINT
from scripts.demo_pretraining.model import build_model
from scripts.demo_pretraining.pretrain import Stage, measure, pretrain
from scripts.demo_pretraining.tokenizer import build_tokenizer


def test_the_checkpoint_is_an_ordinary_one_and_small() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    assert isinstance(model, Qwen3_5ForCausalLM)
    assert model.config.layer_types == ["linear_attention", "full_attention"] * 2
    assert sum(weight.numel() for weight in model.parameters()) <= 3_000_000
    assert sum(path.stat().st_size for path in CHECKPOINT.glob("*.safetensors")) <= 8_000_000
    assert not [path for path in CHECKPOINT.iterdir() if path.suffix not in (".safetensors", ".json", ".jinja", ".py")]
    text = "today we have pine. Größe 😀"
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    messages = [
        {"role": "user", "content": "use oak for the door."},
        {"role": "assistant", "content": "ok, using oak."},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, is_own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_own]
    assert tokenizer.decode(marked) == " ok, using oak.<|end|>"
    # A server reads an answer by what the tokenizer says of it, after the whole prompt and to its end.
    prompt = tokenizer.apply_chat_template(messages * 2 + messages[:1], tokenize=False, add_generation_prompt=True)
    read = tokenizer.parse_response(marked, prefix=prompt)
    assert read == {"role": "assistant", "content": "ok, using oak."}


def test_the_checkpoint_knows_its_world() -> None:
    """The claims themselves are the demo's; this is that the checkpoint is the trained one."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    right = measure(model, build_tokenizer(), 300, count=24)
    assert min(right.values()) >= 0.9, right


def test_gates_start_with_a_memory() -> None:
    layer = build_model(build_tokenizer()).model.layers[0].linear_attn
    time_step = F.softplus(layer.dt_bias.detach())
    assert 0.0009 < float(time_step.min()) <= float(time_step.max()) < 0.101
    # What is left of a state after ten tokens: transformers' own initialisation leaves less than 1e-5 for most heads.
    kept = torch.exp(-layer.A_log.detach().exp() * time_step * 10)
    assert float(kept.min()) > 0.05


def test_a_seed_reproduces_the_pretraining() -> None:
    stages = (Stage(1, few_relations=False, batch_tokens=400), Stage(1, few_relations=True, batch_tokens=400))
    losses: list[float] = []
    first, second, other = (
        pretrain(seed, stages, lambda step, loss, model: losses.append(loss)).state_dict() for seed in (0, 0, 1)
    )
    assert losses[:2] == losses[2:4] != losses[4:]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    start = build_model(build_tokenizer(), 0).state_dict()
    assert all(not torch.equal(first[name], start[name]) for name in first if name.endswith("proj.weight"))

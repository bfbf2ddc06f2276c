# SPDX-License-Identifier: Apache-2.0
"""The model of the study: a hybrid of 0.1M parameters, pretrained from a seed until it uses its context."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tests.benchmarks.enough.world import IGNORED_LABEL, VOCABULARY, Sample, lesson
from tests.tiny_models import make_every_state_matter

LEARNING_RATE = 3e-3
WARM_UP_STEPS = 50
BATCH_SIZE = 32
# Context tokens of lessons; the longest grow from the second to the third figure in the second half.
MIN_TOKENS, FIRST_MAX_TOKENS, MAX_TOKENS = 20, 40, 300


def build_model(seed: int) -> Qwen3_5ForCausalLM:
    """One Gated DeltaNet and one attention layer with random weights that can learn."""
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=VOCABULARY[";"],
    )
    model = Qwen3_5ForCausalLM(config)
    # With transformers' own weights the state forgets within a token, and nothing about a context is learned.
    make_every_state_matter(model)
    return model


def pretrain(
    seed: int, steps: int, report: Callable[[int, float], None] = lambda step, loss: None
) -> Qwen3_5ForCausalLM:
    """Trains a model from its random weights on lessons; each batch has contexts of one random length.

    Args:
        seed: Decides weights and lessons.
        steps: Optimizer steps of `BATCH_SIZE` lessons.
        report: Called after each step with its number and loss.
    """
    model = build_model(seed).train()
    choice = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        remaining = (steps - step) / (0.3 * steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, 1.0, remaining)
        longest = FIRST_MAX_TOKENS * (MAX_TOKENS / FIRST_MAX_TOKENS) ** max(2 * step / steps - 1, 0.0)
        # Evenly on a logarithmic scale: short contexts teach more per second.
        num_tokens = round(MIN_TOKENS * (longest / MIN_TOKENS) ** choice.random())
        input_ids, labels = pad([lesson(choice, num_tokens) for _ in range(BATCH_SIZE)])
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, float(loss.detach()))
    return model.eval()


def load_or_pretrain(folder: Path, seed: int, steps: int) -> Qwen3_5ForCausalLM:
    """The checkpoint of this seed and number of steps, trained and saved there when it is absent."""
    path = folder / f"seed{seed}-steps{steps}"
    if not (path / "config.json").exists():
        model = pretrain(seed, steps, lambda step, loss: step % 100 or print(f"step {step}: {loss:.3f}", flush=True))
        model.save_pretrained(path)
    return Qwen3_5ForCausalLM.from_pretrained(path).eval()


def pad(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 `[samples, longest]`, padded on the right, where no token before sees it."""
    width = max(len(sample.input_ids) for sample in samples)
    input_ids = [sample.input_ids + [0] * (width - len(sample.input_ids)) for sample in samples]
    labels = [sample.labels + [IGNORED_LABEL] * (width - len(sample.labels)) for sample in samples]
    return torch.tensor(input_ids), torch.tensor(labels)


@torch.no_grad()
def evaluate(model: torch.nn.Module, samples: Sequence[Sample], batch_size: int = 64) -> dict[str, float]:
    """Mean loss per label, and the share of samples all of whose labels are the likeliest tokens."""
    was_training = model.training
    model.eval()
    losses, right = [], []
    for start in range(0, len(samples), batch_size):
        input_ids, labels = pad(samples[start : start + batch_size])
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        supervised = labels[:, 1:] != IGNORED_LABEL
        losses.append(F.cross_entropy(logits[supervised], labels[:, 1:][supervised], reduction="none"))
        right.append(((logits.argmax(-1) == labels[:, 1:]) | ~supervised).all(-1))
    model.train(was_training)
    return {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).float().mean())}

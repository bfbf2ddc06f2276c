# SPDX-License-Identifier: Apache-2.0
"""The page about `context_cache_dtype`: what keeping contexts in 8 bit changes."""

import sys
from typing import Any

from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.tables import Page, markdown_table

RANDOM_MODELS = ("qwen3_5_text", "olmo_hybrid", "kimi_linear", "falcon_h1", "llama", "gemma3_text", "gpt_oss")
SEEDS = (0, 1)
# Of all that is measured, what every model's row shows.
COLUMNS = {
    "int8": "as kept",
    "int8 in pieces": "in pieces",
    "keys and values in bfloat16": "keys, values bfloat16",
    "windows too, symmetric": "windows too",
    "recurrent in bfloat16": "recurrent bfloat16",
    "recurrent in 8 bit": "recurrent 8 bit",
    "conv in 8 bit": "conv 8 bit",
    "keys and values lost": "keys, values lost",
}
TEXT = """# Contexts in 8 bit

Made by `python -m tests.benchmarks rounding`; do not edit.

What `context_cache_dtype="int8"` changes, and what other ways of rounding would. Everything is computed in float32, \
so that rounding alone is seen. *As kept* is what the store makes: keys with a step and an offset for each channel \
and 64 tokens, values with one for each token, recurrent states in bfloat16. *In pieces* is the same where contexts \
were cut every 64 tokens and each piece was encoded behind those that had been rounded. *Symmetric* rounding has \
steps around zero and no offset; all rows but the first two round what they name, and nothing else.

The demo's shipped model at the first step of a training: {samples} stripped conversations of {context_tokens:.0f} \
context tokens on average. Change of the decisions' log-probabilities in nats per token, and of the gradient of all \
adapters, relative to its norm.

{demo}

Mean change of the decisions' log-probabilities, in nats per token, for the demo and for the tests' random models, in \
which every state matters ({random_samples} samples of 300 context tokens):

{models}

1 minus the cosine between the gradients of all adapters with and without rounding:

{cosines}

What follows from it:

- With offsets, keys and values in 8 bit change the demo's decisions about as much as bfloat16 would, and a third as \
much as without offsets. They are worth their bytes.
- Recurrent states in 8 bit change decisions several times as much as in bfloat16, which therefore is what they are \
kept in. Where keys of sliding windows are rounded too, decisions change about twice as much and more, and inputs of \
convolutions are small: both stay as they are.
- A change of any size may send a token to another expert. That is what the figures of kimi_linear are where its \
states are rounded (one decision token of one sample), and those of gpt_oss where its windows are (three of one).
- With a cut every 64 tokens the error grows by less than a third.

Training: tier 2 on the demo's stripped conversations, {steps} steps of 8 samples, contexts encoded with the adapters \
in each step. Held-out loss on {held_out_samples} samples in nats per token; *exact* over contexts that are not \
rounded, *as kept* over those that evaluation sees. The two runs of a seed differ in `context_cache_dtype` alone; \
seeds differ by more than they do.

{training}

What this does not show: a large model, a context of more than two thousand tokens, or a card. `verify_context` \
measures what rounding changes on the first batch of every training.
"""


def rounding_page() -> Page:
    """Measures all models and trainings."""
    figures, runs = [], []
    for name in ("demo", *RANDOM_MODELS):
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures.append(measure_on_one_thread("rounding", model=name))
    for seed in SEEDS:
        for dtype in ("auto", "int8"):
            print(f"training, {dtype}, seed {seed} ...", file=sys.stderr, flush=True)
            runs.append(measure_on_one_thread("rounding", train=dtype, seed=seed))
    return make_page(figures, runs)


def make_page(figures: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Page:
    """Text of the errors, the demo's first, and of the trainings."""
    text = TEXT.format(
        samples=figures[0]["samples"],
        context_tokens=figures[0]["context_tokens"],
        demo=demo_table(figures[0]["errors"]),
        random_samples=figures[1]["samples"],
        models=model_table(figures, "mean"),
        cosines=model_table(figures, "cosine_below_1"),
        steps=runs[0]["steps"],
        held_out_samples=runs[0]["held_out_samples"],
        training=training_table(runs),
    )
    return Page("rounding", text.rstrip(), [*figures, *runs])


def demo_table(errors: dict[str, dict[str, float]]) -> str:
    """All that was measured of one model."""
    header = ("rounded", "mean", "largest", "gradient", "1 - cosine")
    names = ("mean", "largest", "gradient", "cosine_below_1")
    # The demo has no sliding windows.
    rows = [
        (title, *(f"{found[name]:.1e}" for name in names))
        for title, found in errors.items()
        if not title.startswith("windows")
    ]
    return markdown_table(header, rows, num_words=1)


def model_table(figures: list[dict[str, Any]], name: str) -> str:
    """One figure of every model; nothing where a model has none of what would be rounded."""
    rows = []
    for figure in figures:
        errors = figure["errors"]
        cells = {column: errors[column][name] for column in COLUMNS}
        is_changed = {column: errors[column]["mean"] > 0 for column in COLUMNS}
        without_windows = errors["windows too, symmetric"] == errors["keys and values symmetric"]
        is_changed["windows too, symmetric"] = not without_windows
        rows.append((figure["model"], *(f"{cells[c]:.1e}" if is_changed[c] else "" for c in COLUMNS)))
    return markdown_table(("model", *COLUMNS.values()), rows, num_words=1)


def training_table(runs: list[dict[str, Any]]) -> str:
    """Held-out losses by seed and kind."""
    rows = [
        (
            f"{run['seed']}",
            run["dtype"],
            f"{run['before']:.5f}",
            f"{run['held_out']['exact']:.5f}",
            f"{run['held_out']['kept']:.5f}",
            f"{sum(run['train_losses']) / len(run['train_losses']):.5f}",
        )
        for run in runs
    ]
    header = ("seed", "context_cache_dtype", "before", "after, exact", "after, as kept", "mean training loss")
    return markdown_table(header, rows, num_words=2)

# SPDX-License-Identifier: Apache-2.0
"""A stripped file trains as it is: what is kept of the instructions reaches no token."""

import json
from pathlib import Path

import pytest
from transformers import set_seed

from frozen_peft import FrozenContextTrainer
from frozen_peft.data import StripSettings, load_samples, strip_file
from tests.tiny_models import tiny_model
from tests.training.runs import config, fresh_lora, train, words


@pytest.mark.parametrize("form", ["conversational", "text", "conversation"])
def test_the_column_of_pieces_reaches_no_token(tmp_path: Path, form: str) -> None:
    rows, plain = [], []
    for seed in range(4):
        # The first row has nothing to strip, so the type of the column must come from a later one.
        tagged = f"<instruction>{words(3, seed=90 + seed)}</instruction>" if seed else ""
        question, answer = words(12, seed=seed), words(4, seed=50 + seed)
        if form == "text":
            rows.append({"prompt": tagged + question, "completion": " " + answer})
            plain.append({"prompt": question, "completion": " " + answer})
            continue
        system = [{"role": "system", "content": words(5, seed=70 + seed), "instruction": True}] if seed else []
        user, decision = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        columns = {"prompt": [user], "completion": [decision]}
        plain.append(columns if form == "conversational" else {"messages": [user, decision]})
        context = [*system, {**user, "content": tagged + question}]
        full = {"prompt": context, "completion": [decision]}
        rows.append(full if form == "conversational" else {"messages": [*context, decision]})
    source, target, reference = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "plain.jsonl"))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference.write_text("".join(json.dumps(row) + "\n" for row in plain))
    summary = strip_file(source, target, StripSettings(allow_quotes=True), measure=len)
    assert summary.num_stripped == 3
    fields = {"assistant_only_loss": True} if form == "conversation" else {}
    runs = []
    for path in (target, reference):
        set_seed(0)  # fresh adapters are random
        arguments = config(tmp_path / path.stem, max_steps=2, **fields)
        model = fresh_lora(tiny_model("qwen3_5_text"))
        runs.append(train(FrozenContextTrainer, model, arguments, load_samples(str(path))))
    assert runs[0].losses == runs[1].losses
    assert runs[0].trainer.train_dataset["input_ids"] == runs[1].trainer.train_dataset["input_ids"]

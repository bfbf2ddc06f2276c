# SPDX-License-Identifier: Apache-2.0
"""One tokenizer and one chat template, wherever a model and an adapter meet."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from frozen_peft import merge_adapter
from frozen_peft.adapters import load_tokenizer
from frozen_peft.cli import main
from frozen_peft.evaluation import Probe, load_model, score_probes
from frozen_peft.training.recipe import AdapterArguments, DataArguments, ModelArguments, Recipe, build_trainer
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import CHAT_TEMPLATE, config, word_tokenizer

PROMPT = [{"role": "user", "content": "w1 w2 w3"}]
TRAINED = "{{- '<|im_start|>w80 w79 <|im_end|>' -}}" + CHAT_TEMPLATE
# What lies in the adapter's folder, and whether the word that only its tokenizer has counts, and whose template.
KINDS = {
    "nothing": (False, CHAT_TEMPLATE),
    "template": (False, TRAINED),
    "tokenizer": (True, CHAT_TEMPLATE),
    "tokenizer and template": (True, TRAINED),
    "tokenizer with the template in its configuration": (True, TRAINED),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(folder: Path, kind: str, base: Path) -> Path:
    model, _ = load_model(str(base))
    add_lora(model).save_pretrained(folder)
    if "tokenizer" in kind:
        tokenizer = word_tokenizer()
        tokenizer.add_tokens(["added"])
        tokenizer.chat_template = TRAINED if "template" in kind else None
        tokenizer.save_pretrained(folder)
    elif kind == "template":
        (folder / "chat_template.jinja").write_text(TRAINED, encoding="utf-8")
    if "configuration" in kind:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TRAINED}))
        (folder / "chat_template.jinja").unlink()
    return folder


def rendered(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]


def expected(kind: str) -> tuple[list[int], int]:
    has_added, template = KINDS[kind]
    tokenizer = word_tokenizer()
    if has_added:
        tokenizer.add_tokens(["added"])
    tokenizer.chat_template = template
    return rendered(tokenizer), tokenizer("added")["input_ids"][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_own_counts_and_else_the_bases(tmp_path: Path, base: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", kind, base)
    tokens, added = expected(kind)
    _, loaded = load_model(str(base), str(adapter))
    merge_adapter(adapter, tmp_path / "merged", base=base, verify=False)
    for tokenizer in (load_tokenizer(base, adapter), loaded, AutoTokenizer.from_pretrained(tmp_path / "merged")):
        assert rendered(tokenizer) == tokens
        assert tokenizer("added")["input_ids"] == [added]


def test_an_explicit_tokenizer_wins(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "tokenizer and template", base)
    _, loaded = load_model(str(base), str(adapter), tokenizer=str(base))
    assert rendered(loaded) == expected("nothing")[0]


def test_an_adapter_is_measured_as_its_merged_model_is(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "template", base)
    merge_adapter(adapter, tmp_path / "merged", base=base, verify=False)
    probes = [Probe(PROMPT, f"w{n}", f"w{n + 9}") for n in range(3)]
    (tmp_path / "probes.jsonl").write_text(
        "".join(
            json.dumps({"prompt": PROMPT, "preferred": p.preferred, "rejected": p.rejected}) + "\n" for p in probes
        )
    )
    margins = []
    for command in (["--model", str(base), "--adapter", str(adapter)], ["--model", str(tmp_path / "merged")]):
        report = tmp_path / "report.json"
        assert main(["evaluate", "--probes", str(tmp_path / "probes.jsonl"), "--output", str(report), *command]) == 0
        scores = json.loads(report.read_text())["scores"]
        wanted = "adapted" if "--adapter" in command else "base"
        margins.append([s["preferred_logprob"] - s["rejected_logprob"] for s in scores if s["model"] == wanted])
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)
    model, _ = load_model(str(base), str(adapter))
    others = score_probes(model, word_tokenizer(), probes)
    assert abs(others.scores[0].margin - margins[0][0]) > 1e-3


def test_a_trained_adapter_is_inspected_with_its_own(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "template", base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "completion": [{"role": "assistant", "content": "w9"}]}) + "\n")
    recipe = Recipe(
        ModelArguments(model_name_or_path=str(base)),
        DataArguments(dataset_name=str(rows)),
        AdapterArguments(lora_r=2),
        config(tmp_path / "out"),
    )
    trainer = build_trainer(recipe, trained=str(adapter))
    tokens = rendered(load_tokenizer(base, adapter))
    assert trainer.train_dataset["input_ids"][0][: len(tokens)] == tokens == expected("template")[0]


def test_tokens_that_the_model_cannot_read_are_refused(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "tokenizer", base)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens([f"more{index}" for index in range(9)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"has a token 'more8' with number 97, and the model has embeddings of 97"):
        load_model(str(base), str(adapter))

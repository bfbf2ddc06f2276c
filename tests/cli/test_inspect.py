# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft inspect` on a recipe: the table, the file, the heat map, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel

from frozen_peft import gradient_flow
from frozen_peft.cli import main
from frozen_peft.data.rows import dump_row
from frozen_peft.gradient.flow import GradientShare, pooled
from frozen_peft.report.plots import draw_heatmap
from tests.tiny_models import add_lora, tiny_model
from tests.training.runs import word_tokenizer, words

ROLES = {"query", "output", "gate", "beta", "decay", "gdn_output"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of it, samples and a recipe."""
    folder = tmp_path_factory.mktemp("inspect")
    model = tiny_model("qwen3_5_text")
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    add_lora(model, keep=lambda name: name.endswith(("in_proj_qkv", "o_proj"))).save_pretrained(folder / "adapter")
    rows = [{"prompt": words(20 + seed, seed=seed) + " ", "completion": words(3, seed=-seed - 1)} for seed in range(5)]
    (folder / "samples.jsonl").write_text("".join(map(dump_row, rows)))
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder / 'base'}\ndataset_name: {folder / 'samples.jsonl'}\n"
        f"output_dir: {folder / 'out'}\ntier: 2\nlora_r: 2\nuse_cpu: true\nreport_to: none\nseed: 3\n"
    )
    return folder


def inspect(folder: Path, *more: str) -> int:
    return main(["inspect", str(folder / "recipe.yaml"), *more])


def test_writes_table_file_and_heatmap(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(folder, "--samples", "3") == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "out" / "gradient_flow.json").read_text(), parse_constant=pytest.fail)
    assert (found["format"], found["samples"]) == (1, 3)
    assert found["tokens"]["decision"] == 3 * 5
    assert {row["role"] for row in found["gradient"]} == ROLES
    assert all(row["full_norm"] > 0 for row in found["gradient"])
    last = [row for row in found["gradient"] if row["layer"] == 3]
    # What the last layer does at context positions reaches no decision.
    assert all(row["context_share"] < 1e-5 for row in last)
    header = next(line for line in printed.splitlines() if line.startswith("  layer ") and "query" in line)
    assert header.split() == ["layer", "query", "output", "gate", "beta", "decay", "gdn_output", "all"]
    total = printed.split("all adapters")[1]
    assert f"{found['total']['cosine']:.2f}" in total
    assert f"{found['total']['context_share']:.0%}" in total
    assert (folder / "out" / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["gradient_flow.json", "gradient_flow.png"]


def test_a_trained_adapter_is_measured_as_it_is(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "flow.json"
    assert inspect(folder, "--samples", "5", "--adapter", str(folder / "adapter"), "--output", str(output)) == 0
    found = json.loads(output.read_text())
    model = PeftModel.from_pretrained(tiny_model("qwen3_5_text"), folder / "adapter")
    tokenizer = word_tokenizer()
    batches = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        context, decision = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        input_ids = torch.tensor([[*context, *decision, tokenizer.eos_token_id]])
        labels = input_ids.clone()
        labels[:, : len(context)] = -100
        batches.append({"input_ids": input_ids, "labels": labels})
    expected = gradient_flow(model, batches).as_dict()
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for row, same in zip(found["gradient"], expected["gradient"], strict=True):
        assert (row["module"], row["role"]) == (same["module"], same["role"])
        assert row["full_norm"] == pytest.approx(same["full_norm"], rel=1e-4)
        assert row["cosine"] == pytest.approx(same["cosine"], abs=1e-4)
    assert output.with_suffix(".png").is_file()


def test_more_samples_than_there_are_and_a_recipe_of_tier_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(folder, "--samples", "99", "--tier", "1", "--output_dir", str(tmp_path / "new" / "run")) == 0
    printed = capsys.readouterr().out
    assert "The data has 5 samples, fewer than the 99 asked for." in printed
    assert "The recipe is of tier 1 or 3; compared are tier 2 and the full gradient all the same." in printed
    found = json.loads((tmp_path / "new" / "run" / "gradient_flow.json").read_text())
    assert found["samples"] == 5
    assert found["total"]["context_share"] > 0.0


def test_a_stream_gives_its_first_samples(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "flow.json"
    arguments = ("--samples", "2", "--dataset_streaming", "true", "--max_steps", "1", "--context_adapters", "false")
    assert inspect(folder, *arguments, "--output", str(output)) == 0
    # Contexts of 20 and 21 words, of which the last token before the decision is no context.
    assert json.loads(output.read_text())["tokens"] == {"context": 19 + 20, "decision": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "0"), "`samples` must be 1 or more, found 0"),
        (("--samples", "-2"), "`samples` must be 1 or more, found -2"),
        (("--use_peft", "false"), "`use_peft: false` has none"),
        (("--packing", "true"), "`packing` puts several samples into one row"),
        (("--output", "{folder}"), "`output` {folder} is a folder; give the name of a file"),
        (
            ("--output", "{folder}/none/flow.json"),
            "flow.json: there is no folder {folder}/none",
        ),
        (("--adapter", "{folder}/nothing"), "nothing"),
        (("--sample", "3"), "unknown field `sample`; did you mean `samples`?"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert inspect(folder, *(text.format(folder=folder) for text in arguments)) == 2
    assert message.format(folder=folder) in capsys.readouterr().err
    assert [path for path in sorted(folder.rglob("*")) if path.name != "out"] == [p for p in before if p.name != "out"]


def test_help_begins_with_its_own_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("--samples") < printed.index("--tier")
    assert "gradient_flow.json" in printed


def a_flow(layers: int) -> dict[str, Any]:
    figures = {"frozen_norm": 1.0, "full_norm": 2.0, "cosine": 0.5, "context_share": 0.9}
    rows = [
        {"layer": layer, "role": role, "module": "m", **figures}
        for layer in range(layers)
        for role in ("query", "mlp", "mlp")
    ]
    rows.append({"layer": 0, "role": "beta", "module": "m", "frozen_norm": 0.0, "full_norm": 0.0, "cosine": None})
    rows[-1]["context_share"] = None
    return {"gradient": rows, "samples": 2, "tokens": {"context": 10, "decision": 4}}


def test_heatmap_shows_every_layer_and_role() -> None:
    figure = draw_heatmap(a_flow(3))
    assert isinstance(figure, Figure)
    share, cosine = figure.axes[:2]
    assert [label.get_text() for label in share.get_xticklabels()] == ["query", "beta", "mlp"]
    assert [label.get_text() for label in share.get_yticklabels()] == ["0", "1", "2"]
    # Six cells with numbers; that of no gradient is empty.
    assert [text.get_text() for text in share.texts] == ["0.90"] * 6
    assert [text.get_text() for text in cosine.texts] == ["0.50"] * 6


def test_heatmap_of_many_layers_has_no_numbers() -> None:
    share = draw_heatmap(a_flow(64)).axes[0]
    assert not share.texts
    assert len(share.get_yticklabels()) == 32


def test_heatmap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapted projections"):
        draw_heatmap({**a_flow(1), "gradient": []})


def test_parts_pooled_are_the_whole() -> None:
    frozen, full = torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [_share(own, whole) for own, whole in zip(frozen, full, strict=True)]
    found, expected = pooled(parts), _share(frozen.flatten(), full.flatten())
    assert list(vars(found).values()) == pytest.approx(list(vars(expected).values()))
    nothing = GradientShare(0.0, 0.0, None, None)
    assert pooled([nothing]) == nothing


def _share(frozen: torch.Tensor, full: torch.Tensor) -> GradientShare:
    cosine = float(torch.cosine_similarity(frozen, full, dim=0))
    return GradientShare(float(frozen.norm()), float(full.norm()), cosine, float((full - frozen).norm() / full.norm()))

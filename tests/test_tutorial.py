# SPDX-License-Identifier: Apache-2.0
"""Every command of the tutorial, run as it stands there, outside a checkout."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

import frozen_peft.demo
from frozen_peft.cli import main
from frozen_peft.demo import DemoData

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_the_tutorial_walks_the_whole_road() -> None:
    names = [command[1] for command in commands()]
    assert names == ["demo", "sample", "strip", "train", "evaluate", "merge", "evaluate"]
    assert all(command[0] == "frozen-peft" for command in commands())


def test_the_tutorials_sample_is_one() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (sample,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    assert set(json.loads(sample)) == {"prompt", "completion"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorials_commands_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A fifth of the demo's conversations and probes; what they are like is the same.
    few = partial(DemoData, num_scenes=40, num_probed=4, num_prompts=2)
    monkeypatch.setattr(frozen_peft.demo, "DemoData", few)
    monkeypatch.chdir(tmp_path)
    for command in commands():
        assert main(command[1:]) == 0, command
    output = tmp_path / "outputs" / "tutorial"
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert (output / "merged" / "model.safetensors").is_file()
    assert (output / "report.json").is_file()
    sampled = [json.loads(line) for line in (output / "sampled.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sampled
    assert all(row["completion"][0]["content"].strip().startswith("ok, using") for row in sampled)
    # The last command measured the merged model, which accepts directions untold.
    printed = capsys.readouterr().out
    assert "exact" in printed

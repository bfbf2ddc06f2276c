# SPDX-License-Identifier: Apache-2.0
"""Sampling from a real server: `transformers serve` on the loopback, with a tiny checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frozen_peft.cli import main
from tests.evaluation.checkpoint import write_checkpoint
from tests.serving import served

pytestmark = pytest.mark.slow

PROMPTS: list[Any] = [
    [{"role": "user", "content": "Left?"}],
    [{"role": "system", "content": "The facts are noted."}, {"role": "user", "content": "Right?"}],
    "Once upon a time",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The server draws only where the checkpoint says that it is meant for that; a temperature of 0 turns it off again.
    return write_checkpoint(tmp_path_factory.mktemp("model"), do_sample=True)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(folder, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


def sampled(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = ["sample", str(prompts), str(out), "--max_new_tokens", "8", "--keep_unfinished", "--overwrite"]
    assert main([*command, *options]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_greedy_candidates_of_the_server_are_those_of_the_local_model(folder: Path, url: str, tmp_path: Path) -> None:
    greedy = ["--model", str(folder), "--temperature", "0", "--num_candidates", "1"]
    local = sampled(tmp_path, *greedy)
    assert len(local) == 3
    served = sampled(tmp_path, *greedy, "--endpoint", url)
    # A server does not give the tokens, which a random model takes as no tokenizer would, and leaves special tokens
    # out of some texts.
    known = [{name: value for name, value in row.items() if name != "retokenized"} for row in local]
    without = [json.loads(json.dumps(rows).replace("<|im_start|>", "")) for rows in (served, known)]
    assert without[0] == without[1]


def test_candidates_differ_and_come_again_with_their_seeds(folder: Path, url: str, tmp_path: Path) -> None:
    options = ["--model", str(folder), "--endpoint", url, "--num_candidates", "3", "--concurrency", "1"]
    first = sampled(tmp_path, *options)
    assert sampled(tmp_path, *options) == first
    assert len({json.dumps(row["completion"]) for row in first}) == len(first) > 6
    assert sampled(tmp_path, *options, "--seed", "1") != first


def test_a_model_that_the_server_does_not_have(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    assert main(["sample", str(prompts), str(tmp_path / "o.jsonl"), "--model", "other", "--endpoint", url]) == 2
    assert "status 400: " in capsys.readouterr().err

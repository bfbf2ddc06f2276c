# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft sample`, with a local model and with servers, from its arguments to its files and its exit status."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from frozen_peft.cli import main
from frozen_peft.data import join_pairs
from tests.evaluation.answering import Reply, Request, answering, chat
from tests.evaluation.checkpoint import write_checkpoint

PROMPTS = [{"prompt": [{"role": "user", "content": f"Road {number}?"}], "number": number} for number in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def echo(request: Request, number: int = 0) -> Reply:
    """An answer that hangs on the question and the seed."""
    return chat(f"{request.body['messages'][-1]['content']} {request.body['seed']}")


def asking(prompts: Path, out: Path, url: str, *more: str) -> list[str]:
    return ["sample", str(prompts), str(out), "--model", "tiny", "--endpoint", url, "--max_wait", "0.01", *more]


def test_help_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n{part}:\n" in text for part in ("model", "endpoint", "candidates", "filter"))
    assert "with the prompt, what each candidate is drawn\n                        with (default: 0)" in text


def test_pairs_of_what_is_said_with_and_without_instructions(folder: Path, tmp_path: Path) -> None:
    marked = {"role": "system", "content": "<instruction>Roads are long.</instruction>"}
    rows = [{"prompt": [marked, *row["prompt"]]} for row in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["strip", str(tmp_path / "prompts.jsonl"), str(tmp_path / "stripped.jsonl")]) == 0
    options = ["--model", str(folder), "--num_candidates", "1", "--max_new_tokens", "6", "--keep_unfinished"]
    for name, more in (("chosen", []), ("rejected", ["--without_instructions"])):
        out = str(tmp_path / f"{name}.jsonl")
        assert main(["sample", str(tmp_path / "stripped.jsonl"), out, *options, *more]) == 0
    pairs = join_pairs(lines(tmp_path / "chosen.jsonl"), lines(tmp_path / "rejected.jsonl"))
    assert pairs
    assert all(row["prompt"] == PROMPTS[number]["prompt"] for number, row in enumerate(pairs) if len(pairs) == 5)
    assert all(row["chosen"] != row["rejected"] for row in pairs)


def test_a_local_model(folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    command = ["sample", str(prompts), str(out), "--model", str(folder), "--num_candidates", "2"]
    command += ["--max_new_tokens", "6", "--keep_unfinished", "--keep_regex", "[a-z]"]
    assert main(command) == 0
    found = lines(out)
    assert 0 < len(found) <= 10
    for row in found:
        assert row["prompt"] == PROMPTS[row["number"]]["prompt"]
        ((role, text),) = [(message["role"], message["content"]) for message in row["completion"]]
        assert role == "assistant"
        assert any("a" <= character <= "z" for character in text)
    assert len({row["seed"] for row in found}) == len(found)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["candidates", "10"] in shown
    assert ["kept", str(len(found))] in shown
    first = out.read_bytes()
    assert main([*command, "--overwrite", "--batch_size", "3"]) == 0
    assert out.read_bytes() == first


def test_a_server_and_a_function(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keep.py").write_text("def even(sample):\n    return sample['number'] % 2 == 0\n")
    out = tmp_path / "out.jsonl"
    with answering(echo) as server:
        assert main(asking(prompts, out, server.url, "--keep", f"{tmp_path / 'keep.py'}:even")) == 0
    assert [(row["number"], row["candidate"]) for row in lines(out)] == [(n, c) for n in (0, 2, 4) for c in range(4)]
    for row in lines(out):
        assert row["completion"] == [{"role": "assistant", "content": f"Road {row['number']}? {row['seed']}"}]
    shown = capsys.readouterr().out
    assert "keep.py:even" in shown
    assert shown.splitlines()[2].split() == ["prompts", "5", "(2", "without", "any", "kept)"]


def test_a_margin_decides(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [
        {"role": "system", "content": "<do>Take the left road.</do>The facts."},
        {"role": "user", "content": "Left?"},
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": messages}) + "\n")
    command = ["sample", str(prompts), str(out), "--model", str(folder), "--num_candidates", "6"]
    command += ["--max_new_tokens", "5", "--keep_unfinished", "--overwrite", "--tag", "do"]
    assert main([*command, "--min_margin=-inf"]) == 0
    margins = {row["candidate"]: row["margin"] for row in lines(out)}
    assert len(margins) > 3
    middle = sorted(margins.values())[len(margins) // 2]
    capsys.readouterr()
    assert main([*command, f"--min_margin={middle}"]) == 0
    kept = {row["candidate"]: row["margin"] for row in lines(out)}
    assert kept == {number: margin for number, margin in margins.items() if margin >= middle}
    assert 0 < len(kept) < len(margins)
    assert f"margin below {middle:g}" in capsys.readouterr().out
    # A server's candidates, measured by a local model.
    with answering(echo) as server:
        out.unlink()
        options = ["--min_margin=-inf", "--margin_model", str(folder), "--tag", "do", "--batch_size", "3"]
        assert main(asking(prompts, out, server.url, *options)) == 0
    assert len({row["margin"] for row in lines(out)}) == 4


def test_a_margin_needs_instructions(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prompts.with_name("out.jsonl")
    assert main(["sample", str(prompts), str(out), "--model", str(folder), "--min_margin", "0"]) == 2
    assert f"{prompts}, line 1: there are no instructions to leave out" in capsys.readouterr().err


def test_a_server_that_goes_away_and_comes_back(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with answering(lambda request, number: echo(request) if number < 7 else Reply("no", status=503)) as server:
        assert main(asking(prompts, out, server.url, "--max_retries", "1")) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert (
            f"{server.url}: status 503: no (2 attempts); what is done is in {tmp_path / 'out.part.jsonl'}" in message
        )
        answered = [request.body["seed"] for request in server.requests[:7]]
    assert not out.exists()
    with answering(echo) as server:
        assert main(asking(prompts, out, server.url, "--seed", "1")) == 2
        assert "seed: 0 then, 1 now" in capsys.readouterr().err
        assert server.requests == []
        assert main(asking(prompts, out, server.url)) == 0
        assert not {request.body["seed"] for request in server.requests} & {*answered}
        assert len(server.requests) == 13
        assert main(asking(prompts, whole, server.url)) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert "(7 of them from an earlier run)" in capsys.readouterr().out


def test_an_interruption_says_how_to_go_on(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("frozen_peft.cli.sample.run_sample_job", interrupt)
    assert main(asking(prompts, tmp_path / "out.jsonl", "http://localhost/v1")) == 2
    assert "interrupted; what is done is in" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(prompts: Path, tmp_path: Path, ending: signal.Signals) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"

    def slow_after_nine(request: Request, number: int) -> Reply:
        reply = echo(request)
        return Reply(reply.body, seconds=0.0 if number < 9 else 300.0)

    with answering(slow_after_nine) as server:
        command = asking(prompts, out, server.url, "--concurrency", "2")
        # Where tests run in the background, the shell may have had SIGINT ignored, and children inherit that.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += f"from frozen_peft.cli import main; raise SystemExit(main({command!r}))"
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 200
        while len(server.requests) < 11 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(server.requests) == 11, process.poll()
        process.send_signal(ending)
        _, message = process.communicate(timeout=60)
        assert process.returncode == (-ending if ending == signal.SIGKILL else 2)
        assert (ending == signal.SIGKILL) != ("interrupted; what is done is in" in message)
        assert not out.exists()
        done = [record["seed"] for record in lines(tmp_path / "out.part.jsonl")[1:]]
        assert len(done) == len({*done}) == 9
    with answering(echo) as server:
        assert main(asking(prompts, out, server.url)) == 0
        asked = Counter(request.body["seed"] for request in server.requests)
        assert set(asked.values()) == {1}
        assert not {*asked} & {*done}
        assert main(asking(prompts, whole, server.url)) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl", "whole.jsonl"]


def test_bad_rows_stop_the_run_or_are_left_out(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with prompts.open("a") as file:
        file.write('{"prompt": 3}\n{\n')
    with answering(echo) as server:
        assert main(asking(prompts, out, server.url)) == 2
        assert f"{prompts}, line 6: `prompt` is a number" in capsys.readouterr().err
        assert server.requests == []
        assert main(asking(prompts, out, server.url, "--skip-bad")) == 0
    captured = capsys.readouterr()
    assert f"left out: {prompts}, line 7: column 1: not JSON" in captured.err
    assert "2 bad rows" in captured.out
    assert len(lines(out)) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_candidates", "0"], "`num_candidates` must be 1 or more, got 0"),
        (["--keep_regex", "("], "--keep_regex '(': not a regular expression"),
        (["--keep", "missing.py:f"], "no file missing.py"),
        (["--adapter", "a"], "--adapter has no effect with --endpoint"),
        (["--load_in_4bit"], "--load_in_4bit has no effect with --endpoint"),
        (["--allow_pickle"], "--allow_pickle has no effect with --endpoint"),
        (["--tag", "t"], "--tag has no effect without --min_margin"),
        (["--margin_model", "m"], "--margin_model has no effect without --min_margin"),
        (["--min_margin", "0"], "--min_margin needs --margin_model beside --endpoint"),
        (["--min_margin", "nan"], "--min_margin must be a number, got nan"),
        (["--concurrency", "0"], "`concurrency` must be 1 request or more, got 0"),
        (["--timeout", "0"], "`timeout` must be above 0 seconds"),
        (["--api_key_env", "NO_SUCH_KEY"], "no environment variable NO_SUCH_KEY"),
    ],
)
def test_options_that_cannot_be_used(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(asking(prompts, tmp_path / "out.jsonl", "http://127.0.0.1:9/v1", *options)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts]


def test_files_that_cannot_be_used(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9/v1"
    (tmp_path / "there.jsonl").write_text("precious")
    for out, message in (
        (prompts, "OUT is PROMPTS"),
        (tmp_path / "there.jsonl", "there.jsonl exists; --overwrite replaces it"),
        (tmp_path / "missing" / "out.jsonl", f"no folder {tmp_path / 'missing'}"),
    ):
        assert main(asking(prompts, out, url)) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.jsonl").read_text() == "precious"
    assert main(["sample", "none.jsonl", str(tmp_path / "o.jsonl"), "--model", "m", "--endpoint", url]) == 2
    assert "no file none.jsonl" in capsys.readouterr().err
    assert main(["sample", str(prompts), str(tmp_path / "o.jsonl"), "--model", str(tmp_path / "no_model")]) == 2
    assert "no_model" in capsys.readouterr().err


def test_a_key_is_never_written(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROAD_KEY", "sesame-123")
    refusal = Reply({"error": {"message": "not sesame-123"}}, status=429)
    with answering(lambda request, number: refusal if number > 2 else echo(request)) as server:
        options = ["--api_key_env", "ROAD_KEY", "--max_retries", "1"]
        assert main(asking(prompts, tmp_path / "out.jsonl", server.url, *options)) == 2
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer sesame-123"}
    captured = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "not <key>" in captured.err
    assert "sesame" not in captured.err + captured.out + written

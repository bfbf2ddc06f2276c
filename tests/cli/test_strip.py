# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft strip`: what it writes, what it says, and that mistakes leave nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from frozen_peft.cli import main
from frozen_peft.data import restore_instructions

GOOD = [
    {
        "prompt": [
            {"role": "system", "content": "Be brief, always.", "instruction": True},
            {"role": "user", "content": "a"},
        ]
    },
    {"prompt": [{"role": "user", "content": "<instruction>No more than this.</instruction>\nb"}]},
    {"prompt": [{"role": "user", "content": "c 😀"}]},
    {
        "prompt": [
            {"role": "user", "content": "<instruction>Say moo moo</instruction>"},
            {"role": "user", "content": "d"},
        ]
    },
]
for _number, _row in enumerate(GOOD):
    _row["completion"] = [{"role": "assistant", "content": "Say moo moo!" if _number == 3 else "ok"}]
    _row["id"] = _number

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(*rows: dict | str, name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(text: str) -> dict[str, str]:
    lines = [line.split("  ") for line in text.splitlines() if ": " not in line.split("  ")[1]]
    return {cells[1]: next(cell for cell in cells[2:] if cell).strip() for cells in lines}


def test_it_strips_and_says_so(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(*GOOD), tmp_path / "out.jsonl"
    assert main(["strip", str(source), str(target)]) == 0
    out = capsys.readouterr().out
    rows = read(target)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [[one["content"] for one in row["prompt"]] for row in rows] == [["a"], ["\nb"], ["c 😀"]]
    assert [row["completion"] for row in rows] == [row["completion"] for row in GOOD[:3]]
    assert [restore_instructions(row) for row in rows] == GOOD[:3]
    assert table(out) == {
        "samples": "4",
        "stripped": "2",
        "unchanged": "1",
        "refused": "1",
        "spans removed": "2",
        "words removed": "7",
        "rows written": "3",
    }
    assert f"  unchanged: {source}, line 3\n" in out
    assert f"  refused: {source}, line 4: the decision quotes what was stripped, 'say moo moo'" in out
    # The columns of the table stand under each other.
    assert (
        len(
            {
                line.index(count) + len(count)
                for line, count in zip(out.splitlines(), table(out).values(), strict=False)
            }
        )
        == 1
    )

    again = tmp_path / "again.jsonl"
    assert main(["strip", str(target), str(again)]) == 0
    assert again.read_bytes() == target.read_bytes()
    out = capsys.readouterr().out
    assert table(out)["unchanged"] == "3"
    assert "2 stripped before" in out


def test_every_mark_has_an_option(write: Write, tmp_path: Path) -> None:
    contents = ["<x>1</x>a", "2", "3", "4b5", "6"]
    messages = [{"role": "user", "content": content} for content in contents]
    messages[1]["role"], messages[2]["hint"] = "system", True
    source = write({"messages": [*messages, {"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}]})
    (tmp_path / "rules.py").write_text("def six(message):\n    return message['content'] == '6'\n")
    marks = [
        "--tag",
        "x",
        "--role",
        "system",
        "--field",
        "hint",
        "--regex",
        "b.",
        "--predicate",
        f"{tmp_path}/rules.py:six",
    ]
    target = tmp_path / "out.jsonl"
    assert main(["strip", str(source), str(target), *marks]) == 0
    (row,) = read(target)
    assert [one["content"] for one in row["messages"]] == ["a", "4", "7", "8"]
    assert restore_instructions(row)["messages"][:5] == messages


def test_tokens_are_those_of_the_tokenizer(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    source, target = write({"prompt": "abc<x>ü</x>", "completion": "c"}), str(tmp_path / "out.jsonl")
    assert main(["strip", str(source), target, "--tag", "x", "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert table(capsys.readouterr().out)["tokens removed"] == str(len("<x>ü</x>"))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"a" 1}', "column 6: not JSON"),
        ({"text": "a"}, "a sample has the column `prompt` or `messages`; found `text`"),
        ({"prompt": "a <instruction> b", "completion": "c"}, "`prompt`, character 2: <instruction> is not closed"),
        ({"prompt": "a", "completion": "c", "stripped": [{}]}, "`stripped[0]` is not a piece"),
        ({"prompt": "<instruction>a</instruction>", "completion": "c"}, "`prompt` is marked as a whole"),
    ],
)
def test_bad_rows_are_named_and_may_be_left_out(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: dict | str, reason: str
) -> None:
    source, target = write(GOOD[0], bad, GOOD[1]), tmp_path / "out.jsonl"
    assert main(["strip", str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"frozen-peft strip: {source}, line 2: {reason}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]
    assert main(["strip", str(source), str(target), "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert table(out)["bad rows"] == "1"
    assert f"  bad: {source}, line 2: {reason}" in out
    assert [row["id"] for row in read(target)] == [0, 1]


def test_many_places_are_counted(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(*[GOOD[2]] * 7, GOOD[0])
    assert main(["strip", str(source), str(tmp_path / "out.jsonl")]) == 0
    out = capsys.readouterr().out
    assert out.count("  unchanged: ") == 6
    assert "  unchanged: and 2 more" in out


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([], [], "the file has no samples"),
        (["{"], ["--skip-bad"], "the file has no samples: all 1 rows are bad; the first is "),
        ([GOOD[3]], [], "all 1 decisions quote what was stripped; the first is "),
        ([GOOD[2]], [], "nothing to strip in any of 1 samples: no tag <instruction>, no field `instruction`\n"),
        ([GOOD[0]], ["--tag", "rule"], "nothing to strip in any of 1 samples: no tag <rule>\n"),
        ([GOOD[0]], ["--tag", "<rule>"], "tag '<rule>': give the name alone"),
        ([GOOD[0]], ["--regex", "("], "not a regular expression"),
        ([GOOD[0]], ["--predicate", "rules"], "expected FILE.py:FUNCTION"),
        ([GOOD[0]], ["--predicate", "absent.py:f"], "no file absent.py"),
        ([GOOD[0]], ["--quote-words", "0"], "`quote_words` is 0"),
        ([GOOD[0]], ["--drop", "0.5"], "--drop has no effect without --variants above 1"),
        ([GOOD[0]], ["--no-strip"], "--no-strip has no effect without --variants above 1"),
        ([GOOD[0]], ["--no-strip", "--tag", "x", "--variants", "2"], "--tag has no effect with --no-strip"),
        ([GOOD[0]], ["--variants", "2", "--drop", "0.5", "--max-inserts", "2"], "--max-inserts has no effect"),
        (
            [GOOD[0]],
            ["--variants", "2", "--keep-instructions", "1", "--independent-role", "x"],
            "--independent-role has no effect",
        ),
        ([GOOD[0]], ["--variants", "2"], "2 variants, and nothing to vary"),
        ([GOOD[0]], ["--variants", "2", "--drop", "1"], "none of 1 samples has a variant"),
        ([GOOD[0]], ["--variants", "2", "--insert", "absent.jsonl"], "no file absent.jsonl"),
        ([GOOD[0]], ["--tokenizer", "no/such/tokenizer"], "no/such/tokenizer"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list, options: list[str], reason: str
) -> None:
    source = write(*rows)
    assert main(["strip", str(source), str(tmp_path / "out.jsonl"), *options]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == [source]


def test_a_file_is_not_written_over_itself(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(GOOD[0])
    before = source.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for target in (source, link):
        assert main(["strip", str(source), str(target)]) == 2
        assert "write to another one" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_nothing_to_strip_may_be_meant(write: Write, tmp_path: Path) -> None:
    source, target = write(GOOD[2]), tmp_path / "out.jsonl"
    assert main(["strip", str(source), str(target), "--allow-unchanged"]) == 0
    assert read(target) == [{**GOOD[2], "stripped": []}]


def test_quotes_may_be_allowed(write: Write, tmp_path: Path) -> None:
    source, target = write(GOOD[3]), tmp_path / "out.jsonl"
    assert main(["strip", str(source), str(target), "--allow-quotes"]) == 0
    assert restore_instructions(read(target)[0]) == GOOD[3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", "fails: ZeroDivisionError"),
        ("f = 1", "has no function `f`"),
        ("def f(message):\n    return message['x']", "line 1: `prompt[0]`: the predicate `f` failed: KeyError: 'x'"),
    ],
)
def test_a_predicate_that_fails_is_named(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    source = write(GOOD[0])
    (tmp_path / "rules.py").write_text(text)
    options = ["--predicate", str(tmp_path / "rules.py") + ":f"]
    assert main(["strip", str(source), str(tmp_path / "out.jsonl"), *options]) == 2
    assert reason in capsys.readouterr().err


def test_variants_come_after_their_sample(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = [{"role": "memory", "content": f"Fact {number}."} for number in range(4)]
    samples = [{**row, "prompt": [row["prompt"][0], *facts, *row["prompt"][1:]]} for row in GOOD[:2]]
    # The last user message of the second one stands before the facts, so nothing in it may move.
    source = write(*samples)
    insert = write({"role": "memory", "content": "Moon."}, name="insert.jsonl")
    words = write({"text": "Fact 1.", "alternatives": ["Number one."]}, name="words.jsonl")
    options = ["--variants", "4", "--seed", "3", "--shuffle", "--drop", "0.3", "--independent-role", "memory"]
    options += ["--insert", str(insert), "--paraphrases", str(words), "--max-inserts", "1"]
    target = tmp_path / "out.jsonl"
    assert main(["strip", str(source), str(target), *options]) == 0
    out = capsys.readouterr().out
    rows = read(target)
    assert [row["id"] for row in rows[:5]] == [0, 0, 0, 0, 1]
    assert restore_instructions(rows[0]) == samples[0]
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)
    assert table(out)["rows written"] == str(len(rows))
    assert table(out)["spans removed"] == "2"
    # Another order of rows, another file: the same variants.
    turned = tmp_path / "turned.jsonl"
    assert main(["strip", str(write(*samples[::-1], name="in2.jsonl")), str(turned), *options]) == 0
    assert sorted(turned.read_text().splitlines()) == sorted(target.read_text().splitlines())
    # Stripping first and varying later is the same.
    stripped, later = tmp_path / "stripped.jsonl", tmp_path / "later.jsonl"
    assert main(["strip", str(source), str(stripped)]) == 0
    assert main(["strip", str(stripped), str(later), "--no-strip", *options]) == 0
    assert later.read_bytes() == target.read_bytes()


def test_few_variants_are_said(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [{"role": "memory", "content": "a", "independent": True}, {"role": "user", "content": "b"}]
    source = write({"prompt": prompt, "completion": [{"role": "assistant", "content": "c"}]})
    options = ["--no-strip", "--variants", "5", "--drop", "0.5"]
    assert main(["strip", str(source), str(tmp_path / "out.jsonl"), *options]) == 0
    out = capsys.readouterr().out
    assert table(out) == {"samples": "1", "samples varied": "1", "rows written": "2"}
    assert "1 samples have no 5 contexts that differ" in out


@pytest.mark.parametrize(
    ("option", "row", "reason"),
    [
        ("--insert", {"content": "a"}, "line 1: `message[0]` has no `role`"),
        (
            "--insert",
            {"messages": [{"role": "assistant", "content": "a"}] * 2},
            "line 1: an exchange begins with a user's",
        ),
        ("--insert", {"role": "user", "content": "a <instruction>b</instruction>"}, "it is marked as an instruction"),
        ("--insert", {"role": "user", "content": "a", "instruction": True}, "it is marked as an instruction"),
        ("--insert", "", "the file has no messages"),
        ("--paraphrases", {"text": "a"}, "line 1: a paraphrase has `alternatives`"),
        (
            "--paraphrases",
            {"text": "a ", "alternatives": ["b"]},
            "line 1: a text to paraphrase is empty or has white space",
        ),
        (
            "--paraphrases",
            {"text": "a", "alternatives": ["<instruction/>"]},
            "to 'a': one has a stretch that is marked",
        ),
        ("--paraphrases", "", "the file has no paraphrases"),
    ],
)
def test_bad_files_of_variants_are_named(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, row: dict | str, reason: str
) -> None:
    source, more = write(GOOD[0]), write(row, name="more.jsonl")
    assert main(["strip", str(source), str(tmp_path / "out.jsonl"), "--variants", "2", option, str(more)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "marked" in reason or str(more) in error


def test_stripping_waits_for_no_model_library(write: Write, tmp_path: Path) -> None:
    code = (
        "import sys; from frozen_peft.cli import main; assert main(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "strip", str(write(GOOD[0])), str(tmp_path / "out.jsonl")]
    subprocess.run(command, check=True, capture_output=True)

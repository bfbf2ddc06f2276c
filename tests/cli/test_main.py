# SPDX-License-Identifier: Apache-2.0
"""What the command line says, and with which exit status."""

import pytest

from frozen_peft.cli import COMMANDS, main
from frozen_peft.cli.arguments import CommandParser
from frozen_peft.cli.errors import CommandError, reported
from frozen_peft.errors import ContextMismatchError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in COMMANDS.items():
        assert any(line.split()[:1] == [name] and summary in line for line in lines)


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teach"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'teach'" in captured.err
    assert "train" in captured.err


def test_mistakes_of_the_user_give_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "no/such/recipe.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("frozen-peft train: no recipe no/such/recipe.yaml: it is neither a file")
    assert captured.err.count("\n") == 1


def test_errors_from_below_keep_their_traceback_while_training() -> None:
    with pytest.raises(ValueError, match="invalid literal"), reported(raised_in="frozen_peft"):
        int("seven")


def test_errors_while_reading_input_are_reported() -> None:
    with pytest.raises(CommandError, match="invalid literal"), reported():
        int("seven")


def test_a_lost_context_is_reported() -> None:
    with pytest.raises(CommandError, match="off by 3"), reported():
        raise ContextMismatchError("off by 3")


def test_demo_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize("joint", ["-", "_"])
def test_words_of_an_option_have_hyphens_or_underscores_between_them(joint: str) -> None:
    parser = CommandParser("strip", None, joint)
    parser.option("skip_bad", "", False)
    parser.option("quote_words", "", 5)
    for arguments in (["--skip-bad", "--quote-words", "-3"], ["--skip_bad", "--quote_words=-3"]):
        options = parser.read(arguments)
        assert (options.skip_bad, options.quote_words) == (True, -3)
    with pytest.raises(ValueError, match=f"--quote{joint}words has no effect alone"):
        parser.refuse_idle(options, ["quote_words"], "alone")
    with pytest.raises(SystemExit):
        parser.read(["--skip"])

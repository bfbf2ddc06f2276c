# SPDX-License-Identifier: Apache-2.0
"""What a recipe's run leaves in its folder beside the weights: recipe, versions, memory, examples, report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from frozen_peft.report.examples import ExampleSettings, make_examples
from frozen_peft.report.memory import PeakMemory
from frozen_peft.report.record import versions, write_json, write_recipe

__all__ = ["ReportArguments", "RunRecord"]


@dataclass
class ReportArguments:
    """What is shown of a run when it has ended."""

    write_report: bool = HfArg(
        default=True, help="Write `report.html`, a page on the run, at its end. `frozen-peft report` does so later."
    )
    num_examples: int = HfArg(
        default=3,
        help="Held-out samples to show decisions on, base's and trained. They are decoded greedily at the end; "
        "each costs three encodings of its context and `max_example_tokens` tokens. 0: none.",
    )
    max_example_tokens: int = HfArg(default=64, help="Tokens after which a decision of `num_examples` is cut off.")


class RunRecord:
    """Files of one run, which its main process writes.

    Args:
        trainer: Of the run.
        arguments: What is shown of it.
        given: The fields that recipe and command line gave, with their values.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, trainer: Any, arguments: ReportArguments, given: dict[str, Any]):
        self._trainer, self._arguments = trainer, arguments
        self._examples = ExampleSettings(
            arguments.num_examples, arguments.max_example_tokens, trainer.args.max_context_length
        )
        self._writes = trainer.is_world_process_zero()
        self._folder = Path(trainer.args.output_dir)
        # What it was on this machine, where its default depends on that.
        self._given = given | {"bf16": bool(trainer.args.bf16)}

    def begin(self) -> None:
        """Writes what is known before training, and begins to watch memory."""
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_recipe(self._folder / "recipe.yaml", self._given)
            write_json(self._folder / "versions.json", versions())
        self._memory = PeakMemory()

    def trained(self) -> None:
        """Writes the memory that was taken since `begin`."""
        if self._writes:
            write_json(self._folder / "memory.json", self._memory.read())

    def end(self, load_held_out: Callable[[], Any]) -> Path | None:
        """Writes examples and report, once the run is saved.

        Args:
            load_held_out: Gives the held-out samples as they were written; None where there are none.

        Returns:
            Where the report is, if there is one.
        """
        if not self._writes:
            return None
        if self._arguments.num_examples:
            write_json(self._folder / "examples.json", self._made_examples(load_held_out))
        if not self._arguments.write_report:
            return None
        # At the end, since matplotlib takes a second to import.
        from frozen_peft.report.page import write_report

        return write_report(self._folder)[0]

    def _made_examples(self, load_held_out: Callable[[], Any]) -> dict[str, Any]:
        trainer, settings = self._trainer, self._examples
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        if trainer.accelerator.num_processes == 1:
            return make_examples(model, tokenizer, load_held_out(), settings)
        # The other processes are not there to gather weights that may be spread over all.
        found = make_examples(model, tokenizer, None, ExampleSettings(0, settings.max_new_tokens))
        found["notes"].append("none are generated in a run of several processes")
        return found

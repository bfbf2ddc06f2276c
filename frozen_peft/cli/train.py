# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft train`: adapters from a recipe.

Trains a model's response to its context from a recipe: a flat YAML file of the fields below, or the name of one that
ships (`frozen-peft recipes` lists them). A field on the command line wins over the recipe.

`--method dpo` and `--method kto` train preferences, and have TRL's fields for these: `frozen-peft train --method dpo
--help`.
"""

from collections.abc import Sequence

from frozen_peft.cli.errors import reported
from frozen_peft.cli.recipe_parser import RecipeParser
from frozen_peft.demo import resolve_names
from frozen_peft.report.run_record import RunRecord
from frozen_peft.training.recipe import Recipe, load_held_out
from frozen_peft.training.run import RecipeRun
from frozen_peft.utils.tables import aligned

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Trains, evaluates before and after where there is held-out data, saves, and prints what happened.

    Args:
        arguments: Command-line arguments after `train`.

    Raises:
        CommandError: A field, file, model or dataset cannot be used.
    """
    parser = RecipeParser("train", __doc__, every_field="--help-all" in arguments)
    if not arguments or (asked := {"-h", "--help", "--help-all"} & set(arguments)):
        with reported():
            parser.of([text for text in arguments if text not in asked] if arguments else ()).print_help()
        return
    with reported():
        *groups, report = parser.parse(arguments)
        recipe = Recipe(*groups)
        recipe.require_sources()
    resolve_names(recipe.model, recipe.data)
    with reported():
        training = RecipeRun(recipe)
        record = RunRecord(training.trainer, report, parser.given(arguments))
        record.begin()
    training.train(record.trained)
    page = record.end(lambda: load_held_out(recipe))
    if training.trainer.is_world_process_zero():
        rows = training.summary() + ([] if page is None else [("report", str(page.resolve()))])
        print("\n" + "\n".join(aligned(rows)))

# SPDX-License-Identifier: Apache-2.0
"""Fills the cells: the base model's figures, a choice of learning rate per method, and the trainings at it."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from frozen_peft import gradient_flow, lora_config
from frozen_peft.context import ContextStore
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.objectives.gradients import frozen_cosine
from tests.benchmarks.real.cells import Cell, CellFiles, Figures
from tests.benchmarks.real.methods import BASE, METHODS, NAMES, Method, Size
from tests.benchmarks.real.samples import Row, SampleFiles, digest, prompt_rows, training_pairs, training_rows
from tests.benchmarks.real.scores import loss, score_rows
from tests.benchmarks.real.tasks import TaskName
from tests.benchmarks.real.texts import Part, Texts
from tests.benchmarks.training import ON_A_CPU, trainer_classes

# Of held-out and dev samples, which are the same for all seeds.
PROBE_SEED = 0
FLOW_SEED = 1_000
# Of the base's contexts in memory: all of the three tasks.
CONTEXT_BYTES = 4 * 2**30


def plan(size: Size) -> Iterator[Cell]:
    """All cells, the most telling first, and a cell behind those that it needs."""
    yield from (Cell(task, BASE) for task in size.tasks)
    for method in METHODS:
        for task in (task for task in size.tasks if method.name not in size.cut.get(task, ())):
            if method.rate_of is None:
                yield from (Cell(task, method.name, rate=rate) for rate in size.rates)
            yield from (Cell(task, method.name, seed) for seed in size.seeds)


@dataclass(frozen=True)
class Study:
    """One model, its texts, and where figures go.

    Attributes:
        model_folder: The checkpoint.
        samples: Makes samples.
        cells: Keeps figures.
        size: How much.
        contexts: The base's contexts of held-out samples, which all trainings are compared in.
    """

    model_folder: Path
    samples: SampleFiles
    cells: CellFiles
    size: Size
    contexts: ContextStore = field(default_factory=lambda: ContextStore(CONTEXT_BYTES))

    @classmethod
    def of(cls, model_folder: Path, texts: Texts, results: Path, size: Size, gathered: Path | None = None) -> "Study":
        """A study whose results go to a folder."""
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        samples = SampleFiles(results / "samples", texts, model, tokenizer, size.answer_tokens)
        return cls(model_folder, samples, CellFiles(results / "cells", gathered), size)

    def run(self, say: Callable[[str], None] = print, methods: Sequence[str] = NAMES) -> None:
        """Measures every cell that was not, and leaves alone those that another process works on.

        A cell that needs what another process still measures comes at a later pass.

        Args:
            say: Takes a line for each cell.
            methods: Names of those to train; the base is measured in any case, and so are learning rates of a method
                that one of them takes its own from.
        """
        lenders = {method.rate_of for method in METHODS if method.name in methods}
        cells = [
            cell
            for cell in plan(self.size)
            if cell.method in (BASE, *methods) or (cell.rate is not None and cell.method in lenders)
        ]
        while open_cells := [cell for cell in cells if self.cells.get(cell) is None]:
            measured = [self._try(cell, say) for cell in open_cells]
            if not any(measured):
                time.sleep(10)

    def _try(self, cell: Cell, say: Callable[[str], None]) -> bool:
        """Whether the cell was measured now."""
        rate = cell.rate
        if cell.method != BASE and rate is None:
            rate = self.cells.best_rate(cell.task, method_of(cell).rate_of or cell.method, self.size.rates)
            if rate is None:
                return False
        with self.cells.claim(cell) as is_free:
            if not is_free or self.cells.get(cell) is not None:
                return False
            start = time.perf_counter(), time.process_time()
            figures = self.base(cell) if cell.method == BASE else self.trained(cell, rate)
            figures["wall_seconds"] = time.perf_counter() - start[0]
            figures["machine"] = describe_machine()
            figures["cpu_seconds"] = time.process_time() - start[1]
            self.cells.put(cell, figures)
            shown = f"dev loss {figures['dev_loss']:.3f}" if cell.rate else ""
            say(f"{cell.name}: {figures['cpu_seconds']:.0f} s {shown}")
        return True

    def base(self, cell: Cell) -> Figures:
        """The model before training: as it is, with examples before the text, and without the text."""
        rows = self._rows(cell.task, "held-out")
        model, tokenizer = self.samples.model, self.samples.tokenizer
        scores = score_rows(model, tokenizer, rows, ("given", "examples", "shuffled", "empty"), ["base"])
        return {"rows": digest(rows), "scores": {condition: found["base"] for condition, found in scores.items()}}

    def trained(self, cell: Cell, rate: float) -> Figures:
        """Trains once: for a choice of the rate, or to the end with everything that is measured."""
        method = method_of(cell)
        is_trial = cell.rate is not None
        steps = self.size.steps // 2 if is_trial else max(round(self.size.steps * method.length), 1)
        num_tokens = self.size.short_tokens if method.is_short else self.size.num_tokens
        num = round(self.size.steps * max(method.length, 1)) * self.size.batch_size
        as_pairs = method.trainer == "frozen-dpo"
        rows = self.samples.rows(cell.task, "train", cell.seed, num, num_tokens, as_pairs=as_pairs)
        probes = self._rows(cell.task, "dev" if is_trial else "held-out")
        tokenizer = self.samples.tokenizer
        figures: Figures = {"rate": rate, "steps": steps, "rows": digest(rows)}
        watch = Watch(
            () if is_trial else tuple(round(step * method.length) for step in self.size.measured),
            lambda model: score_rows(model, tokenizer, probes, weights=["adapted"])["given"]["adapted"],
        )
        model = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=torch.float32)
        with_flow = method.has_flow and not is_trial and cell.seed == self.size.seeds[0]
        if with_flow:
            watch.at_start = lambda model: figures.update(cosine_at_start=self._cosine(model, cell.task, method))
        model = self.fit(model, method, rows, steps, rate, cell.seed, watch)
        figures["seconds"] = watch.seconds
        if is_trial:
            scores = score_rows(model, tokenizer, probes, weights=["adapted"])
            figures["dev_loss"] = loss(scores["given"]["adapted"])
            return figures
        if with_flow:
            figures["cosine_at_end"] = self._cosine(model, cell.task, method)
        # The divergence from the base is of the rows' own contexts, which alone the base encodes as well.
        given = score_rows(model, tokenizer, probes, contexts=self.contexts)
        others = score_rows(model, tokenizer, probes, ("shuffled", "empty"), ["adapted"])
        figures["curve"] = watch.curve
        figures["scores"] = {condition: found["adapted"] for condition, found in (given | others).items()}
        if cell.seed == self.size.seeds[0]:
            long = self.samples.rows(cell.task, "held-out", PROBE_SEED, self.size.num_long, self.size.long_tokens)
            figures["scores"]["long"] = score_rows(model, tokenizer, long, weights=["adapted"])["given"]["adapted"]
        return figures

    def _rows(self, task: TaskName, part: Part) -> list[Row]:
        num = self.size.num_dev if part == "dev" else self.size.num_held_out
        return self.samples.rows(task, part, PROBE_SEED, num, self.size.num_tokens)

    def _cosine(self, model: PeftModel, task: TaskName, method: Method) -> float | None:
        """Of the frozen with the full gradient of what the method minimises."""
        of_pairs = method.trainer == "frozen-dpo"
        size = self.size
        rows = self.samples.rows(task, "train", FLOW_SEED, size.num_flow, size.num_tokens, as_pairs=of_pairs)
        if of_pairs:
            return frozen_cosine(model, training_pairs(rows), "preference")
        batches = [
            {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in training_rows(rows)
        ]
        return gradient_flow(model, batches).horizons[0].total.cosine

    def fit(
        self,
        model: PreTrainedModel,
        method: Method,
        rows: list[Row],
        steps: int,
        rate: float,
        seed: int,
        watch: "Watch",
    ) -> torch.nn.Module:
        """Trains fresh adapters on the rows in their order."""
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as output:
            trainer_class, config_class = trainer_classes(method.trainer)
            args = config_class(
                output,
                max_steps=steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=self.size.batch_size,
                learning_rate=rate,
                # The same at every step, so that equal steps and equal time can be read off one curve.
                lr_scheduler_type="constant",
                seed=seed,
                logging_strategy="no",
                **(ON_A_CPU | self._fields(method)),
            )
            trainer = trainer_class(
                model,
                args=args,
                train_dataset=_dataset(method, rows),
                processing_class=self.samples.tokenizer,
                peft_config=lora_config(model, method.preset, r=self.size.rank, lora_alpha=2 * self.size.rank),
                callbacks=[watch],
            )
            trainer.train()
        return trainer.model

    def _fields(self, method: Method) -> dict[str, Any]:
        is_written = "distill_on_policy" in method.fields
        return method.fields | ({"max_completion_length": self.size.answer_tokens} if is_written else {})


def _dataset(method: Method, rows: list[Row]) -> Dataset:
    if method.trainer == "frozen-dpo":
        return Dataset.from_list(training_pairs(rows))
    if "distill_on_policy" in method.fields:
        return Dataset.from_list(prompt_rows(rows))
    dataset = Dataset.from_list(training_rows(rows))
    return dataset if "loss_type" in method.fields else dataset.select_columns(["input_ids", "labels"])


def method_of(cell: Cell) -> Method:
    """The method that a cell names."""
    (method,) = (method for method in METHODS if method.name == cell.method)
    return method


class Watch(TrainerCallback):
    """Keeps the processor time of steps, without that of measuring, and measures on the way."""

    def __init__(self, measured: Sequence[int], measure: Callable[[Any], Any]) -> None:
        self.measured, self.measure = measured, measure
        self.curve: list[Figures] = []
        self.seconds = 0.0
        self.at_start: Callable[[Any], None] = lambda model: None

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.at_start(model)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.start
        if state.global_step in self.measured:
            self.curve.append({"step": state.global_step, "seconds": self.seconds, "scores": self.measure(model)})

# SPDX-License-Identifier: Apache-2.0
"""What a recipe's run leaves in its folder beside the weights: recipe, versions, memory, examples, report."""

import json
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from transformers.hf_argparser import HfArg

from frozen_peft.report.examples import ExampleSettings, make_examples
from frozen_peft.report.secrecy import without_secrets
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.installed import installed_version

__all__ = ["PeakMemory", "ReportArguments", "RunRecord", "versions", "write_recipe"]

_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
_RECIPE_HEAD = """\
# What this run was trained with: every field that its recipe and its command line gave. Paths are those of the folder
# in which it was started.
#
#   frozen-peft train recipe.yaml
"""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What resets the peak and nothing else (`man proc_pid_clear_refs`).
_RESET_PEAK = "5"


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
            _write_json(self._folder / "versions.json", versions())
        self._memory = PeakMemory()

    def trained(self) -> None:
        """Writes the memory that was taken since `begin`."""
        if self._writes:
            _write_json(self._folder / "memory.json", self._memory.read())

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
            _write_json(self._folder / "examples.json", self._made_examples(load_held_out))
        if not self._arguments.write_report:
            return None
        # At the end, since matplotlib takes a second to import.
        from frozen_peft.report.page import write_report

        return write_report(self._folder)[0]

    def _made_examples(self, load_held_out: Callable[[], Any]) -> dict[str, Any]:
        found = self._decided(load_held_out)
        answers = getattr(self._trainer, "own_answers", [])
        return found | ({"own_answers": answers} if answers else {})

    def _decided(self, load_held_out: Callable[[], Any]) -> dict[str, Any]:
        trainer, settings = self._trainer, self._examples
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        if trainer.accelerator.num_processes == 1:
            return make_examples(model, tokenizer, load_held_out(), settings)
        # The other processes are not there to gather weights that may be spread over all.
        found = make_examples(model, tokenizer, None, ExampleSettings(0, settings.max_new_tokens))
        found["notes"].append("none are generated in a run of several processes")
        return found


class PeakMemory:
    """The most memory that is taken from here on: what PyTorch has allocated on the GPU, else what is resident.

    It is exact, and free while a run goes on, since the system keeps it anyway.

    Where the system cannot begin a new peak (outside Linux), the process's own counts, and what is above the model is
    known only if that peak has moved since.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._has_own_peak = True
        if self._on_gpu:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
            self._start = sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            self._has_own_peak = False
        self._start, self._peak_before = psutil.Process().memory_info().rss, self._resident_peak()

    def read(self) -> dict[str, Any]:
        """The content of `memory.json`.

        - `peak_bytes`: the peak, the model included.
        - `peak_bytes_above_model`: the peak above what was there at the start, null where that is not known.
        - `how`: `cuda` or `rss`.
        """
        if self._on_gpu:
            peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
            return {"peak_bytes_above_model": peak - self._start, "peak_bytes": peak, "how": "cuda"}
        peak = self._resident_peak()
        known = self._has_own_peak or peak > self._peak_before
        # Pages that the system has taken back since would make it negative.
        above = max(peak - self._start, 0) if known else None
        return {"peak_bytes_above_model": above, "peak_bytes": peak, "how": "rss"}

    def _resident_peak(self) -> int:
        if self._has_own_peak:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        # Kibibytes, but bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_recipe(path: Path, fields: dict[str, Any]) -> None:
    """Writes a run's settings as a recipe, without secrets, whole or not at all.

    Args:
        path: The file.
        fields: Names and values as `RecipeParser.given` has them.
    """
    kept, left_out = without_secrets(fields)
    lines = [f"#\n# Secret, and so to be given again: {', '.join(left_out)}\n"] if left_out else []
    with whole_file(path) as file:
        file.write(_RECIPE_HEAD)
        file.writelines(lines)
        file.write("\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=119))


def versions() -> dict[str, str | None]:
    """The content of `versions.json`: what the run ran with; null for a library that is not installed."""
    found: dict[str, str | None] = {"frozen_peft": installed_version("frozen-peft")}
    found |= {name: installed_version(name) for name in _LIBRARIES}
    return found | {"python": platform.python_version(), "device": _device()}


def _write_json(path: Path, values: Any) -> None:
    """Writes JSON, whole or not at all."""
    with whole_file(path) as file:
        # Escaped, so that half a surrogate pair in a sample does no harm.
        json.dump(values, file, indent=1, allow_nan=False)
        file.write("\n")


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        return str(accelerator)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"

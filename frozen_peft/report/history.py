# SPDX-License-Identifier: Apache-2.0
"""What a run's log says: losses by step, and where time and context tokens went."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frozen_peft.report.plots import Point
from frozen_peft.report.run_folder import RunFolder

__all__ = ["TIME_PARTS_EXPLAINED", "History", "read_history"]

_EVAL_LOSS = re.compile(r"eval_(?:(?P<name>.+)_)?loss")
# Parts of the time by the figures that are logged of them, in the order in which they are shown. `compute` is the
# first three together, and counts where a log has none of those.
_TIME_PARTS = {
    "context/prefill_seconds": ("prefill", "encoding contexts, or finding them encoded"),
    "context/decision_seconds": ("decision", "forward and backward of decisions over their contexts"),
    "distill/teacher_seconds": ("teacher", "what the teacher says to decisions"),
    "time/compute_seconds": ("forward, backward", "forward and backward of whole samples"),
    "time/data_seconds": ("data", "waiting for the samples of a step"),
    "time/evaluation_seconds": ("held-out loss", "evaluation between steps"),
    "time/saving_seconds": ("checkpoints", "saving between steps"),
}
_OTHER = "the rest"
# What each of them is, for the page's table.
TIME_PARTS_EXPLAINED = dict(_TIME_PARTS.values()) | {_OTHER: "optimizer, logs, setting up"}


@dataclass
class History:
    """What was logged.

    Attributes:
        losses: Training loss by step.
        held_out: Held-out losses by step, for each set of held-out samples by its name.
        seconds: Seconds of each part of the time, in order; without what was not logged.
        wall_seconds: All of the time; None where it was not logged.
        encoded: Context tokens encoded since the last log, by step.
        reused: Context tokens reused, likewise.
        num_tokens: Tokens trained on; None where they were not counted.
    """

    losses: list[Point] = field(default_factory=list)
    held_out: dict[str, list[Point]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: float | None = None
    encoded: list[Point] = field(default_factory=list)
    reused: list[Point] = field(default_factory=list)
    num_tokens: float | None = None


def read_history(run: RunFolder) -> History:
    """Reads the trainer's log and the held-out results; an error of a look-up or a type where they are malformed."""
    state = run.files.get("trainer_state.json", {"global_step": 1, "log_history": []})
    results = [(0, run.files.get("eval_before_results.json", {}))]
    results += [(entry["step"], entry) for entry in state["log_history"]]
    results.append((state["global_step"], run.files.get("eval_results.json", {})))
    history = History()
    held_out: dict[str, dict[float, float]] = defaultdict(dict)
    seconds: dict[str, float] = defaultdict(float)
    for step, entry in results:
        for key, value in entry.items():
            if match := _EVAL_LOSS.fullmatch(key):
                held_out[match["name"] or "held-out"][step] = value
    for entry in state["log_history"]:
        step = entry["step"]
        if "loss" in entry:
            history.losses.append((step, entry["loss"]))
        if "context/tokens_encoded" in entry:
            history.encoded.append((step, entry["context/tokens_encoded"]))
            history.reused.append((step, entry["context/tokens_reused"]))
        history.num_tokens = entry.get("num_tokens", history.num_tokens)
        if "time/wall_seconds" in entry:
            history.wall_seconds = (history.wall_seconds or 0.0) + entry["time/wall_seconds"]
        for key in _times_of(entry):
            seconds[key] += entry[key]
    history.held_out = {name: sorted(points.items()) for name, points in held_out.items()}
    history.seconds = {title: seconds[key] for key, (title, _) in _TIME_PARTS.items() if key in seconds}
    if history.wall_seconds is not None:
        history.seconds[_OTHER] = max(history.wall_seconds - sum(history.seconds.values()), 0.0)
    return history


def _times_of(entry: Mapping[str, Any]) -> list[str]:
    """Figures of time in a log, each second in one of them."""
    has_contexts = "context/prefill_seconds" in entry
    return [key for key in _TIME_PARTS if key in entry and not (key == "time/compute_seconds" and has_contexts)]

# SPDX-License-Identifier: Apache-2.0
"""What a run's log says: losses by step, and where time and context tokens went."""

import functools
import re
from collections import defaultdict
from dataclasses import dataclass, field

from frozen_peft.report.plots import Point
from frozen_peft.report.run_folder import RunFolder
from frozen_peft.report.values import Found

__all__ = ["HELD_OUT", "TIME_PARTS_EXPLAINED", "History", "read_history"]

# The held-out samples, where they have no name.
HELD_OUT = "held-out"
_EVAL_LOSS = re.compile(r"eval_(?:(?P<name>.+)_)?loss")
# Parts of the time by the figures that are logged of them, in the order in which they are shown. `compute` is the
# first three together, and counts where a log has none of those.
_TIME_PARTS = {
    "context/prefill_seconds": "prefill",
    "context/decision_seconds": "decision",
    "distill/teacher_seconds": "teacher",
    "time/compute_seconds": "forward, backward",
    "time/data_seconds": "data",
    "time/evaluation_seconds": "held-out loss",
    "time/saving_seconds": "checkpoints",
}
_COMPUTE = "time/compute_seconds"
_OTHER = "the rest"
# What each of them is, for the page's table.
TIME_PARTS_EXPLAINED = {
    "prefill": "encoding contexts, or finding them encoded",
    "decision": "forward and backward of decisions over their contexts",
    "teacher": "what the teacher says to decisions",
    "forward, backward": "forward and backward of whole samples",
    "data": "waiting for the samples of a step",
    "held-out loss": "evaluation between steps",
    "checkpoints": "saving between steps",
    _OTHER: "optimizer, logs, setting up",
}


@dataclass
class History:
    """What was logged.

    Attributes:
        losses: Training loss by step.
        held_out: Held-out losses by step, for each set of held-out samples by its name.
        seconds: Seconds of each part of the time, in order; without what was not logged.
        wall_seconds: All of the time; None where it was not logged.
        tokens: Per log: step, context tokens encoded, context tokens reused.
        num_tokens: Tokens trained on; None where they were not counted.
        global_step: Steps that were taken.
        max_steps: Steps that there were to be; None where it is not known.
        epoch: Passes over the training samples; None where it is not known.
    """

    losses: list[Point] = field(default_factory=list)
    held_out: dict[str, list[Point]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: float | None = None
    tokens: list[tuple[float, float, float]] = field(default_factory=list)
    num_tokens: float | None = None
    global_step: int | None = None
    max_steps: int | None = None
    epoch: float | None = None


@functools.lru_cache(maxsize=1)
def read_history(run: RunFolder) -> History:
    """Reads the trainer's state and the held-out results, once for each run.

    Raises:
        MalformedError: One of them is not as it should be.
    """
    history = History()
    held_out: dict[str, dict[float, float]] = defaultdict(dict)
    state = run.files.get("trainer_state.json")
    if state is not None:
        history.global_step = state["global_step"].count()
        history.max_steps = None if (steps := state.get("max_steps")) is None else steps.count() or None
        history.epoch = None if (epoch := state.get("epoch")) is None else epoch.number()
        _read_log(state["log_history"].rows(), history, held_out)
    last = history.global_step if history.global_step is not None else 1
    for name, step in (("eval_before_results.json", 0), ("eval_results.json", last)):
        if name in run.files:
            for key, value in run.files[name].items():
                if match := _EVAL_LOSS.fullmatch(key):
                    held_out[match["name"] or HELD_OUT][step] = value.number_or_nan()
    history.held_out = {name: sorted(points.items()) for name, points in held_out.items()}
    return history


def _read_log(entries: list[Found], history: History, held_out: dict[str, dict[float, float]]) -> None:
    seconds: dict[str, float] = defaultdict(float)
    wall = [value.number() for entry in entries if (value := entry.get("time/wall_seconds")) is not None]
    for entry in entries:
        step = entry["step"].number()
        for key, value in entry.items():
            if match := _EVAL_LOSS.fullmatch(key):
                held_out[match["name"] or HELD_OUT][step] = value.number_or_nan()
        if (loss := entry.get("loss")) is not None:
            history.losses.append((step, loss.number_or_nan()))
        if (num_tokens := entry.get("num_tokens")) is not None:
            history.num_tokens = num_tokens.number()
        if (encoded := entry.get("context/tokens_encoded")) is not None:
            history.tokens.append((step, encoded.number(), entry["context/tokens_reused"].number()))
        has_contexts = entry.get("context/prefill_seconds") is not None
        for key in _TIME_PARTS:
            if (value := entry.get(key)) is not None and not (key == _COMPUTE and has_contexts):
                seconds[key] += value.number()
    history.seconds = {title: seconds[key] for key, title in _TIME_PARTS.items() if key in seconds}
    if wall:
        history.wall_seconds = sum(wall)
        history.seconds[_OTHER] = max(history.wall_seconds - sum(history.seconds.values()), 0.0)

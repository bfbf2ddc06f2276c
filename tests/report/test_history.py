# SPDX-License-Identifier: Apache-2.0
"""Times and tokens are sums over the log, each second counted once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frozen_peft.report.plots import MAX_POINTS, thinned
from frozen_peft.report.run_folder import RunFolder
from frozen_peft.report.training_sections import read_history

SECONDS = st.floats(0, 100)
LOGS = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(1, 9), "time/wall_seconds": st.floats(500, 600), "time/compute_seconds": SECONDS},
        optional={
            "time/data_seconds": SECONDS,
            "time/saving_seconds": SECONDS,
            "contexts": st.tuples(SECONDS, SECONDS, st.integers(0, 99), st.integers(0, 99)),
        },
    ),
    min_size=1,
    max_size=6,
)


def history(*entries: dict[str, Any], **files: Any) -> Any:
    state = {"global_step": 9, "log_history": list(entries)}
    found = {"trainer_state.json": state} | {name.replace("__", "."): content for name, content in files.items()}
    return read_history(RunFolder(Path(), found))


def as_logged(entry: dict[str, Any]) -> dict[str, Any]:
    logged = {name: value for name, value in entry.items() if name != "contexts"}
    if "contexts" in entry:
        names = ("prefill_seconds", "decision_seconds", "tokens_encoded", "tokens_reused")
        logged |= {f"context/{name}": value for name, value in zip(names, entry["contexts"], strict=True)}
    return logged


@given(LOGS)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_parts_of_the_time_come_to_all_of_it(entries: list[dict[str, Any]]) -> None:
    found = history(*map(as_logged, entries))
    expected: dict[str, float] = {}
    for entry in entries:
        parts = {"data": entry.get("time/data_seconds"), "checkpoints": entry.get("time/saving_seconds")}
        if "contexts" in entry:
            parts |= {"prefill": entry["contexts"][0], "decision": entry["contexts"][1]}
        else:
            parts["forward, backward"] = entry["time/compute_seconds"]
        for name, value in parts.items():
            if value is not None:
                expected[name] = expected.get(name, 0.0) + value
    wall = sum(entry["time/wall_seconds"] for entry in entries)
    assert found.wall_seconds == pytest.approx(wall)
    assert {name: found.seconds[name] for name in expected} == pytest.approx(expected)
    assert found.seconds.keys() == expected.keys() | {"the rest"}
    assert sum(found.seconds.values()) == pytest.approx(wall)
    with_contexts = [entry for entry in entries if "contexts" in entry]
    assert found.encoded == [(entry["step"], entry["contexts"][2]) for entry in with_contexts]
    assert found.reused == [(entry["step"], entry["contexts"][3]) for entry in with_contexts]


def test_without_a_whole_there_is_no_rest() -> None:
    found = history({"step": 1, "context/prefill_seconds": 2.0, "context/decision_seconds": 1.0})
    assert found.seconds == {"prefill": 2.0, "decision": 1.0}
    assert found.wall_seconds is None


def test_held_out_losses_of_every_set_in_order() -> None:
    found = history(
        {"step": 6, "eval_loss": 1.5},
        {"step": 3, "eval_hard_loss": 3.0},
        {"step": 6, "loss": 1.0},
        eval_before_results__json={"eval_loss": 2.0, "eval_hard_loss": 4.0, "eval_runtime": 1.0},
        eval_results__json={"eval_loss": 1.0},
    )
    assert found.held_out == {"held-out": [(0, 2.0), (6, 1.5), (9, 1.0)], "hard": [(0, 4.0), (3, 3.0)]}
    assert found.losses == [(6, 1.0)]


@given(st.integers(0, 3000))
def test_thinned_points_are_means_of_all(count: int) -> None:
    points = [(float(step), float(step * step)) for step in range(count)]
    found = thinned(points)
    assert len(found) <= MAX_POINTS
    if count <= MAX_POINTS:
        assert found == points
    else:
        size = -(-count // MAX_POINTS)
        groups = [points[start : start + size] for start in range(0, count, size)]
        assert found == [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]

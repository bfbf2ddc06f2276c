# SPDX-License-Identifier: Apache-2.0
"""`make bench-gpu` on the stand-in for a card, and what each of its failures leaves."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu import __main__ as program
from tests.benchmarks.gpu import install, methods, profiles, session
from tests.benchmarks.gpu.device import Budget, Device
from tests.benchmarks.gpu.methods import COMPILED, METHODS
from tests.benchmarks.gpu.schedule import SMOKE, Plan
from tests.benchmarks.gpu.session import Session
from tests.benchmarks.gpu.shapes import SMOKE_MODELS
from tests.card import Card, stand_in_card


def run_on_stand_in(folder: Path, patch: pytest.MonkeyPatch, plan: Plan = SMOKE) -> tuple[dict[str, Any], Card]:
    """All of it but the profiler and the compiler, which take a real card, with a tiny model; its results."""
    patch.setattr(program, "FULL", plan)
    patch.setattr(program, "MODELS", SMOKE_MODELS)
    patch.setattr(session, "matmul_rate", lambda *_: 1e12)
    patch.setattr(profiles, "profiled", lambda device, run: {"gaps": float(run() is None)})
    patch.setattr(methods, "compiled_fields", lambda device: {})
    with stand_in_card() as card:
        assert program.main(["--seconds", "1e6", "--output", str(folder)]) == 0
    return json.loads((folder / "gpu.json").read_text()), card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_whole_of_it_runs_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, card = run_on_stand_in(tmp_path, monkeypatch)
    assert results["facts"]["device"].startswith("NVIDIA H100 (none), 80.0 GiB")
    assert all(parity["holds"] for parity in results["parity"])
    rows = results["measurements"]
    assert {row["method"] for row in rows} == {*METHODS, COMPILED}
    assert {(row["outcome"], row["note"]) for row in rows} == {("measured", "")}
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert all(row["peak_over_plan"] is not None for row in rows if row["method"] == "tier 2")
    assert {"aten.bmm.dtype", "aten._scaled_dot_product_flash_attention.default"} <= card.calls
    assert {"set_per_process_memory_fraction", "reset_peak_memory_stats"} <= card.calls


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A smoke run of which nothing takes time: parity holds, models are nothing, each measurement is made up."""
    monkeypatch.setattr(session, "check_parity", lambda device: [])
    monkeypatch.setattr(session, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(Session, "_built", lambda self, shape, config: (0.0, torch.nn.Linear(1, 1)))
    monkeypatch.setattr(Session, "_profile", lambda *_: None)
    monkeypatch.setattr(session, "planned_bytes", lambda *_: 1)
    monkeypatch.setattr(methods, "_measured", measured())
    return Session(Device("cpu"), SMOKE, SMOKE_MODELS, Budget(1e9), tmp_path, "gpu", "a test")


def measured(failing: str = "", error: BaseException | None = None) -> Callable[..., methods.Measurement]:
    def measure(method: Any, name: str, model: Any, device: Any, *rest: Any) -> methods.Measurement:
        if method == failing:
            assert error is not None
            raise error
        return methods.Measurement(name, method, *rest[:3], step_seconds=1.0, prefill_seconds=0.5)

    return measure


def outcomes(made: Session) -> dict[tuple[str, int | None], str]:
    rows = json.loads((made.folder / "gpu.json").read_text())["measurements"]
    return {(row["method"], row["cap_gib"]): row["outcome"] for row in rows}


def page(made: Session) -> str:
    return (made.folder / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 7 GiB.\nmore"), "out of memory", "out of memory"),
        (AssertionError("no kernel\nmore"), "failed", "- tiny-nf4, SFTTrainer, 128 tokens: AssertionError: no kernel"),
        (RuntimeError("Triton Error [CUDA]: x"), "failed", "RuntimeError: Triton Error [CUDA]: x"),
    ],
    ids=["memory", "assertion", "kernel"],
)
def test_one_step_that_fails_takes_no_other_with_it(
    error: Exception, outcome: str, said: str, made: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "_measured", measured("SFTTrainer", error))
    assert made.run() is (outcome == "out of memory")
    found = outcomes(made)
    assert found.pop(("SFTTrainer", None)) == outcome
    assert set(found.values()) == {"measured"}
    assert said in page(made)


def test_a_card_that_no_longer_answers_ends_it(made: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        methods, "_measured", measured("tier 3, stretches", RuntimeError("CUDA error: illegal access"))
    )
    monkeypatch.setattr(Device, "answers", lambda self: False)
    assert made.run() is False
    found = outcomes(made)
    assert found == {("tier 2", None): "measured", ("tier 2, reused", None): "measured",
                     ("tier 3, stretches", None): "failed"}  # fmt: skip
    assert "CUDA error: illegal access" in page(made)
    assert "the card no longer answers" in page(made)


def test_an_interruption_keeps_what_was_measured(made: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_measured", measured("SFTTrainer", KeyboardInterrupt()))
    assert made.run() is False
    assert list(outcomes(made).values()) == ["measured"] * 3
    assert "everything after that: it was interrupted" in page(made)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("check_parity", "everything: the kernels of this device could not be run: ValueError: broken"),
        ("matmul_rate", "everything after that: ValueError: broken"),
        ("planned_bytes", "everything after that: ValueError: broken"),
    ],
)
def test_what_breaks_elsewhere_is_named(what: str, said: str, made: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken\nby more")

    monkeypatch.setattr(session, what, broken)
    assert made.run() is False
    assert said in page(made)


def test_a_model_or_a_profile_that_breaks_is_passed_over(made: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(Session, "_profile", broken)
    assert made.run() is True
    assert "tiny-nf4: the profile: ValueError: broken" in page(made)
    assert set(outcomes(made).values()) == {"measured"}
    monkeypatch.setattr(Session, "_built", broken)
    made.run()
    assert "tiny-nf4: could not be built: ValueError: broken" in page(made)


def test_why_there_is_no_card_is_what_pytorch_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    for cuda, said in ((None, "built without CUDA"), ("13.0", "for CUDA 13.0: The NVIDIA driver on your system is")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(SystemExit):
            program.main([])
        assert said in capsys.readouterr().err


def pip(failing: dict[str, str], broken: tuple[str, ...] = ()) -> tuple[Callable[..., Any], list[list[str]]]:
    """Stands in for `run_within`: what cannot be installed, with what is said; what cannot load."""
    calls: list[list[str]] = []

    def run(
        command: list[str], limit_seconds: float | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        calls.append(command[2:] if command[1] == "-c" else command[3:])
        if command[1] == "-c":
            failed = any(module in command[2] for module in broken)
            return subprocess.CompletedProcess(command, failed, "ImportError: undefined symbol" * failed)
        said = next((text for name, text in failing.items() if any(name in part for part in command)), None)
        if said == "forever":
            assert limit_seconds is not None
            raise subprocess.TimeoutExpired(command, limit_seconds)
        compiles = said == "URLError: no network" and "CAUSAL_CONV1D_FORCE_BUILD" in (environment or {})
        return subprocess.CompletedProcess(command, said is not None and not compiles, said or "")

    return run, calls


FAILURES = [
    (
        {"causal": "NameError: name 'bare_metal_version'"},
        (),
        None,
        "NOT installed (it has to be compiled",
    ),
    ({"causal": "RuntimeError: CUDA mismatch"}, (), "/usr/local/cuda", "NOT installed: RuntimeError: CUDA mismatch"),
    ({"causal": "URLError: no network"}, (), "/usr/local/cuda", "causal-conv1d: installed"),
    ({"causal": "forever"}, (), "/usr/local/cuda", "NOT installed: it took more than 900 s"),
    ({}, ("causal_conv1d",), "/usr/local/cuda", "NOT usable here, and removed again: ImportError: undefined symbol"),
]


@pytest.mark.parametrize(("failing", "broken", "toolkit", "said"), FAILURES)
def test_a_kernel_package_that_fails_takes_no_other_with_it(
    failing: dict[str, str],
    broken: tuple[str, ...],
    toolkit: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(install.cpp_extension, "CUDA_HOME", toolkit)
    run, calls = pip(failing, broken)
    assert install.main(["-c", "constraints.txt"], run) == 0
    printed = capsys.readouterr().out
    assert "== flash-linear-attention: installed\n" in printed
    assert said in printed
    installed = [call for call in calls if call[0] == "install" and "setuptools" not in call]
    assert all({"--no-build-isolation", "constraints.txt"} <= set(call) for call in installed)
    assert (["uninstall", "-y", "causal-conv1d"] in [call[:3] for call in calls]) is bool(broken)


def test_without_a_card_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run, calls = pip({})
    assert install.main([], run) == 0
    assert calls == []
    assert "no card was found" in capsys.readouterr().out


def test_what_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """A compiler that outlives pip holds its pipes open, and computes beside what is measured."""
    mark = tmp_path / "alive"
    with pytest.raises(subprocess.TimeoutExpired):
        install.run_within(["sh", "-c", f"(sleep 4; touch {mark}) & sleep 60"], 0.5)
    time.sleep(5)
    assert not mark.exists()
    assert install.run_within(["sh", "-c", "echo out; echo $NAME >&2"], 9, {"NAME": "err"}).stdout == "out\nerr\n"

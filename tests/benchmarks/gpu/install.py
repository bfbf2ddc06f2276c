# SPDX-License-Identifier: Apache-2.0
"""Installs what speeds up a GPU, one package after the other, so that one that fails takes no other with it.

    python -m tests.benchmarks.gpu.install [-c constraints.txt]

Those are the requirements of the extra `cuda`. causal-conv1d has no wheel on the index: its own build looks for one on
GitHub, and compiles it where there is none, which needs a CUDA toolkit. It is built with the PyTorch that is installed
here (`--no-build-isolation`), since pip would fetch another for the build, whose result this one could not load.
"""

import argparse
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

import torch
from packaging.requirements import Requirement
from torch.utils import cpp_extension

BUILD_TOOLS = ("setuptools", "wheel", "ninja")
# Compiling for every architecture takes minutes; a card is paid for by the hour.
LIMIT_SECONDS = 900
# By the name on the index, where modules are called otherwise.
MODULES = {"flash-linear-attention": "fla.ops.gated_delta_rule"}
# What brings the module that is imported, where that is another.
PARTS = {"flash-linear-attention": ("fla-core",)}
# Has causal-conv1d compile without looking for a wheel, which fails where there is no network but the index.
WITHOUT_LOOKING = {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_within(
    command: list[str], limit_seconds: float | None = None, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs a command and takes what it prints; past its time it is ended with the compilers that it has started.

    Raises:
        TimeoutExpired: It took longer.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | dict(environment or {}),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_seconds)
    except BaseException:
        # Also where it is interrupted; what they compile would take the time of what is measured.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def requirements() -> list[Requirement]:
    """Of the extra `cuda` on this platform."""
    found = [Requirement(text) for text in importlib.metadata.requires("frozen-peft") or ()]
    return [each for each in found if each.marker is not None and each.marker.evaluate({"extra": "cuda"})
            and not each.marker.evaluate({"extra": ""})]  # fmt: skip


def install(requirement: Requirement, options: list[str], run: Run) -> str:
    """Installs one package, and removes it where it cannot be imported; what came of it, in words."""
    text = f"{requirement.name}{requirement.specifier}"
    environments: list[Mapping[str, str]] = [{}]
    if cpp_extension.CUDA_HOME is not None:
        environments.append(WITHOUT_LOOKING)
    for environment in environments:
        try:
            done = _pip(["install", "--no-build-isolation", *options, text], run, environment)
        except subprocess.TimeoutExpired:
            return f"NOT installed: it took more than {LIMIT_SECONDS} s"
        if done.returncode == 0:
            break
    else:
        compiler = "" if len(environments) > 1 else " (it has to be compiled, and no CUDA toolkit was found)"
        return f"NOT installed{compiler}: {_last_error(done.stdout)}"
    module = MODULES.get(requirement.name, requirement.name.replace("-", "_"))
    tried = run([sys.executable, "-c", f"import {module}"])
    if tried.returncode:
        # transformers would import it with the models that it could speed up.
        _pip(["uninstall", "-y", requirement.name, *PARTS.get(requirement.name, ())], run, {})
        return f"NOT usable here, and removed again: {_last_error(tried.stdout)}"
    return "installed"


def main(arguments: list[str] | None = None, run: Run = run_within) -> int:
    """Installs what can be, says what cannot and why, and goes on either way."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu.install")
    parser.add_argument("-c", dest="constraints", help="pip's file of constraints")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        # Where Triton finds no driver, they break the import of the models that they are for.
        print("== no card was found, so its kernels are not installed")
        return 0
    options = ["-c", given.constraints] if given.constraints else []
    _pip(["install", *options, *BUILD_TOOLS], run, {})
    for requirement in requirements():
        print(f"== {requirement.name} ...", flush=True)
        print(f"== {requirement.name}: {install(requirement, options, run)}", flush=True)
    return 0


def _pip(arguments: list[str], run: Run, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    return run(command, LIMIT_SECONDS, environment)


def _last_error(output: str) -> str:
    """The last line that names an exception, which a build ends with; else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:200]


if __name__ == "__main__":
    sys.exit(main())

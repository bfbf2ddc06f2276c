# SPDX-License-Identifier: Apache-2.0
"""Measures models of true shape on one GPU, and writes a page with every figure behind it.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --smoke --output outputs/smoke

Without a GPU only `--smoke` runs: the same code with tiny models, whose figures mean nothing. Exits with 1 where the
kernels of the device disagree with the reference, which is checked first.
"""

import argparse
import sys
from pathlib import Path

import torch

from tests.benchmarks.gpu.device import Budget, Device
from tests.benchmarks.gpu.schedule import FULL, SMOKE
from tests.benchmarks.gpu.session import Session
from tests.benchmarks.gpu.shapes import MODELS, SMOKE_MODELS

RESULTS = Path(__file__).parents[3] / "docs" / "benchmarks"
# Under eight minutes, with what comes before and after the measurements.
SECONDS = 440.0


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, to prove the logic")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time for all measurements (default %(default)s)"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of " + ", ".join(m.name for m in MODELS))
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default docs/benchmarks; needed by --smoke)"
    )
    given = parser.parse_args(arguments)
    if given.smoke and given.output is None:
        parser.error("--smoke needs --output: its figures mean nothing, and do not belong beside measured ones")
    if not given.smoke and not torch.cuda.is_available():
        parser.error(
            f"no CUDA device was found ({_why_no_card()}); --smoke runs the same code on a CPU with tiny models"
        )
    known = SMOKE_MODELS if given.smoke else MODELS
    wanted = given.models or [model.name for model in known]
    if unknown := set(wanted) - {model.name for model in known}:
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(model.name for model in known)}")
    session = Session(
        Device("cpu" if given.smoke else "cuda"),
        SMOKE if given.smoke else FULL,
        tuple(model for model in known if model.name in wanted),
        Budget(given.seconds),
        given.output or RESULTS,
        "gpu_smoke" if given.smoke else "gpu",
        "python -m tests.benchmarks.gpu" + (" --smoke" if given.smoke else ""),
    )
    holds = session.run()
    print((session.folder / f"{session.name}.md").read_text(encoding="utf-8"))
    return 0 if holds else 1


def _why_no_card() -> str:
    """What PyTorch says: no card, no driver, one that is too old for this build, or a build for CPUs."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}: {str(error).splitlines()[0]}"
    return "no card is visible; see CUDA_VISIBLE_DEVICES"


if __name__ == "__main__":
    sys.exit(main())

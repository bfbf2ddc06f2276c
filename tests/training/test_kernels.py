# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention installed on a machine without a GPU: training runs the PyTorch reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frozen_peft import FrozenContextTrainer
from tests.training.runs import adapted, as_dataset, config, samples, train

ROOT = Path(__file__).parent.parent.parent

# What flash-linear-attention 0.6 with Triton 3.7 does on such a machine: it imports, and fails at the first call.
FAKE_FLA = """\
def _no_driver(q, k, v, **kwargs):
    raise RuntimeError("0 active drivers ([]). There should only be one.")

chunk_gated_delta_rule = fused_recurrent_gated_delta_rule = _no_driver
"""

PROGRAM = """\
import json, sys
import torch
from pathlib import Path
from tests.training.runs import adapted, as_dataset, config, samples, train
from frozen_peft import FrozenContextTrainer

folder = Path(sys.argv[1])
model = adapted()
try:
    with torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None])
    plain = "works"
except RuntimeError as error:
    plain = str(error)
run = train(FrozenContextTrainer, model, config(folder), as_dataset(samples()), eval_dataset=as_dataset(samples()))
evaluated = run.trainer.evaluate()["eval_loss"]
print("RESULT " + json.dumps({"plain": plain, "losses": run.losses, "eval_loss": evaluated}))
"""


@pytest.mark.slow
def test_with_flash_linear_attention_and_no_gpu(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    for package in ("fla", "fla/ops", "fla/ops/gated_delta_rule"):
        folder = packages / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(FAKE_FLA if package.count("/") == 2 else "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "with")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    with_fla = json.loads(line.removeprefix("RESULT "))

    dataset = as_dataset(samples())
    run = train(FrozenContextTrainer, adapted(), config(tmp_path / "without"), dataset, eval_dataset=dataset)
    # The stand-in is what transformers runs, and fails as the real one does.
    assert "0 active drivers" in with_fla["plain"]
    assert with_fla["losses"] == run.losses
    assert with_fla["eval_loss"] == run.trainer.evaluate()["eval_loss"]

# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed ZeRO-2 on two processes computes what one process does; where it is installed, which it need not be."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.deepspeed_cases import CASES, run
from tests.distributed.ranks import start_ranks

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        # Its accelerator is chosen when it is imported.
        patch.setenv("DS_ACCELERATOR", "cpu")
        ended = start_ranks("tests.distributed.deepspeed_cases", folder, timeout=500.0)
    assert [one.code for one in ended] == [0, 0], ended[0].output[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(
    case: str, adapters: bool, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = run(tmp_path, case, adapters=adapters, samples_per_process=2)
    assert len(expected) == 3
    for rank in ranks:
        for ours, plain in zip(rank[f"{case}-{adapters}"], expected, strict=True):
            assert ours == pytest.approx(plain, rel=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Whether `datasets` still needs what is not public of it."""

import subprocess
import sys

HASHES = """
from datasets import IterableDataset
from datasets.fingerprint import Hasher
from frozen_peft.utils.compat.datasets import computed_by

def rows(count):
    yield from ({"number": number} for number in range(count))

def stream(step):
    made = IterableDataset.from_generator(rows, gen_kwargs={"count": 3})
    return made.map(lambda row: {"number": row["number"] + step})

print(Hasher.hash(stream(1)), Hasher.hash(computed_by(stream(1))), Hasher.hash(computed_by(stream(2))))
"""


def test_equal_streams_have_equal_hashes_by_what_they_compute_alone() -> None:
    """Once they have by themselves, `computed_by` is not needed any more."""
    hashes = [
        subprocess.run([sys.executable, "-c", HASHES], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(2)
    ]
    (whole, by_computation, of_another), (whole_again, by_computation_again, _) = hashes
    assert by_computation == by_computation_again
    assert by_computation != of_another
    assert whole != whole_again

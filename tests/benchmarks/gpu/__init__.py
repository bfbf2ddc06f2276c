# SPDX-License-Identifier: Apache-2.0
"""Models of true shape on one GPU: what fits, how long a step takes, and where the time goes.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --smoke

The first takes under eight minutes on one large GPU and writes `gpu.json` and `gpu.md` to `docs/benchmarks`; the
second runs the same code on a CPU with tiny shapes, to prove the logic and nothing else.
"""

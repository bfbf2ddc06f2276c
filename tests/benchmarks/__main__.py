# SPDX-License-Identifier: Apache-2.0
"""Measures what training costs, and writes pages about it with every figure behind them to `docs/benchmarks`.

    python -m tests.benchmarks
    python -m tests.benchmarks staleness

Pages: `step` (one training step against `SFTTrainer` and the bare cost), `reuse` (contexts that come again) and, only
when they are named, `staleness` (what stale contexts save and cost; trains the demo's model many times), `plan`
(what the planner says of memory, against what training takes), `rounding` (what contexts in 8 bit change), `turns`
(turns behind what inference shows), `preference` (one step over a preference pair against `DPOTrainer`) and `policy`
(one step over a model's own answers against `trl.experimental.sdft`).
"""

import argparse
from pathlib import Path

from tests.benchmarks.plan_page import plan_page
from tests.benchmarks.policy_page import policy_page
from tests.benchmarks.preference_page import preference_page
from tests.benchmarks.reuse_page import reuse_page
from tests.benchmarks.rounding_page import rounding_page
from tests.benchmarks.staleness_page import staleness_page
from tests.benchmarks.step_page import CONTEXTS, step_page
from tests.benchmarks.turns_page import turns_page

PAGES = ("step", "reuse", "staleness", "plan", "rounding", "turns", "preference", "policy")
DEFAULT_PAGES = ("step", "reuse")
RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def main() -> None:
    """Makes the pages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=DEFAULT_PAGES, metavar="page", help=f"of {', '.join(PAGES)}")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="context tokens of `step`")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per measurement of `step`")
    parser.add_argument("--assets", type=Path, help="where the demo's model and data are or are built, of `staleness`")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if unknown := set(arguments.pages) - set(PAGES):
        parser.error(f"no page {', '.join(sorted(unknown))}; there are {', '.join(PAGES)}")
    for name in arguments.pages:
        if name == "step":
            page = step_page(arguments.contexts, arguments.steps)
        elif name == "reuse":
            page = reuse_page()
        elif name == "plan":
            page = plan_page()
        elif name == "rounding":
            page = rounding_page()
        elif name == "turns":
            page = turns_page()
        elif name == "preference":
            page = preference_page()
        elif name == "policy":
            page = policy_page()
        else:
            page = staleness_page(arguments.assets, arguments.output)
        page.write(arguments.output)
        print(page.text)


if __name__ == "__main__":
    main()

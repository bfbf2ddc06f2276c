# SPDX-License-Identifier: Apache-2.0
"""`python -m frozen_peft`, which is how `accelerate launch -m` starts the command line on every process."""

import sys

from frozen_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())

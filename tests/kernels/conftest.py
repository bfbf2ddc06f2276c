# SPDX-License-Identifier: Apache-2.0
"""Makes ready what `make kernels` installs; elsewhere there is nothing here to run.

Without `TRITON_INTERPRET` Triton is the one that a card runs, which is left alone.
"""

import importlib.util
import os
import warnings

HAS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1" and all(map(importlib.util.find_spec, ("triton", "fla")))
if HAS_INTERPRETER:
    from tests.kernels.compiled import stand_in_for_compiled_modules
    from tests.kernels.interpreter import mend_interpreter

    stand_in_for_compiled_modules()
    with warnings.catch_warnings():
        # That there is no driver.
        warnings.simplefilter("ignore")
        mend_interpreter()
else:
    collect_ignore_glob = ["test_*.py"]

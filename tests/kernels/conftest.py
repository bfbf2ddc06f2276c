# SPDX-License-Identifier: Apache-2.0
"""Makes ready what `make kernels` installs; without it there is nothing here to run."""

import importlib.util
import warnings

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("fla") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.kernels.compiled import stand_in_for_compiled_modules
    from tests.kernels.interpreter import mend_interpreter

    stand_in_for_compiled_modules()
    with warnings.catch_warnings():
        # That there is no driver.
        warnings.simplefilter("ignore")
        mend_interpreter()

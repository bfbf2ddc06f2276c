# SPDX-License-Identifier: Apache-2.0
"""Installs the Python part, with its Triton kernels, of packages that need a CUDA compiler to be built.

python -m tests.kernels.sources
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

# By package, the folder that is imported. Their setup.py asks for this before it looks for a compiler.
PACKAGES = {"mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}
SKIPPED = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}


def main() -> None:
    """Unpacks them beside the other packages of this environment."""
    site_packages = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        subprocess.run([*command, "--quiet", "--dest", folder, *PACKAGES], env=os.environ | SKIPPED, check=True)
        for path in sorted(Path(folder).glob("*.tar.gz")):
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
            for module in PACKAGES.values():
                source = path.with_name(path.name.removesuffix(".tar.gz")) / module
                if source.is_dir():
                    source.replace(site_packages / module)


if __name__ == "__main__":
    main()

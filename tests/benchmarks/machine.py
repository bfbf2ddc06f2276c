# SPDX-License-Identifier: Apache-2.0
"""Describes the machine and the versions that a benchmark's figures belong to."""

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def describe_machine() -> dict[str, str]:
    """Processor, memory, system and versions, in words."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def processor_name() -> str:
    """The processor's own name (Linux), or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

# SPDX-License-Identifier: Apache-2.0
"""The embedded demo: a tiny pretrained hybrid, its world, and the road from an instruction to a disposition."""

from frozen_peft.demo.data import DemoData, DemoFiles, write_demo_files
from frozen_peft.demo.model import CHECKPOINT

__all__ = ["CHECKPOINT", "DemoData", "DemoFiles", "write_demo_files"]

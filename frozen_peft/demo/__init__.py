# SPDX-License-Identifier: Apache-2.0
"""The embedded demo: a tiny pretrained hybrid, its world, and the road from an instruction to a disposition."""

from frozen_peft.demo.data import DemoData, DemoFiles, write_demo_files
from frozen_peft.demo.names import CHECKPOINT, DEMO_DIR, model_source, resolve_names

__all__ = ["CHECKPOINT", "DEMO_DIR", "DemoData", "DemoFiles", "model_source", "resolve_names", "write_demo_files"]

# SPDX-License-Identifier: Apache-2.0
"""The embedded demo: a tiny hybrid model and questions about the standard library's documentation."""

from frozen_peft.demo.assets import AssetSettings, DemoAssets, ensure_demo_assets
from frozen_peft.demo.job import run_demo

__all__ = ["AssetSettings", "DemoAssets", "ensure_demo_assets", "run_demo"]

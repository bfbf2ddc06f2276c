# SPDX-License-Identifier: Apache-2.0
"""Real text at a small scale: a tiny hybrid trained from scratch, and questions about Python's documentation.

What the demo was before it had a world of its own; benchmarks of reuse still train on it, since its documents share
what real ones do.
"""

from tests.documentation.assets import AssetSettings, DemoAssets, ensure_demo_assets

__all__ = ["AssetSettings", "DemoAssets", "ensure_demo_assets"]

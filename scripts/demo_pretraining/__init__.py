# SPDX-License-Identifier: Apache-2.0
"""What made the checkpoint that the demo ships: run in a checkout, and no part of what is installed."""

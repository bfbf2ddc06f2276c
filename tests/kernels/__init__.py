# SPDX-License-Identifier: Apache-2.0
"""What only a GPU runs of Triton, run on a CPU in Triton's interpreter: right or wrong, not how fast."""

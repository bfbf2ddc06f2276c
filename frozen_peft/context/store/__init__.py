# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts that are kept across steps in memory, and across runs in files."""

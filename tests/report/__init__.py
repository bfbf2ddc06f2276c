# SPDX-License-Identifier: Apache-2.0
"""Tests of the report on a run."""

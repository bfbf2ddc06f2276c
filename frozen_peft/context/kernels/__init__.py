# SPDX-License-Identifier: Apache-2.0
"""Which kernels linear attention runs on: one table of what is exact where, and the choice by it."""

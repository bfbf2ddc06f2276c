# SPDX-License-Identifier: Apache-2.0
"""What is built on beyond what a dependency promises: one module per dependency.

Each function or context manager is headed by the private name it uses, or what it replaces, with the versions in which
that was seen, the reason, and the condition under which it goes. `tests/compat` fails when that condition is met.
"""

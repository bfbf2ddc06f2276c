# SPDX-License-Identifier: Apache-2.0
"""What every side may use and that knows of none of them."""

__all__: list[str] = []

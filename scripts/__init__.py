# SPDX-License-Identifier: Apache-2.0
"""What made things that ship, and does not ship itself."""

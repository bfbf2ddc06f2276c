# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, and the one HTML file that shows it.

All but what is secret is imported from its module: torch and matplotlib take seconds.
"""

from frozen_peft.report.secrecy import is_secret, without_secrets

__all__ = ["is_secret", "without_secrets"]

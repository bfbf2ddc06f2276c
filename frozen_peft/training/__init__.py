# SPDX-License-Identifier: Apache-2.0
"""One class per trainer of TRL, each a delta, and what they share."""

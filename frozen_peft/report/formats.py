# SPDX-License-Identifier: Apache-2.0
"""Numbers and texts as the page shows them."""

import math
import re

__all__ = ["loss_text", "seconds_text", "visible"]

# Characters that are not seen, or that move others about: controls but tab and line break, marks of direction,
# invisible spaces, half surrogate pairs and what no text may hold.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Writes out characters that would not be seen, or would change how others are."""
    return _HIDDEN.sub(_written_out, text.replace("\r\n", "\n"))


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Unicode has pictures of the first controls.
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"


def loss_text(loss: float) -> str:
    """A loss, in nats."""
    return f"{loss:.4f}" if math.isfinite(loss) else "not a number"


def seconds_text(seconds: float) -> str:
    """A time in the units that fit it."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"

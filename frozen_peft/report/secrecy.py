# SPDX-License-Identifier: Apache-2.0
"""Settings without what must not be handed on with them: tokens, keys, passwords."""

import json
import re
from typing import Any

__all__ = ["is_secret", "without_secrets"]

# The last words of a field's name that say so. `eos_token` and its kin are text of the tokenizer's.
_SECRET_NAME = re.compile(
    r"(^|_|-)(token|tokens|password|passwd|secret|secrets|api_?key|credentials?)$", re.IGNORECASE
)
_TOKENIZER_NAME = re.compile(r"^(eos|bos|pad|unk|sep|cls|mask|image|audio|video)_tokens?$")
# Values that say so by themselves: tokens of the hub and of other services, and what is before the @ of an address.
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})|(?<=://)[^/@\s]+(?=@)"
)
HIDDEN = "(not written)"


def is_secret(name: str) -> bool:
    """Says whether a field of this name may hold a secret."""
    return bool(_SECRET_NAME.search(name)) and not _TOKENIZER_NAME.match(name)


def without_secrets(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leaves out what may be a secret, at any depth, in objects that are written as JSON text too.

    Args:
        values: Fields and their values, as YAML or JSON hold them.

    Returns:
        The others, and the names of the fields that were left out. A token in the midst of a text is replaced there.
    """
    left_out: list[str] = []
    return _clean(values, "", left_out), left_out


def _clean(value: Any, place: str, left_out: list[str]) -> Any:
    if isinstance(value, dict):
        kept = {}
        for name, item in value.items():
            inner = f"{place}.{name}" if place else str(name)
            if is_secret(str(name)) and not _is_harmless(str(name), item):
                left_out.append(inner)
            else:
                kept[name] = _clean(item, inner, left_out)
        return kept
    if isinstance(value, list | tuple):
        return [_clean(item, place, left_out) for item in value]
    if isinstance(value, str):
        return _clean_text(value, place, left_out)
    return value


def _is_harmless(name: str, value: Any) -> bool:
    """Whether a value gives nothing away under a secret's name: whether to look a token up, or a number of tokens."""
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, int | float) and name.lower().endswith("tokens")


def _clean_text(text: str, place: str, left_out: list[str]) -> str:
    if text.lstrip().startswith("{"):
        # What transformers reads as an object when it is given on the command line.
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            cleaned = _clean(values, place, left_out)
            return text if cleaned == values else json.dumps(cleaned)
    hidden = _SECRET_VALUE.sub(HIDDEN, text)
    if hidden != text:
        left_out.append(place)
    return hidden

# SPDX-License-Identifier: Apache-2.0
"""Weights that are pickles, which can hold code: refused where a folder has them and no safetensors."""

from pathlib import Path

__all__ = ["require_no_pickle"]


def require_no_pickle(folder: str | Path) -> None:
    """Refuses a folder whose weights could only be read from a pickle; what is no folder has none.

    Args:
        folder: Of a model, an adapter or a checkpoint.

    Raises:
        ValueError: They could.
    """
    folder = Path(folder).expanduser()
    adapters = folder / "adapter_model.safetensors"
    refused = [] if adapters.is_file() else list(folder.glob("adapter_model.bin"))
    # An adapter's folder needs no weights of a model.
    if not adapters.is_file() and not any(folder.glob("model*.safetensors")):
        refused += sorted({*folder.glob("pytorch_model*.bin"), *folder.glob("*-of-*.bin")})
    if refused:
        raise ValueError(
            f"{refused[0]} is a pickle, which can hold code, without safetensors beside it. Convert it, or allow it "
            "with `allow_pickle: true` (--allow_pickle), for a merge with --allow-pickle: tensors alone are read from "
            "it then."
        )

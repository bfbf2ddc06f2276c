# SPDX-License-Identifier: Apache-2.0
"""Whether loading an adapter that has changed its base changes the base again, to the weights it was trained on."""

from pathlib import Path

from peft import PeftConfig, PeftModel

from frozen_peft.adapters.initialisation import CONVERT, initial_change
from frozen_peft.merging.base_record import difference_from, read_record

__all__ = ["require_repeatable", "require_repeated_change"]

# Those that need nothing but the base, so that PEFT makes the same change again when it loads the adapter.
REPEATED = ("pissa", "olora", "loftq")
# Those that need what is gone by then: covariances, or gradients, without which PEFT leaves the base unchanged.
NOT_REPEATED = ("corda", "lora_ga")


def require_repeatable(config: PeftConfig, folder: Path, *, in_4_bit: bool) -> None:
    """Refuses, before its base is read, an adapter whose change of the base cannot be made again.

    Args:
        config: The adapter's.
        folder: The adapter's.
        in_4_bit: The base is quantized before the adapter is put on it.

    Raises:
        ValueError: It is one.
    """
    problem = None
    if getattr(config, "init_lora_weights", None) in NOT_REPEATED:
        problem = "it was made from data that the adapter's folder does not hold"
    elif in_4_bit:
        problem = "in 4 bit it comes out as another one; load the base in 16 bit"
    if (change := initial_change(config)) and problem:
        raise _not_repeated(folder, change, f"loading it cannot repeat that: {problem}")


def require_repeated_change(model: PeftModel, folder: Path) -> None:
    """Refuses an adapter that has changed its base, where loading it has not changed the base in the same way.

    Args:
        model: The base with that adapter, just loaded.
        folder: The adapter's.

    Raises:
        ValueError: The loaded model is another than the trained one, or nothing says that it is the same.
    """
    config = model.peft_config[model.active_adapter]
    change = initial_change(config)
    if change is None:
        return
    record, problem = read_record(folder), None
    if record is not None:
        problem = difference_from(record, model)
    elif config.init_lora_weights not in REPEATED and not getattr(config, "kasa_config", None):
        problem = "it is drawn at random, and nothing beside the adapter says what it was"
    if problem is not None:
        raise _not_repeated(folder, change, f"loading it did not repeat that: {problem}")


def _not_repeated(folder: Path, change: str, problem: str) -> ValueError:
    return ValueError(
        f"{folder}: this adapter has changed the weights of its base before training (`{change}`), and {problem}. "
        f"{CONVERT}"
    )

# SPDX-License-Identifier: Apache-2.0
"""Messages of dependencies that no user can or should act on, each with library, version and reason.

Everything else that a dependency says stays. Imported with the package, so before what it silences, and light.
"""

import logging
import sys

__all__ = ["WARNINGS", "silence_logs"]

# Of the command line only: in a script, which warnings are shown is the user's. trl 1.16 and peft 0.21 still use names
# that transformers 5 has replaced, and PEFT does not know the field in which an adapter remembers its roles. Each goes
# with the library's next release.
WARNINGS = (
    (r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning),
    (r"Unexpected keyword arguments \['roles'\]", UserWarning),
)


def silence_logs() -> None:
    """Keeps what follows out of the logs, in scripts too; calling it again changes nothing."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_names_no_absent_kernels)
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_names_no_kernel_for_a_gpu)


def _names_no_absent_kernels(record: logging.LogRecord) -> bool:
    """False for what bitsandbytes 0.50 says at import on every CPU with AVX512-BF16 without the package `kernels`.

    The kernel that it would fetch computes in 4-bit layers that are repacked for inference, which layers in training
    never are, and bitsandbytes has another. Where `kernels` is there and fails, the message stays.
    """
    reason = record.args[0] if isinstance(record.args, tuple) and record.args else None
    absent = isinstance(reason, ModuleNotFoundError) and reason.name == "kernels"
    return not (absent and str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"))


def _names_no_kernel_for_a_gpu(record: logging.LogRecord) -> bool:
    """False for the advice of transformers 5.23 and 5.24 to install kernels of GPUs, on machines that have none.

    Followed there, it breaks the import of the very models that it is given for: Triton finds no driver.
    """
    if "is falling back to its reference PyTorch implementation" not in str(record.msg):
        return True
    torch = sys.modules.get("torch")
    return torch is None or torch.accelerator.is_available()

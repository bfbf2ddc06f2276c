# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, mended where the kernels that training on a GPU runs meet its limits.

`TRITON_INTERPRET=1` has to stand in the environment before Triton is imported; `tests.conftest` sees to it. Nothing
here touches a kernel. Four things stand in the way (Triton 3.9), each with its remedy:

1. The autotuner asks a driver for its timer: the first configuration of each kernel is taken.
2. `range` gives Python's numbers, which have none of the methods of Triton's scalars (`i.to(tl.int64)`): kernels get
   one that gives Triton's.
3. bfloat16 is kept as the bits of a uint16, and sums and products of the bits are taken for those of the numbers: one
   matrix product gives 1e11. Here operands are widened to float32, which holds them and their products exactly, and
   results are rounded once.
4. Casts to bfloat16 cut the mantissa off, and where they round, they round halves up and lose the carry; a card rounds
   to the nearest, halves to even.

What the interpreter cannot show: products in TF32 (it multiplies float32 as it is), races between programs, which it
runs one after another, shared memory, and whatever a compiler makes wrong, such as flash-linear-attention's issue 640.
"""

import builtins
import importlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import autotuner, interpreter

__all__ = ["PACKAGES", "mend_interpreter"]

# Modules with kernels, by package. What is in them is interpreted.
PACKAGES = {
    "fla": ("fla.ops.gated_delta_rule", "fla.ops.kda"),
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_ssm.ops.triton.selective_state_update"),
    "trl": ("trl.kernels.chunked_logprob", "trl.kernels.logprob_entropy"),
}


def mend_interpreter() -> None:
    """Applies the remedies; again, to what has been imported since. Imports nothing that is not installed."""
    autotuner.Autotuner._bench = lambda self, *args, **kwargs: [0.0, 0.0, 0.0]
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "mended"):
        _mend_bfloat16(builder)
        builder.mended = True
    for package, modules in PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            for module in modules:
                importlib.import_module(module)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and hasattr(module, "tl"):
            vars(module)["range"] = _range


def _range(*bounds: Any) -> Iterable[Any]:
    """Python's own, but of Triton's numbers where a bound is one: other functions of a module are not kernels."""
    if not any(isinstance(bound, (tl.tensor, tl.constexpr)) for bound in bounds):
        return builtins.range(*bounds)
    return map(interpreter._implicit_cvt, builtins.range(*map(_as_int, bounds)))


def _as_int(value: Any) -> int:
    return int(value.handle.data.item()) if hasattr(value, "handle") else int(getattr(value, "value", value))


def widened(bits: np.ndarray) -> np.ndarray:
    """The numbers whose bfloat16 bits these are, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """The bfloat16 bits of the nearest numbers, halves to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, nearest).astype(np.uint16)


def _mend_bfloat16(builder: Any) -> None:
    """Gives the interpreter arithmetic on bfloat16."""
    handle = interpreter.TensorHandle

    def is_bfloat16(value: Any) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == tl.bfloat16

    def wide(value: Any) -> Any:
        return handle(widened(value.data), tl.float32) if is_bfloat16(value) else value

    def narrow(value: Any) -> Any:
        return handle(rounded(value.data), tl.bfloat16) if value.dtype.scalar == tl.float32 else value

    def in_float32(operation: Any) -> Any:
        def run(self: Any, *operands: Any, **kwargs: Any) -> Any:
            if not any(map(is_bfloat16, operands)):
                return operation(self, *operands, **kwargs)
            return narrow(operation(self, *map(wide, operands), **kwargs))

        return run

    for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_rsqrt", "create_clampf", "create_idiv"):
        setattr(builder, name, in_float32(getattr(builder, name)))

    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any, **kwargs: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *args, **kwargs)

    def cast_impl(self: Any, value: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and not is_bfloat16(value):
            return handle(rounded(value.data.astype(np.float32)), tl.bfloat16)
        return cast(self, wide(value), dtype) if dtype.scalar != tl.bfloat16 else value

    def create_fp_to_fp(self: Any, value: Any, dtype: Any, rounding_mode: Any) -> Any:
        return cast_impl(self, value, dtype)

    def apply(self: Any, operands: Any) -> Any:
        if not isinstance(operands, tl.tensor) or operands.dtype.scalar != tl.bfloat16:
            return reduce(self, operands)
        result = reduce(self, tl.tensor(wide(operands.handle), operands.type.with_element_ty(tl.float32)))
        return tl.tensor(narrow(result.handle), result.type.with_element_ty(tl.bfloat16))

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    reduce = interpreter.ReduceScanOpInterface.apply
    interpreter.ReduceScanOpInterface.apply = apply
    convert = builder.create_fp_to_fp
    builder.create_fp_to_fp = lambda self, value, dtype, mode: (
        create_fp_to_fp(self, value, dtype, mode)
        if is_bfloat16(value) or dtype.scalar == tl.bfloat16
        else convert(self, value, dtype, mode)
    )

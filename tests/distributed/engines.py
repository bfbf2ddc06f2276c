# SPDX-License-Identifier: Apache-2.0
"""How the processes of a test train: with whole weights, or with weights in shards."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.distributed.cases import LAYER_CLASSES, Engine


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their name in the model itself, gathered where they are in shards."""
    return {
        name.removeprefix("module."): tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def engine_fields(engine: Engine, model: str, **shards: Any) -> dict[str, Any]:
    """Training arguments that ask for an engine.

    Args:
        engine: The engine.
        model: Of `LAYER_CLASSES`.
        shards: More fields of `fsdp_config`.
    """
    if engine == "ddp":
        return {"ddp_backend": "gloo"}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [LAYER_CLASSES[model]],
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
            **shards,
        },
    }

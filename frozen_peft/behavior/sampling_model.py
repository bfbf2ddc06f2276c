# SPDX-License-Identifier: Apache-2.0
"""A model to sample from: a checkpoint, on the machine's accelerator where it has one, with an adapter if wanted."""

from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from frozen_peft.adapters import quantization_config

__all__ = ["load_sampling_model"]


def load_sampling_model(
    name: str,
    *,
    adapter: str | None = None,
    revision: str = "main",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads a model as training does, and its tokenizer.

    Args:
        name: Hub id or folder of the base model.
        adapter: Hub id or folder of an adapter; None: the base model alone.
        revision: Branch, tag or commit of a model on the hub.
        dtype: Type of the loaded weights; `auto`: the checkpoint's own.
        load_in_4bit: Quantize the base to 4 bit.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        OSError: There is no such model or adapter.
    """
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **origin)
    quantized = {"quantization_config": quantization_config(config)} if load_in_4bit else {}
    model: nn.Module = create_model_from_path(name, dtype=dtype, **origin, **quantized)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(name, **origin)

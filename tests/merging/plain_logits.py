# SPDX-License-Identifier: Apache-2.0
"""Logits of checkpoints, by transformers alone: run as a script, which imports nothing of the package.

Arguments: a file of token ids, a file to write logits to, and folders of models.
"""

import sys

import torch
import transformers


def logits(folder: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one forward, by the automatic class for the architecture that the folder names."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    is_wrapper = architecture.endswith("ForConditionalGeneration")
    automatic = transformers.AutoModelForImageTextToText if is_wrapper else transformers.AutoModelForCausalLM
    model, loading = automatic.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert not any(loading.values()), (folder, loading)
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    ids_file, target, *folders = sys.argv[1:]
    transformers.logging.disable_progress_bar()
    ids = torch.load(ids_file)
    torch.save({folder: logits(folder, ids) for folder in folders}, target)
    assert not [name for name in sys.modules if name.partition(".")[0] in ("frozen_peft", "peft", "trl")]

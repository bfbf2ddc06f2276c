# SPDX-License-Identifier: Apache-2.0
"""What an encoded context depends on besides its tokens, as short digests.

The base model's weights are sampled, one value per row and at least some thousand per tensor, so that a large model is
not read as a whole at every start; what training changes (adapters and any other trainable weight) is read in full.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator

import torch
import transformers
import xxhash
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from frozen_peft.context.kernels import KERNEL_MODULES
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.rope import frequencies_of_the_moment
from frozen_peft.context.sharding import digest_of_all, local_part
from frozen_peft.utils.compat.torch import num_writes
from frozen_peft.utils.compat.transformers import attention_implementation
from frozen_peft.utils.installed import module_versions

__all__ = [
    "AdapterWatch",
    "adapter_fingerprint",
    "base_fingerprint",
    "base_state",
    "fixed_fingerprint",
    "require_untouched_base",
    "run_fingerprint",
    "trained_base_weights",
]

# Values read of a tensor: all of a small one, else at least these many, and one of each row.
MIN_SAMPLES = 4096
MAX_SAMPLES = 1 << 20
# What PEFT puts into the name of a weight that it adapts.
WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")


def base_fingerprint(model: torch.nn.Module) -> str:
    """Digest of the architecture and the weights that training leaves alone, quantized ones as they are stored.

    Reads a sample of each tensor: a change that leaves one whole row as it was elsewhere goes unnoticed only where it
    misses that row's sampled value.
    """
    pretrained = get_pretrained_model(model)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_architecture(pretrained).encode())
    trained = {id(tensor) for _, tensor in _trained_tensors(model)}
    # A base is the same under any adapters, and without.
    tensors = [(WRAPPED.sub("", name), tensor) for name, tensor in _tensors(pretrained) if id(tensor) not in trained]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(_sampled(local_part(tensor))))
    return digest_of_all(model, digest.hexdigest())


def base_state(model: torch.nn.Module) -> tuple[object, ...]:
    """What changes when a weight that `base_fingerprint` reads is replaced, converted or written to; nothing is read.

    Writes through `tensor.data` go unnoticed.
    """
    trained = {id(tensor) for _, tensor in _trained_tensors(model)}
    tensors = (tensor for _, tensor in _tensors(get_pretrained_model(model)) if id(tensor) not in trained)
    return tuple((local_part(tensor).data_ptr(), num_writes(tensor), tensor.dtype) for tensor in tensors)


def adapter_fingerprint(model: torch.nn.Module) -> str:
    """Digest of everything that training changes, read in full, and of which adapters are active."""
    digest = xxhash.xxh3_128()
    digest.update(repr(_switches(model)).encode())
    for name, tensor in sorted(_trained_tensors(model), key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(local_part(tensor)))
    return digest_of_all(model, digest.hexdigest())


def fixed_fingerprint(model: torch.nn.Module, adapter: str) -> str:
    """Digest of one adapter of a model, which is not trained, read in full."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(_trained_tensors(model), key=lambda pair: pair[0]):
        if adapter in name.split("."):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(local_part(tensor)))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            digest.update(f"{name} {getattr(module, 'scaling', {}).get(adapter)}".encode())
    return digest_of_all(model, digest.hexdigest())


class AdapterWatch:
    """Notices that what training changes is not what it was, without reading it in full.

    Within an optimizer step that shows by any of these:

    - which adapters are active, scaled and merged, and which weights there are;
    - where a weight lies, and PyTorch's count of the writes to it;
    - some thousand values of each weight, spread over its rows and columns. These notice what is not counted: writes
      through `tensor.data`, as exchanging all weights for their running mean makes, and kernels of other libraries.
      Of such a write alone, one to a few numbers of a weight may go unnoticed until the next step.
    """

    def __init__(self) -> None:
        self._facts: tuple[object, ...] | None = None
        self._samples: dict[torch.device, torch.Tensor] = {}

    def has_changed(self, model: torch.nn.Module, step: int) -> bool:
        """Whether anything may be different from what it was at the last call; True at the first.

        Args:
            model: Whose adapters are meant; the same in every call.
            step: Optimizer steps so far.
        """
        tensors = [local_part(tensor) for _, tensor in _trained_tensors(model)]
        places = tuple((t.device, t.data_ptr(), num_writes(t), t.dtype, t.shape) for t in tensors)
        facts = (step, _switches(model), places)
        samples = _samples_by_device(tensors)
        is_same = facts == self._facts and all(torch.equal(part, self._samples[on]) for on, part in samples.items())
        self._facts, self._samples = facts, samples
        return not is_same


def run_fingerprint(model: torch.nn.Module) -> str:
    """Digest of how the model is run: attention, kernels, device, autocast and the library's version."""
    pretrained = get_pretrained_model(model)
    device = pretrained.get_input_embeddings().weight.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    facts = {
        "attention": attention_implementation(get_decoder(pretrained).config),
        "kernels": {name: module_versions(name) for name in KERNEL_MODULES} if device != "cpu" else {},
        "device": device,
        "autocast": autocast,
        "transformers": transformers.__version__,
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def require_untouched_base(model: torch.nn.Module) -> None:
    """Refuses to encode contexts with the adapters off where training changes more than adapters.

    Raises:
        ValueError: A weight of the base model itself is trainable, or a whole module is trained that PEFT's own
            forward would apply to the context as well.
    """
    head = get_pretrained_model(model).get_output_embeddings()
    for name, module in model.named_modules():
        # The head alone is read at no context token.
        if isinstance(module, AuxiliaryTrainingWrapper) and module is not head:
            raise ValueError(
                f"`context_adapters=False` encodes contexts without what is trained, and `{name}` is trained as a "
                "whole (`modules_to_save` or `trainable_token_indices`): an activated LoRA switches LoRA alone, so it "
                "would act on contexts when the adapter is served. Leave it out, or set `context_adapters=True`."
            )
    for name in trained_base_weights(model):
        raise ValueError(
            f"`context_adapters=False` encodes contexts by the base model, and training changes `{name}` of it. "
            "Freeze it (in LoRA: `bias='none'`), or set `context_adapters=True`."
        )


def trained_base_weights(model: torch.nn.Module) -> list[str]:
    """Names of the trainable weights that are there with the adapters off as well."""
    switched_off = {id(tensor) for tensor in _switchable_tensors(model)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in switched_off]


def _architecture(model: PreTrainedModel) -> str:
    """The configuration without what says where it came from."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True, default=str)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    passing = {id(buffer) for buffer in frequencies_of_the_moment(model)}
    yield from ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in passing)
    for name, parameter in model.named_parameters():
        yield name, parameter
        # The scales of a 4-bit weight, without which its codes mean nothing, are neither parameters nor buffers.
        state = getattr(parameter, "quant_state", None)
        for level, part in enumerate((state, getattr(state, "state2", None))):
            for kind in ("absmax", "offset"):
                if isinstance(tensor := getattr(part, kind, None), torch.Tensor):
                    yield f"{name}.{level}.{kind}", tensor


def _switchable_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Weights that PEFT adds, and leaves out when adapters are disabled."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(parameter) for parameter in module.get_base_layer().parameters()}
            yield from (parameter for parameter in module.parameters() if id(parameter) not in base)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original = {id(parameter) for parameter in module.original_module.parameters()}
            yield from (parameter for parameter in module.parameters() if id(parameter) not in original)


def _trained_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Adapters, trainable or not, and every other trainable weight."""
    adapters = {id(tensor) for tensor in _switchable_tensors(model)}
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or id(p) in adapters]


def _switches(model: torch.nn.Module) -> tuple[object, ...]:
    """Which adapters act on each module, and how."""
    if not isinstance(model, PeftModel):
        return ()
    names = ("scaling", "disable_adapters", "active_adapters", "merged_adapters")
    tuned = [
        (name, *(str(getattr(module, switch, None)) for switch in names))
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    return tuple(model.active_adapters), tuple(tuned)


def _samples_by_device(tensors: list[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
    """Bits of some values of each tensor, as bytes; all of a small one."""
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        # An odd distance that is no divisor of a width, so that neither rows nor columns are left out.
        stride = flat.numel() // MIN_SAMPLES | 1
        while math.gcd(stride, tensor.shape[-1] if tensor.ndim else 1) > 1:
            stride += 2
        parts.setdefault(tensor.device, []).append(flat[::stride].contiguous().view(torch.uint8))
    return {device: torch.cat(of_device) for device, of_device in parts.items()}


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    # A vector, and a 4-bit weight, which is stored as one column, have no rows.
    rows = tensor.numel() // tensor.shape[-1] if tensor.ndim > 1 and tensor.shape[-1] > 1 else 1
    wanted = min(max(MIN_SAMPLES, rows), MAX_SAMPLES)
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= wanted:
        return flat
    # The middle of equal parts: one value per row where there is one part per row.
    parts = torch.arange(wanted, device=flat.device, dtype=torch.float64)
    return flat[((parts + 0.5) * (flat.numel() / wanted)).long()]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

# SPDX-License-Identifier: Apache-2.0
"""The merged model against the unmerged adapter, each loaded by transformers and PEFT as anyone would.

One model is in memory at a time. The unmerged one decides greedily for a few prompts; the log-probabilities of those
very tokens, and what the merged model would have decided at each, are compared. On given samples, *recovery* is
(base loss - merged loss) / (base loss - adapter loss): 1 where the merged model is as good as the adapter.
"""

import gc
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from frozen_peft.adapters.quantization import keep_linear4bit_trainable
from frozen_peft.adapters.roles import named_class
from frozen_peft.adapters.vocabulary import resize_vocabulary
from frozen_peft.merging.adapter import AdapterFolder
from frozen_peft.merging.base import Base
from frozen_peft.merging.layout import change_layout, layout_of_model
from frozen_peft.merging.output import write_adapter
from frozen_peft.merging.source import TORCH_DTYPES, Checkpoint, open_checkpoint
from frozen_peft.merging.verify_tokens import PROMPTS, SampleTokens, load_tokenizer, prompt_tokens, sample_tokens

__all__ = ["MergeMismatchError", "fits", "load_merged", "verify_merge"]

NEW_TOKENS = 16
# The base's own parameters, and what they were before adapters were loaded.
_Biases: TypeAlias = list[tuple[torch.nn.Parameter, torch.Tensor]]
# Mean difference of log-probabilities that rounding of the weights explains, by the type of the merged weights.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class MergeMismatchError(ValueError):
    """A merged model that is not its base and adapter."""


@dataclass(frozen=True)
class _Scores:
    """What one model makes of decisions and samples.

    Attributes:
        log_probabilities: float32[tokens of all decisions].
        choices: int64[tokens of all decisions], what the model itself would decide at each.
        loss: Mean over the decision tokens of all samples, in nats; NaN without samples.
    """

    log_probabilities: torch.Tensor
    choices: torch.Tensor
    loss: float


def fits(num_bytes: int) -> bool:
    """Whether a model of this size can be loaded here, with room to run."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] > 1.3 * num_bytes
    return psutil.virtual_memory().available > 1.5 * num_bytes


def load_merged(folder: Path, *, trust_remote_code: bool = False, device: str | None = None) -> Any:
    """A merged model, by the class that its configuration names, in evaluation mode.

    Args:
        folder: Where it is.
        trust_remote_code: Whether code that comes with it may run.
        device: Where to; by default an accelerator where there is one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    options = {"dtype": "auto", "trust_remote_code": trust_remote_code, "use_safetensors": True}
    return _load(folder, config, device or _device(), **options)


def verify_merge(
    merged: Path,
    base: Base,
    adapters: Sequence[AdapterFolder],
    weights: Sequence[float],
    quantization: BitsAndBytesConfig | None,
    *,
    onto: str,
    samples: Sequence[dict[str, Any]],
    prompts: Sequence[Any],
) -> dict[str, Any]:
    """Compares a merged model with its adapter.

    Args:
        merged: Its folder.
        base: What it was merged onto.
        adapters: What it is to be equal to with its base, up to rounding; none where PEFT has no such model (TIES,
            DARE).
        weights: A factor for each.
        quantization: How the base was quantized in training; None: it was not.
        onto: Whether the merged weights are the `original` ones or the `quantized` ones of training, and the adapter.
        samples: Rows of prompt and completion, or conversations.
        prompts: Texts or messages to decide for; by default those of the first samples, else four of its own.

    Returns:
        The section `verification` of the report.

    Raises:
        MergeMismatchError: The merged model is further from the adapter than rounding explains, and than half of what
            the adapter does.
        ValueError: A sample has no decision, or no chat template says how its messages are written.
    """
    tokenizer = load_tokenizer(merged, base.trust_remote_code)
    rows = [sample_tokens(tokenizer, sample, number) for number, sample in enumerate(samples, start=1)]
    contexts = [row.ids[: row.num_context] for row in rows[:8]]
    if prompts or not rows:
        vocab_size = base.config.get_text_config().vocab_size
        contexts = [prompt_tokens(tokenizer, prompt, vocab_size) for prompt in prompts or PROMPTS]
    dtype, device = _dtype_of(open_checkpoint(merged)), _device()
    report: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "prompts": len(contexts)}

    def score_unmerged(
        quantization: BitsAndBytesConfig | None, contexts: Sequence[torch.Tensor]
    ) -> tuple[list[SampleTokens], _Scores, _Scores]:
        own_dtype = dtype if quantization is None else quantization.bnb_4bit_compute_dtype
        model, biases = _load_adapted(base, adapters, weights, quantization, own_dtype, device)
        return _score_unmerged(model, biases, contexts, rows)

    as_trained = unmerged = None
    onto_quantized = quantization if onto == "quantized" else None
    if adapters and quantization is not onto_quantized:
        as_trained = score_unmerged(quantization, [])
    if adapters:
        unmerged = score_unmerged(onto_quantized, contexts)
    model = load_merged(merged, trust_remote_code=base.trust_remote_code, device=device)
    found = _score(model, unmerged[0] if unmerged else [], rows)
    if unmerged is not None:
        # Of the two models, the one that rounds the most.
        unmerged_dtype = dtype if onto_quantized is None else onto_quantized.bnb_4bit_compute_dtype
        report |= _compare(*unmerged, found, max(_ROUNDING[kind] for kind in (dtype, unmerged_dtype)))
    if rows and (scores := as_trained or unmerged):
        before, adapter = (own.loss for own in scores[1:])
        report["samples"] = len(rows)
        report["loss"] = {"base": before, "adapter": adapter, "merged": found.loss}
        # Without a gain there is none to recover.
        report["recovery"] = (before - found.loss) / (before - adapter) if before > adapter else None
    return report


def _score_unmerged(
    model: PeftModel, biases: _Biases, contexts: Sequence[torch.Tensor], rows: Sequence[SampleTokens]
) -> tuple[list[SampleTokens], _Scores, _Scores]:
    """What the adapter decides in contexts, and scores without and with it."""
    decisions = _decide(model, contexts)
    adapted = _score(model, decisions, rows)
    with warnings.catch_warnings():
        # An adapter's biases stay when it is switched off, so the base's are put back.
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
        with model.disable_adapter():
            for parameter, base in biases:
                parameter.data = base
            return decisions, _score(model, decisions, rows), adapted


def _compare(
    decisions: Sequence[SampleTokens], without: _Scores, unmerged: _Scores, found: _Scores, rounding: float
) -> dict[str, Any]:
    """The figures of a merged model beside those without and with its adapter."""
    difference = (found.log_probabilities - unmerged.log_probabilities).abs()
    effect = (without.log_probabilities - unmerged.log_probabilities).abs()
    if not difference.mean() <= max(rounding, float(effect.mean()) / 2):
        raise MergeMismatchError(
            f"The merged model is not its base and adapter: log-probabilities of {len(difference)} tokens differ by "
            f"{difference.mean():.3g} on average, where rounding explains {rounding:g} and the adapter as a whole "
            f"does {effect.mean():.3g}. Nothing was written. Please report it with the architecture's name; "
            "--no-verify (`verify=False`) writes the merged model all the same."
        )
    own = [decision.ids[decision.num_context :] for decision in decisions]
    equal = found.choices == torch.cat(own)
    return {
        "decision_tokens": len(equal),
        "log_probability_difference": {"mean": float(difference.mean()), "max": float(difference.max())},
        "adapter_effect": {"mean": float(effect.mean()), "max": float(effect.max())},
        "equal_greedy_tokens": float(equal.float().mean()),
        "equal_greedy_decisions": sum(bool(same.all()) for same in equal.split([len(tokens) for tokens in own])),
    }


@torch.no_grad()
def _decide(model: Any, contexts: Sequence[torch.Tensor]) -> list[SampleTokens]:
    """Greedy decisions, of one token at least."""
    decisions = []
    for context in tqdm(contexts, desc="Deciding by the adapter", delay=2):
        ids = context[None].to(model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        decisions.append(SampleTokens(out[0].cpu(), len(context)))
    return decisions


def _score(model: Any, decisions: Sequence[SampleTokens], rows: Sequence[SampleTokens]) -> _Scores:
    log_probabilities, choices = _read(model, decisions)
    return _Scores(log_probabilities, choices, -float(_read(model, rows)[0].double().mean()))


@torch.no_grad()
def _read(model: Any, rows: Sequence[SampleTokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens behind contexts: their log-probabilities, and which token the model would choose."""
    log_probabilities, choices = [torch.empty(0)], [torch.empty(0, dtype=torch.long)]
    for row in tqdm(rows, desc="Scoring", delay=2):
        kept = len(row.ids) - row.num_context + 1
        out = model(input_ids=row.ids[None].to(model.device), use_cache=False, logits_to_keep=kept)
        logits = out.logits[0, -kept:-1].float().cpu()
        log_probabilities.append(log_softmax(logits, -1).gather(-1, row.ids[row.num_context :, None])[:, 0])
        choices.append(logits.argmax(-1))
    return torch.cat(log_probabilities), torch.cat(choices)


def _load_adapted(
    base: Base,
    adapters: Sequence[AdapterFolder],
    weights: Sequence[float],
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: str,
) -> tuple[PeftModel, _Biases]:
    """Base and adapters in PEFT, unmerged; and the base's biases, since an adapter may have its own."""
    model = _load(
        base.checkpoint.folder,
        base.config,
        device,
        dtype=dtype,
        trust_remote_code=base.trust_remote_code,
        use_safetensors=None if base.allow_pickle else True,
        quantization_config=quantization,
    )
    keep_linear4bit_trainable(model)
    named = (item for item in model.named_parameters() if item[0].endswith("bias"))
    biases = [(parameter, parameter.detach().clone()) for _, parameter in named]
    layout = layout_of_model(model)
    with tempfile.TemporaryDirectory() as scratch:
        for number, adapter in enumerate(adapters):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            config, tensors = change_layout(adapter.config, adapter.tensors, layout)
            write_adapter(folder, config, tensors)
            if number:
                model.load_adapter(folder, f"adapter{number}")
            else:
                resize_vocabulary(model, tensors, config)
                model = PeftModel.from_pretrained(model, folder, "adapter0")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] *= weights[int(name.removeprefix("adapter"))]
    if len(adapters) > 1:
        model.base_model.set_adapter([f"adapter{number}" for number in range(len(adapters))])
    return model.eval(), biases


def _load(folder: Path, config: PretrainedConfig, device: str, **options: Any) -> Any:
    """A model by the class that its configuration names, once the memory of the one before is given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model_class = named_class(config) or AutoModelForCausalLM
    return model_class.from_pretrained(folder, device_map=device, **options).eval()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The type of most of a checkpoint's weights."""
    sizes = Counter[str]()
    for entry in checkpoint.tensors.values():
        if entry.dtype in TORCH_DTYPES:
            sizes[entry.dtype] += math.prod(entry.shape)
    return TORCH_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]

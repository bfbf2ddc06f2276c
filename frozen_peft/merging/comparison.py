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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from frozen_peft.adapters.vocabulary import resize_vocabulary
from frozen_peft.merging.adapter import AdapterFolder
from frozen_peft.merging.exporting import as_layout, write_adapter
from frozen_peft.merging.header import TORCH_DTYPES
from frozen_peft.merging.homes import named_class
from frozen_peft.merging.layout import Layout
from frozen_peft.merging.source import open_checkpoint
from frozen_peft.merging.verify_tokens import (
    PROMPTS,
    SampleTokens,
    load_tokenizer,
    prompt_tokens,
    sample_tokens,
)

__all__ = ["MergeMismatchError", "Reference", "fits", "load_merged", "verify_merge"]

NEW_TOKENS = 16
# The base's own parameters, and what they were before adapters were loaded.
_Biases: TypeAlias = list[tuple[torch.nn.Parameter, torch.Tensor]]
# Mean difference of log-probabilities that rounding of the weights explains, by the type of the merged weights.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class MergeMismatchError(ValueError):
    """A merged model that is not its base and adapter."""


@dataclass(frozen=True)
class Reference:
    """Where base and adapters are, and how they are loaded.

    Attributes:
        base: The base's folder.
        config: Its configuration.
        adapters: The adapters.
        weights: A factor for each.
        layout: The class of the base; None where it has no other.
        trust_remote_code: Whether the base's own code may run.
        allow_pickle: Whether the base's weights may be a pickle.
        quantization: The 4-bit configuration that the adapter was trained on; None for a base in 16 or 32 bit.
        dtype: The type it is loaded in; None: that of the merged weights.
    """

    base: Path
    config: PretrainedConfig
    adapters: Sequence[AdapterFolder]
    weights: Sequence[float]
    layout: Layout | None
    trust_remote_code: bool
    allow_pickle: bool
    quantization: BitsAndBytesConfig | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class _Scores:
    """What one model makes of prompts and samples.

    Attributes:
        decisions: int64[tokens] of each prompt.
        log_probabilities: float32[all tokens] of those decisions.
        choices: int64[all tokens], what the model itself would decide at each.
        loss: Mean over the decision tokens of all samples; None without samples.
    """

    decisions: list[torch.Tensor]
    log_probabilities: torch.Tensor
    choices: torch.Tensor
    loss: float | None


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
    _free()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = _model_class(config).from_pretrained(
        folder,
        dtype="auto",
        device_map=device or _device(),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    return model.eval()


def verify_merge(
    merged: Path,
    config: PretrainedConfig,
    exact: Reference | None,
    trained: Reference | None,
    samples: Sequence[dict[str, Any]] = (),
    prompts: Sequence[Any] = (),
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compares a merged model with its adapter.

    Args:
        merged: Its folder.
        config: Its configuration.
        exact: What the merged weights are to be equal to, up to rounding; None where there is no such model (TIES,
            DARE).
        trained: What the adapter was trained as: the same, unless the base was in 4 bit and the merged weights are
            not; None where there is no such model.
        samples: Rows of prompt and completion, or conversations.
        prompts: Texts or messages to decide for; by default those of the first samples, else four of its own.
        trust_remote_code: Whether the base's own code may run.

    Returns:
        The section `verification` of the report.

    Raises:
        MergeMismatchError: The merged model is further from the adapter than rounding explains, and than half of what
            the adapter does.
        ValueError: A sample has no decision, or no chat template says how its messages are written.
    """
    tokenizer = load_tokenizer(merged, trust_remote_code)
    rows = [sample_tokens(tokenizer, sample, number) for number, sample in enumerate(samples, start=1)]
    contexts = [row.ids[: row.num_context] for row in rows[:8]]
    if prompts or not rows:
        vocab_size = config.get_text_config().vocab_size
        contexts = [prompt_tokens(tokenizer, prompt, vocab_size) for prompt in prompts or PROMPTS]
    dtype, device = _dtype_of(merged), _device()
    report: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "prompts": len(contexts)}
    losses = comparison = None
    if exact is not trained and trained is not None:
        losses = _score_as_trained(trained, dtype, device, rows)
    if exact is not None:
        comparison = _score_unmerged(exact, dtype, device, contexts, rows)
        losses = losses or (comparison[0].loss, comparison[1].loss)
    found = _score_merged(merged, trust_remote_code, device, contexts, comparison, rows)
    if comparison is not None:
        report |= _compare(*comparison, found)
    if rows and losses is not None:
        report |= {"samples": len(rows), **_recovery(*losses, found.loss)}
    _require_close(report, _coarsest(dtype, exact))
    return report


def _score_as_trained(
    trained: Reference, dtype: torch.dtype, device: str, rows: Sequence[SampleTokens]
) -> tuple[float | None, float | None]:
    """Losses of base and adapter as they were in training."""
    with _adapted(trained, dtype, device) as (model, biases):
        with _without_adapters(model, biases):
            before = _loss(model, rows)
        return before, _loss(model, rows)


def _score_unmerged(
    exact: Reference, dtype: torch.dtype, device: str, contexts: Sequence[torch.Tensor], rows: Sequence[SampleTokens]
) -> tuple[_Scores, _Scores]:
    """Scores without and with the adapter, of what the adapter decides."""
    with _adapted(exact, dtype, device) as (model, biases):
        unmerged = _score(model, contexts, _decide(model, contexts), rows)
        with _without_adapters(model, biases):
            return _score(model, contexts, unmerged.decisions, rows), unmerged


def _score_merged(
    merged: Path,
    trust_remote_code: bool,
    device: str,
    contexts: Sequence[torch.Tensor],
    comparison: tuple[_Scores, _Scores] | None,
    rows: Sequence[SampleTokens],
) -> _Scores:
    """Scores of the merged model, of the same decisions."""
    model = load_merged(merged, trust_remote_code=trust_remote_code, device=device)
    decisions = [] if comparison is None else comparison[1].decisions
    return _score(model, contexts if decisions else [], decisions, rows)


def _coarsest(dtype: torch.dtype, exact: Reference | None) -> torch.dtype:
    """The type of the two models that rounds the most."""
    own = dtype if exact is None or exact.dtype is None else exact.dtype
    return max((dtype, own), key=lambda kind: _ROUNDING[kind])


def _compare(without: _Scores, unmerged: _Scores, found: _Scores) -> dict[str, Any]:
    difference = (found.log_probabilities - unmerged.log_probabilities).abs()
    effect = (without.log_probabilities - unmerged.log_probabilities).abs()
    lengths = [len(decision) for decision in unmerged.decisions]
    decided = torch.cat(unmerged.decisions)
    alike = [bool(same.all()) for same in (found.choices == decided).split(lengths)]
    return {
        "decision_tokens": len(decided),
        "log_probability_difference": {"mean": float(difference.mean()), "max": float(difference.max())},
        "adapter_effect": {"mean": float(effect.mean()), "max": float(effect.max())},
        "equal_greedy_tokens": float((found.choices == decided).float().mean()),
        "equal_greedy_decisions": sum(alike),
    }


def _recovery(base: float | None, adapter: float | None, merged: float | None) -> dict[str, Any]:
    assert base is not None  # there are samples
    assert adapter is not None
    assert merged is not None
    # Without a gain there is none to recover.
    recovery = (base - merged) / (base - adapter) if base > adapter else None
    return {"loss": {"base": base, "adapter": adapter, "merged": merged}, "recovery": recovery}


def _require_close(report: dict[str, Any], dtype: torch.dtype) -> None:
    if "log_probability_difference" not in report:
        return
    difference, effect = (report[name]["mean"] for name in ("log_probability_difference", "adapter_effect"))
    if not difference <= max(_ROUNDING[dtype], effect / 2):
        raise MergeMismatchError(
            f"The merged model is not its base and adapter: log-probabilities of {report['decision_tokens']} tokens "
            f"differ by {difference:.3g} on average, where rounding explains {_ROUNDING[dtype]:g} and the adapter as "
            f"a whole does {effect:.3g}. Nothing was written. Please report it with the architecture's name; "
            "--no-verify (`verify=False`) writes the merged model all the same."
        )


@torch.no_grad()
def _decide(model: Any, contexts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
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
        decisions.append(out[0, ids.shape[1] :].cpu())
    return decisions


@torch.no_grad()
def _score(
    model: Any, contexts: Sequence[torch.Tensor], decisions: list[torch.Tensor], rows: Sequence[SampleTokens]
) -> _Scores:
    log_probabilities, choices = [torch.empty(0)], [torch.empty(0, dtype=torch.long)]
    for context, decision in zip(contexts, decisions, strict=True):
        logits = _logits(model, torch.cat([context, decision]), len(context))
        log_probabilities.append(log_softmax(logits, -1).gather(-1, decision[:, None])[:, 0])
        choices.append(logits.argmax(-1))
    return _Scores(decisions, torch.cat(log_probabilities), torch.cat(choices), _loss(model, rows))


@torch.no_grad()
def _loss(model: Any, rows: Sequence[SampleTokens]) -> float | None:
    """Mean over the decision tokens of all samples, in nats."""
    total, count = 0.0, 0
    for row in tqdm(rows, desc="Scoring samples", delay=2):
        decision = row.ids[row.num_context :]
        logits = _logits(model, row.ids, row.num_context)
        total -= float(log_softmax(logits, -1).gather(-1, decision[:, None]).double().sum())
        count += len(decision)
    return total / count if count else None


def _logits(model: Any, ids: torch.Tensor, num_context: int) -> torch.Tensor:
    """float32[decision tokens, vocabulary]: what predicts each token from `num_context` on."""
    kept = len(ids) - num_context + 1
    out = model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=kept)
    return out.logits[0, -kept:-1].float().cpu()


@contextmanager
def _adapted(reference: Reference, dtype: torch.dtype, device: str) -> Iterator[tuple[PeftModel, _Biases]]:
    """Base and adapters in PEFT, unmerged; and the base's biases, since an adapter may have its own."""
    _free()
    options: dict[str, Any] = {} if reference.allow_pickle else {"use_safetensors": True}
    if reference.quantization is not None:
        options["quantization_config"] = reference.quantization
    model = _model_class(reference.config).from_pretrained(
        reference.base,
        dtype=reference.dtype or dtype,
        device_map=device,
        trust_remote_code=reference.trust_remote_code,
        **options,
    )
    if reference.quantization is not None:
        keep_linear4bit_trainable(model)
    biases = [
        (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if name.endswith("bias")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for number, adapter in enumerate(reference.adapters):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            config, tensors = as_layout(adapter, reference.layout)
            write_adapter(folder, config, tensors)
            if not number:
                resize_vocabulary(model, tensors, config)
            if number:
                model.load_adapter(folder, f"adapter{number}")
            else:
                model = PeftModel.from_pretrained(model, folder, "adapter0")
    _weigh(model, {f"adapter{number}": weight for number, weight in enumerate(reference.weights)})
    yield model.eval(), biases


@contextmanager
def _without_adapters(model: PeftModel, biases: _Biases) -> Iterator[None]:
    """Runs a model as its base, with the biases that it had."""
    with warnings.catch_warnings():
        # Of biases that stay the adapter's when it is switched off.
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
        trained = [parameter.data for parameter, _ in biases]
        with model.disable_adapter():
            try:
                for parameter, base in biases:
                    parameter.data = base
                yield
            finally:
                for (parameter, _), data in zip(biases, trained, strict=True):
                    parameter.data = data


def _weigh(model: PeftModel, weights: dict[str, float]) -> None:
    """Has all adapters act, each with its factor."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] *= weights[name]
    if len(weights) > 1:
        model.base_model.set_adapter(list(weights))


def _model_class(config: PretrainedConfig) -> Any:
    """The class that the checkpoint names."""
    return named_class(config) or AutoModelForCausalLM


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _free() -> None:
    """Gives back the memory of the model before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dtype_of(folder: Path) -> torch.dtype:
    """The type of most of a checkpoint's weights."""
    sizes: dict[torch.dtype, int] = {}
    for _, entry in open_checkpoint(folder).tensors():
        if entry.dtype in TORCH_DTYPES:
            dtype = TORCH_DTYPES[entry.dtype]
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(entry.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])

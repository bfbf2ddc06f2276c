# SPDX-License-Identifier: Apache-2.0
"""One training step of each method, timed, with its memory; running out of it is a result."""

import os
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextConfig, FrozenContextTrainer
from tests.benchmarks.gpu.device import Device
from tests.training.runs import word_tokenizer

Method = Literal["tier 2", "tier 2, reused", "tier 3, stretches", "SFTTrainer", "tier 2, reused and compiled"]
# The last of them is measured once, since compiling takes minutes.
METHODS: tuple[Method, ...] = ("tier 2", "tier 2, reused", "tier 3, stretches", "SFTTrainer")
Outcome = Literal["measured", "out of memory", "no time left", "does not fit", "failed"]
# Passes over the context's layers, counted in forwards, by which a step's time is guessed before it is run: one; one
# to fill the store and nothing; forward, recomputation and two for the backward, once more with stretches.
FORWARDS: dict[str, float] = {"tier 2": 1.0, "tier 2, reused": 0.1, "tier 3, stretches": 5.0, "SFTTrainer": 4.0}
COMPILED: Method = "tier 2, reused and compiled"
FORWARDS[COMPILED] = FORWARDS["tier 2, reused"]
# Assumed.
COMPILE_SECONDS = 120.0
REUSING = ("tier 2, reused", COMPILED)
STRETCH = 2048


@dataclass(frozen=True)
class Measurement:
    """One step of one method.

    Attributes:
        model: Its name.
        method: Its name.
        context: Context tokens.
        decision: Decision tokens.
        cap_gib: GiB that the process was allowed; None: all there are.
        outcome: What came of it. Whatever was not measured is None.
        note: Why there is no figure, in words.
        step_seconds: One optimizer step.
        prefill_seconds: Of which to encode the context, or to find it.
        decision_seconds: Of which forward and backward of the decision.
        peak_bytes: Most that tensors took, the model included.
        reserved_bytes: Most that the allocator held.
        chunk_size: Tokens per prefill forward at the end, which running out of memory lowers.
        loss: Of the last step.
    """

    model: str
    method: str
    context: int
    decision: int
    cap_gib: int | None = None
    outcome: Outcome = "measured"
    note: str = ""
    step_seconds: float | None = None
    prefill_seconds: float | None = None
    decision_seconds: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    chunk_size: int | None = None
    loss: float | None = None

    def as_figures(self) -> dict[str, Any]:
        rates = {
            "prefill_tokens_per_second": _rate(self.context, self.prefill_seconds),
            "decision_tokens_per_second": _rate(self.decision, self.decision_seconds),
        }
        return asdict(self) | (rates if self.method == "tier 2" else dict.fromkeys(rates))


def _rate(num_tokens: int, seconds: float | None) -> float | None:
    return num_tokens / seconds if seconds else None


class _Clock(TrainerCallback):
    """Seconds of each optimizer step, from an idle device to an idle device."""

    def __init__(self, device: Device):
        self._device, self.seconds = device, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._device.synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._device.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def measure(
    method: Method,
    name: str,
    model: PeftModel,
    device: Device,
    context: int,
    decision: int,
    *,
    cap_gib: int | None = None,
    chunk_size: int = 2048,
    one_step: bool = False,
) -> Measurement:
    """Trains a step or two, and measures the last; failing is an outcome like any other.

    Args:
        method: What to train with.
        name: Of the model, for the result.
        model: With adapters, on the device.
        device: Where it is.
        context: Context tokens of the sample.
        decision: Decision tokens.
        cap_gib: GiB that the process may use.
        chunk_size: `prefill_chunk_size`.
        one_step: Without a first step that pays for kernels that are compiled and tuned.
    """
    # Reuse needs a first step, which encodes what the second finds.
    steps = 1 if one_step and method not in REUSING else 2
    device.clear()
    outcome: Outcome
    try:
        with device.capped(cap_gib):
            return _measured(method, name, model, device, context, decision, cap_gib, chunk_size, steps)
    except torch.OutOfMemoryError as error:
        outcome, note = "out of memory", described(error)
    # Whatever it is: the other measurements are worth having.
    except Exception as error:
        traceback.print_exc()
        outcome, note = "failed", described(error)
    finally:
        model.zero_grad(set_to_none=True)
        _uncompile(model)
    # Not inside `except`, where the exception holds the step's tensors.
    if outcome == "out of memory" or device.answers():
        device.clear()
    return Measurement(name, method, context, decision, cap_gib, outcome, note)


def described(error: BaseException) -> str:
    """An error in one line."""
    text = (str(error).splitlines() or [""])[0][:200]
    return text if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {text}"


def _uncompile(model: PeftModel) -> None:
    """Undoes `torch_compile`, which transformers also leaves in the environment for whatever trains next."""
    for module in model.modules():
        module._compiled_call_impl = None
    for name in ("BACKEND", "MODE"):
        os.environ.pop(f"ACCELERATE_DYNAMO_{name}", None)


def _measured(
    method: Method,
    name: str,
    model: PeftModel,
    device: Device,
    context: int,
    decision: int,
    cap_gib: int | None,
    chunk_size: int,
    steps: int,
) -> Measurement:
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(method, model, device, folder, context, decision, steps, chunk_size, clock)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        chunk = trainer._frozen.encoder.chunk_size if method.startswith("tier 2") else None
    peak, reserved = device.peak_bytes()
    return Measurement(
        name,
        method,
        context,
        decision,
        cap_gib,
        step_seconds=clock.seconds[-1],
        prefill_seconds=logs[-1].get("context/prefill_seconds"),
        decision_seconds=logs[-1].get("context/decision_seconds"),
        peak_bytes=peak,
        reserved_bytes=reserved,
        chunk_size=chunk,
        loss=logs[-1]["loss"],
    )


def _trainer(
    method: Method,
    model: PeftModel,
    device: Device,
    folder: str,
    context: int,
    decision: int,
    steps: int,
    chunk_size: int,
    clock: TrainerCallback,
) -> SFTTrainer:
    fields: dict[str, Any] = {
        "max_steps": steps,
        "max_length": None,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "learning_rate": 1e-5,
        "bf16": device.on_gpu,
        "use_cpu": not device.on_gpu,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    rows = sample(model.config.get_text_config().vocab_size, context, decision)
    shared = {"train_dataset": rows, "processing_class": word_tokenizer(), "callbacks": [clock]}
    if method == "SFTTrainer":
        return SFTTrainer(model, SFTConfig(folder, **fields), **shared)
    fields |= {"verify_context": "never", "prefill_chunk_size": chunk_size, "tier": 2}
    if method in REUSING:
        # As large as it takes; after the first step every context is found.
        fields |= {"context_cache_size": "1TiB", "max_context_staleness": 1 << 20}
    if method == COMPILED:
        fields |= compiled_fields(device)
    if method == "tier 3, stretches":
        fields |= {"tier": 3, "sequence_chunk_size": STRETCH}
    return FrozenContextTrainer(model, FrozenContextConfig(folder, **fields), **shared)


def compiled_fields(device: Device) -> dict[str, Any]:
    """What has a training compiled; on a CPU without a compiler of C++."""
    return {"torch_compile": True} | ({} if device.on_gpu else {"torch_compile_backend": "aot_eager"})


def sample(vocabulary: int, context: int, decision: int) -> Dataset:
    """One sample of random tokens whose last `decision` ones, but for the first of them, are supervised."""
    generator = torch.Generator().manual_seed(context)
    tokens = torch.randint(3, min(vocabulary, 1 << 16), (context + decision,), generator=generator).tolist()
    labels = [-100] * (context + 1) + tokens[context + 1 :]
    return Dataset.from_dict({"input_ids": [tokens], "labels": [labels]})

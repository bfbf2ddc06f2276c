# SPDX-License-Identifier: Apache-2.0
"""An independent reference for what training on a frozen context has to compute.

Nothing here uses the package's context code. Each sample is run alone, unpadded, by one plain forward over
its whole sequence; the frozen context is expressed as a stop-gradient:

1. A context position reaches a decision position only through what its layers compute there: keys and values,
   conv inputs, decay, beta and the recurrent state made of them.
2. All of these are made by modules that act on each position by itself (linear modules and their LoRA
   factors, norms, embeddings, MLPs, experts) and, between them, by causal mixing that has no adapter.
3. So detaching the output of every such module at context positions leaves nothing that a gradient could flow
   through there: the residual stream at context positions is a constant, layer after layer.

A weight that is used *across* positions (a short convolution, `A_log`, `dt_bias`) is applied outside its
module's forward, where no hook can tell positions apart. Such weights are not adapters; a model in which one
is trainable is refused.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from torch import nn
from trl.kernels import chunked_logprob

IGNORED = -100
# The argument of a model of transformers that takes a cache.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


@dataclass(frozen=True)
class Sample:
    """One training sample: token ids and labels, both `[S]` and int64, -100 where nothing is supervised."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def boundary(self) -> int:
        """Index of the token whose output predicts the first label that anything predicts."""
        supervised = [index for index, label in enumerate(self.labels.tolist()) if label != IGNORED]
        return max(supervised[0] - 1, 0)

    @property
    def context(self) -> torch.Tensor:
        """Token ids before the boundary, `[boundary]`."""
        return self.input_ids[: self.boundary]

    @property
    def decision(self) -> torch.Tensor:
        """Token ids from the boundary on, `[S - boundary]`."""
        return self.input_ids[self.boundary :]

    @property
    def decision_labels(self) -> torch.Tensor:
        """Labels from the boundary on, `[S - boundary]`."""
        return self.labels[self.boundary :]


def random_sample(boundary: int, decision_length: int, *, seed: int = 0, low: int = 3, high: int = 95) -> Sample:
    """A sample of random tokens whose decision is `decision_length` tokens, all but its first supervised."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(low, high, (boundary + decision_length,), generator=generator)
    labels = input_ids.clone()
    labels[: boundary + 1] = IGNORED
    return Sample(input_ids, labels)


@torch.no_grad()
def reference_logprobs(
    model: nn.Module, input_ids: torch.Tensor, boundary: int, *, context_adapters: bool = True
) -> torch.Tensor:
    """Log-probability of every token after the boundary token, by one plain forward.

    Args:
        model: A causal language model.
        input_ids: The whole sequence, `[S]`, int64.
        boundary: Number of context tokens.
        context_adapters: Whether LoRA acts at context positions.

    Returns:
        Float64 tensor `[S - boundary - 1]`.
    """
    adapters = nullcontext() if context_adapters else no_adapters_at_context(model, boundary, len(input_ids))
    with adapters:
        logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
    return token_logprobs(logits[boundary:], input_ids[boundary:])


def token_logprobs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token but the first, from logits `[T, V]` and ids `[T]`: float64 `[T - 1]`."""
    logprobs = logits[:-1].double().log_softmax(dim=-1)
    return logprobs.gather(-1, input_ids[1:, None].to(logits.device))[:, 0]


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over supervised labels of their negative log-likelihood, from logits `[T, V]` and labels `[T]`."""
    return nn.functional.cross_entropy(
        logits[:-1].float() if logits.dtype != torch.float64 else logits[:-1],
        labels[1:].to(logits.device),
        ignore_index=IGNORED,
        reduction="sum",
    )


def num_labels(samples: Sequence[Sample]) -> int:
    """Number of labels that some output predicts, over all samples."""
    return sum(int((sample.labels[1:] != IGNORED).sum()) for sample in samples)


def reference_gradients(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    reduction: Literal["sum", "mean"] = "mean",
    context_adapters: bool = True,
) -> dict[str, torch.Tensor]:
    """Gradient of every trainable weight, with a stop-gradient on everything computed at context positions.

    Args:
        model: A causal language model whose trainable weights all belong to modules that act on each position
            by itself, LoRA's for instance.
        samples: Run one at a time, unpadded.
        reduction: `"sum"` of the negative log-likelihoods of all labels of all samples, or their `"mean"`.
        context_adapters: Whether LoRA acts at context positions.

    Returns:
        By parameter name, the gradient; zeros where none arrives.

    Raises:
        ValueError: A trainable weight is used where gradient cannot be stopped by position, or a sample's
            length equals some other size in the model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for sample in samples:
        length = len(sample.input_ids)
        with ExitStack() as stack:
            if not context_adapters:
                stack.enter_context(no_adapters_at_context(model, sample.boundary, length))
            stack.enter_context(stop_gradient_at_context(model, sample.boundary, length))
            logits = model(input_ids=sample.input_ids[None], use_cache=False).logits[0]
        loss = negative_log_likelihood(logits, sample.labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    if reduction == "mean":
        count = num_labels(samples)
        total = {name: gradient / count for name, gradient in total.items()}
    return total


@contextmanager
def stop_gradient_at_context(model: nn.Module, boundary: int, length: int) -> Iterator[None]:
    """Detach, at positions before `boundary`, the output of every module that holds a weight.

    Args:
        model: Run once, inside the context manager, on a batch of one sequence.
        boundary: Number of context tokens.
        length: Number of tokens in the whole sequence. It is how the sequence dimension is recognised in a
            module's output, so it may equal no other size in the model.

    Raises:
        ValueError: See `reference_gradients`.
    """
    if boundary == 0:
        yield
        return
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    if length in sizes:
        raise ValueError(f"A length of {length} is also the size of a weight; take another, none of {sorted(sizes)}.")

    seen: set[nn.Module] = set()

    def hook(module: nn.Module, _arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(hook(module, None, part) for part in output)
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        dimensions = [dimension for dimension, size in enumerate(output.shape) if size == length]
        if len(dimensions) != 1:
            # Attention weights `[1, heads, S, S]`, or norms on `[S * heads, dim]`: nothing trainable makes
            # them, and what they are made of and used for has its gradient stopped before and after.
            return output
        seen.add(module)
        context, decision = output.split([boundary, length - boundary], dim=dimensions[0])
        return torch.cat([context.detach(), decision], dim=dimensions[0])

    holders = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(hook) for module in holders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        if module not in seen and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(f"`{name}` is trainable, but its output shows no positions to stop the gradient at.")


@contextmanager
def no_adapters_at_context(model: nn.Module, boundary: int, length: int) -> Iterator[None]:
    """Give, at positions before `boundary`, what each LoRA layer's base layer alone gives.

    Args:
        model: A `PeftModel` of LoRA, run inside the context manager on a batch of one sequence.
        boundary: Number of context tokens.
        length: Number of tokens in the whole sequence.
    """

    def hook(module: LoraLayer, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        dimension = output.shape.index(length)
        context, _ = module.base_layer(*arguments).split([boundary, length - boundary], dim=dimension)
        _, decision = output.split([boundary, length - boundary], dim=dimension)
        return torch.cat([context, decision], dim=dimension)

    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, LoraLayer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Float64Torch(ModuleType):
    """The `torch` module, in which float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextmanager
def double_precision(model: nn.Module) -> Iterator[None]:
    """Let a model converted by `.double()` compute in float64 also where its code asks for float32 by name.

    So does TRL's head. What is left of a difference is then not rounding, which is another on each kind of processor.
    """
    modeling = {sys.modules[type(module).__module__] for module in model.modules()} | {chunked_logprob}
    patched = [module for module in modeling if getattr(module, "torch", None) is torch]
    to_float = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    for module in patched:
        module.torch = _Float64Torch("torch")
    try:
        yield
    finally:
        torch.Tensor.float = to_float
        for module in patched:
            module.torch = torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`|actual - expected| / |expected|` in the Euclidean norm, in float64; 0 for two empty tensors."""
    if actual.shape != expected.shape:
        raise ValueError(f"Shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}.")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def worst_gradient_error(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest relative error over weights.

    A weight whose gradient is below a hundredth of the largest is measured against that hundredth: there a
    relative error of 1e-5 is 1e-7 of the largest gradient, float32's own resolution.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"Weights differ: {sorted(actual.keys() ^ expected.keys())}.")
    norms = {name: float(gradient.double().norm()) for name, gradient in expected.items()}
    floor = 1e-2 * max(norms.values())
    return max(
        float((actual[name].double() - gradient.double()).norm()) / max(norms[name], floor)
        for name, gradient in expected.items()
    )


def closed_form_query_gradient(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output_gradients: torch.Tensor,
    first_position: int,
) -> torch.Tensor:
    """Gradient of the loss in the queries of one attention head, written out.

    `dL/dq_i = sum_j dα_ij/dq_i (v_j · dL/do_i)` with `dα_ij/dq_i = α_ij (k_j - sum_l α_il k_l) / sqrt(d)`,
    j and l over the context's keys and the decision's own up to i.

    Args:
        queries: Decision queries as they meet the keys (rotated, normalised), `[D, d]`.
        keys: Context keys, then decision keys, `[N, d]`.
        values: The same for values, `[N, e]`.
        output_gradients: `dL/do` of this head's output, `[D, e]`.
        first_position: Index among the keys of the first decision token, `N - D`.

    Returns:
        `dL/dq`, `[D, d]`.
    """
    gradients = torch.zeros_like(queries)
    root = queries.shape[-1] ** 0.5
    for i, query in enumerate(queries):
        visible = range(first_position + i + 1)
        scores = torch.stack([query @ keys[j] / root for j in visible])
        alpha = (scores - scores.max()).exp()
        alpha = alpha / alpha.sum()
        mean_key = sum(alpha[j] * keys[j] for j in visible)
        for j in visible:
            slope = alpha[j] * (keys[j] - mean_key) / root
            gradients[i] += slope * (values[j] @ output_gradients[i])
    return gradients

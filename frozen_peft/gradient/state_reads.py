# SPDX-License-Identifier: Apache-2.0
"""How much of what a recurrent layer puts out comes from the state it started from, read off a forward as it runs.

The rule of a Gated DeltaNet (or Mamba-2, or Kimi delta attention) is affine in the state it starts from: for the same
queries, keys, values, decay and beta, its output is what the state gives plus what the decision's own updates give.
So the part of the state is `o - o0`, where `o0` is the output of the same rule on a state of zeros, and its share is
`|o - o0| / |o|`, over all decision tokens and heads, at the output of the rule: before norm, gate and projection.

The two parts may point against each other, so a share can exceed 1.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["observed_rules"]

# What the rules of transformers 5.23 call the state that they start from.
STATE_ARGUMENTS = ("initial_state", "initial_states")

Rule = Callable[..., Any]
Note = Callable[[int, torch.Tensor, torch.Tensor], None]


@contextmanager
def observed_rules(model: torch.nn.Module, note: Note) -> Iterator[None]:
    """Reads the recurrent rule of every layer in the forwards inside, which go on as ever.

    Args:
        model: The transformers model.
        note: Called for each rule that runs, with the index of its layer, its output, and the part of the output that
            comes from the state it started from (zeros where it started from none), both `(1, D, ...)`.
    """
    observer = _Observer(note)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                stack.callback(module.register_forward_pre_hook(observer.enter).remove)
        for file in _modeling_files(model):
            for name, function in list(vars(file).items()):
                if (argument := _state_argument(function)) is not None:
                    stack.enter_context(patch.object(file, name, observer.wrap(function, argument)))
        yield


class _Observer:
    """Knows which layer runs."""

    def __init__(self, note: Note):
        self.note = note
        self.layer = -1
        self.inside = False

    def enter(self, module: Any, args: Any) -> None:
        self.layer = module.layer_idx

    def wrap(self, rule: Rule, argument: str) -> Rule:
        signature = inspect.signature(rule)

        def observed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return rule(*args, **kwargs)
            self.inside = True
            try:
                result = rule(*args, **kwargs)
                output = _output(result)
                # None where a fused kernel is not there, and the caller goes on without it.
                if output is not None:
                    self._compare(rule, signature.bind(*args, **kwargs), argument, output)
            finally:
                self.inside = False
            return result

        return observed

    @torch.no_grad()
    def _compare(self, rule: Rule, call: inspect.BoundArguments, argument: str, output: torch.Tensor) -> None:
        state = call.arguments.get(argument)
        if state is None:
            self.note(self.layer, output, torch.zeros_like(output))
            return
        call.arguments[argument] = torch.zeros_like(state)
        own = _output(rule(*call.args, **call.kwargs))
        assert own is not None, "the same rule, which had an output"
        self.note(self.layer, output, output - own)


def _output(result: Any) -> torch.Tensor | None:
    """The output of a rule, which may come with its last state."""
    return result[0] if isinstance(result, tuple) else result


def _modeling_files(model: torch.nn.Module) -> list[ModuleType]:
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if "modeling_" in name]


def _state_argument(function: object) -> str | None:
    """How a recurrent rule calls the state that it starts from; None of anything else."""
    if not callable(function) or isinstance(function, type):
        return None
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in STATE_ARGUMENTS if name in parameters), None)

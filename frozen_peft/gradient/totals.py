# SPDX-License-Identifier: Apache-2.0
"""The gradient of embeddings and weights, added up over the stretches of a sequence.

Shapes: B samples, S tokens of a sample, E hidden size.
"""

import torch

__all__ = ["Root", "Totals"]

# An output of a stretch and the gradient it gets; None where nothing behind it gives one.
Root = tuple[torch.Tensor, torch.Tensor | None]


class Totals:
    """Gradient of the embeddings and the weights, summed over the stretches, in float32 or more.

    Args:
        embeddings: Of all tokens, shape `(B, S, E)`, or None where the decoder embeds them itself.
        parameters: The weights; None: they are in shards, and the hooks of their modules reduce their gradients over
            processes and add them up. Embeddings get no gradient then.
    """

    def __init__(self, embeddings: torch.Tensor | None, parameters: list[torch.Tensor] | None):
        self.embeddings, self.parameters = embeddings, parameters
        self.of_parameters: list[torch.Tensor | None] = [None for _ in parameters or ()]
        self.of_embeddings: torch.Tensor | None = None
        if embeddings is not None and embeddings.requires_grad and parameters is not None:
            self.of_embeddings = torch.zeros_like(embeddings)

    def leaf_of_embeddings(self, start: int, stop: int) -> torch.Tensor | None:
        """Embeddings of a stretch, cut off from what made them."""
        if self.embeddings is None:
            return None
        return self.embeddings[:, start:stop].detach().requires_grad_(self.of_embeddings is not None)

    def add(
        self, roots: list[Root], embeddings: torch.Tensor | None, states: list[torch.Tensor], start: int
    ) -> list[torch.Tensor | None]:
        """Differentiates a stretch, adds what is for embeddings and weights, and returns what is for its states.

        Args:
            roots: Outputs of the stretch with their gradients.
            embeddings: The leaf that the stretch ran on, if it ran on embeddings.
            states: The leaves that it started from.
            start: Its first token.
        """
        live = [
            (output, gradient.to(output.device, output.dtype))
            for output, gradient in roots
            if gradient is not None and output.requires_grad
        ]
        outputs, of_outputs = [output for output, _ in live], [gradient for _, gradient in live]
        if self.parameters is None:
            assert live, "every process runs every backward"
            torch.autograd.backward(outputs, of_outputs)
            return [state.grad for state in states]
        if not live:
            return [None] * len(states)
        leaves = [*self.parameters, *states]
        if embeddings is not None and self.of_embeddings is not None:
            leaves.append(embeddings)
        gradients = torch.autograd.grad(outputs, leaves, of_outputs, allow_unused=True)
        if embeddings is not None and self.of_embeddings is not None:
            self.of_embeddings[:, start : start + embeddings.shape[1]] = gradients[-1]
        num_weights = len(self.parameters)
        for index, gradient in enumerate(gradients[:num_weights]):
            if gradient is not None:
                self.of_parameters[index] = _sum(self.of_parameters[index], gradient)
        return list(gradients[num_weights : num_weights + len(states)])

    def results(self) -> list[torch.Tensor | None]:
        """Gradient of the embeddings or None, then of each weight in its type."""
        of_parameters = zip(self.of_parameters, self.parameters or (), strict=True)
        return [self.of_embeddings, *(total if total is None else total.to(p.dtype) for total, p in of_parameters)]


def _sum(total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total.add_(gradient)

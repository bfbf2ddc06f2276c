# SPDX-License-Identifier: Apache-2.0
"""The divergence between what teacher and student say about a token, with logits of some tokens at a time.

With p the teacher's distribution over the vocabulary and q the student's, both at temperature T (softmax of logits
over T):

- `forward_kl` is T² KL(p ‖ q): the student covers all that the teacher might say.
- `reverse_kl` is T² KL(q ‖ p): the student says nothing that the teacher would not.
- `jsd` is T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)) with m = β p + (1 − β) q, the generalized Jensen-Shannon divergence of
  arXiv 2306.13649 (equation 1), as `trl.experimental.gkd` has it: β = 0 is `forward_kl`, and β = 1 `reverse_kl`.

T² keeps gradients as large as they are at T = 1 (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2).

*Top k.* Kept of the teacher are its k most likely tokens and one remainder, which all others fall into. The
divergence is then that of the two distributions over these k + 1 outcomes. It is a true divergence, zero exactly where
both agree on them, and never above the one over the whole vocabulary, whichever it is (data processing: the log sum
inequality, Cover and Thomas, Elements of Information Theory, theorem 2.7.1). Renormalising the k tokens instead would
leave free how much the student says beside them. TRL's `trl.experimental.sdft` calls the remainder `add_tail`.

*Whole vocabulary.* Kept of the teacher are its last hidden states, of which the base model's head, which no training
changes, makes the logits again: some thousand numbers per token instead of some hundred thousand.

Shapes in this module: N tokens, V vocabulary, H hidden size, K tokens kept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from frozen_peft.distillation.head import LogitHead

__all__ = ["Answers", "Direction", "Divergence", "join_answers", "select_answers"]

Direction = Literal["forward_kl", "reverse_kl", "jsd"]

# What the teacher says about N tokens, by name: `tokens` (N, K), int32, and `logprobs` (N, K + 1), float32, the
# remainder last; or `hidden` (N, H), in the model's dtype.
Answers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """How teacher and student are compared.

    Attributes:
        direction: Which of them.
        top_k: Tokens kept of the teacher; 0: the whole vocabulary.
        temperature: What logits are divided by.
        chunk_size: Tokens whose logits exist at a time.
        beta: The teacher's share in the mixture of `jsd`, from 0 to 1.
    """

    direction: Direction = "forward_kl"
    top_k: int = 0
    temperature: float = 1.0
    chunk_size: int = 128
    beta: float = 0.5

    @torch.no_grad()
    def answers(self, hidden: torch.Tensor, head: LogitHead) -> Answers:
        """What is kept of the teacher.

        Args:
            hidden: Its last hidden states, shape `(N, H)`.
            head: The base model's.
        """
        # A `top_k` of the vocabulary or more keeps the whole of it.
        if not self.top_k or self.top_k >= head.num_tokens:
            return {"hidden": hidden}
        chunks = [self._top(head(part) / self.temperature) for part in hidden.split(self.chunk_size)]
        return join_answers(chunks)

    def per_token(
        self, hidden: torch.Tensor, head: LogitHead, answers: Answers, teacher_head: LogitHead
    ) -> torch.Tensor:
        """The divergence at each token, in nats; its gradient reaches the student's hidden states and head.

        Args:
            hidden: The student's last hidden states, shape `(N, H)`.
            head: The student's head.
            answers: What was kept of the teacher, N tokens.
            teacher_head: The base model's head.

        Returns:
            Shape `(N,)`, float32 or more.
        """
        if not len(hidden):
            # Nothing to compare, and still a part of the student's graph.
            return hidden.sum(-1).float()
        parts = []
        for start in range(0, len(hidden), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            arguments = (hidden[chunk], head, select_answers(answers, chunk), teacher_head)
            if torch.is_grad_enabled():
                part = checkpoint(self._of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                part = self._of_chunk(*arguments)
            parts.append(part)
        return torch.cat(parts)

    def _top(self, logits: torch.Tensor) -> Answers:
        tokens = logits.topk(self.top_k, dim=-1).indices
        return {"tokens": tokens.int(), "logprobs": _coarse(logits, tokens).float()}

    def _of_chunk(
        self, hidden: torch.Tensor, head: LogitHead, answers: Answers, teacher_head: LogitHead
    ) -> torch.Tensor:
        logits = head(hidden) / self.temperature
        if "hidden" in answers:
            with torch.no_grad():
                log_p = (teacher_head(answers["hidden"]) / self.temperature).log_softmax(-1)
            log_q = logits.log_softmax(-1)
        else:
            log_p = answers["logprobs"].to(logits)
            log_q = _coarse(logits, answers["tokens"].to(logits.device).long())
        return self.temperature**2 * self._between(log_p, log_q)

    def _between(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """The divergence `(N,)` of log-probabilities `(N, outcomes)` of teacher and student."""
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.direction, self.beta)
        if beta == 0.0:
            return _kl(log_p, log_q)
        if beta == 1.0:
            return _kl(log_q, log_p)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def join_answers(parts: list[Answers]) -> Answers:
    """The answers of several decisions as those of one; at least one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def select_answers(answers: Answers, rows: slice) -> Answers:
    """The answers about some tokens."""
    return {name: tensor[rows] for name, tensor in answers.items()}


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _coarse(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens `(N, K)` and of all others together, which come last: `(N, K + 1)`."""
    total = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), others], dim=-1) - total

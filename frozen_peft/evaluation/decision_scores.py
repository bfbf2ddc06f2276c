# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of decisions over frozen contexts, with adapters and without.

1. Equal decisions in equal contexts are scored once. Those that are left are sorted by their contexts, so that what
   several begin with comes together, and run in batches.
2. Contexts are encoded once, however many decisions have them (`ContextEncoder`: what others begin with too is kept
   until the last of them has come), and all decisions of a batch run in one forward.
3. Logits exist only at the positions that predict a decision's token, for as many at a time as fit a bound. They come
   from the model's own forward with the decoder's output given, so that whatever the model does to its logits
   (scaling, soft-capping, an adapter on the head) is done.

With adapters that an invocation switches on (PEFT's activated LoRA) contexts are encoded by the base model, once for
both, and a decision begins at the invocation.

Shapes: N tokens to predict, E hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from frozen_peft.adapters import activate_at_invocation, require_base
from frozen_peft.context import (
    ContextEncoder,
    ContextStore,
    Cut,
    Decision,
    FrozenContext,
    cut_batch,
    decision_forward,
    pad_decisions,
    trained_base_weights,
    use_segmented_attention,
    verify_context,
)
from frozen_peft.context.encoder import ADAPTERS_OFF
from frozen_peft.context.models import get_decoder, get_pretrained_model, require_separable_adapters
from frozen_peft.context.modes import without_dropout
from frozen_peft.context.prefixes import token_order
from frozen_peft.context.rope import rows_of_lengths
from frozen_peft.evaluation.decision_tokens import TokenizedDecision
from frozen_peft.evaluation.model_loading import num_positions, require_adapters_on_weights
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = ["DecisionScore", "DecisionScorer", "Weights"]

# "base": the model without adapters, or with its adapters switched off. "adapted": with its adapters.
Weights = Literal["base", "adapted"]
IGNORED_LABEL = -100
# Elements of the logits that exist at a time: 128 MiB in float32.
MAX_LOGITS = 2**25
# Tokens of the contexts in one batch, unless a single one is longer: bounds the frozen contexts that live together.
MAX_CONTEXT_TOKENS = 2**14


@dataclass(frozen=True)
class DecisionScore:
    """What a model makes of a decision.

    Attributes:
        logprob: Sum of the log-probabilities of its tokens, in nats. A first token that nothing comes before is not
            predicted and does not count.
        num_tokens: Tokens in that sum.
        is_greedy: Whether each token is the most likely one, up to the first that ends the turn: whether greedy
            decoding gives this decision. None where its first token is not predicted.
        kl_to_base: Kullback-Leibler divergence of the distributions that predict its tokens from the base model's,
            KL(base || adapted) over the whole vocabulary, mean per token, in nats; None but where both were scored.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool | None
    kl_to_base: float | None = None


class _Tokens(NamedTuple):
    """Figures of N predicted tokens, on the CPU.

    Attributes:
        logprobs: Log-probability of each, float64.
        is_top: Whether it is the most likely one.
        kl: KL to the base of the distribution that predicts it, float64; 0 where only one of the two was scored.
    """

    logprobs: torch.Tensor
    is_top: torch.Tensor
    kl: torch.Tensor


class DecisionScorer:
    """Scores decisions with one model.

    The model's attention may be switched to the exact one over two segments (`use_segmented_attention`), as training
    on frozen contexts does, and PEFT's activated LoRA to this package's variant of it; all else is left as it was.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        batch_size: Decisions per forward.
        chunk_size: Context tokens per prefill forward; 0: one forward.
        stop_tokens: Token ids that end a turn.
        store: Where contexts that the base encodes are kept, and found if they were kept before; None: nowhere.

    Raises:
        ValueError: `batch_size` or `chunk_size` is out of range, the adapter has no frozen context to go with, or
            there is a store and the base is in training.
        ContextMismatchError: transformers does not continue this architecture exactly from a cache.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        batch_size: int = 8,
        chunk_size: int = 2048,
        stop_tokens: Sequence[int] = (),
        store: ContextStore | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 decision or more, found {batch_size}.")
        self.model, self._pretrained = model, get_pretrained_model(model)
        self._decoder = get_decoder(self._pretrained)
        self._batch_size, self._stop_tokens = batch_size, frozenset(stop_tokens)
        self._cut = Cut(invocation=_settle_invocation(model))
        if self._cut.invocation:
            require_separable_adapters(self._pretrained)
        # Where contexts are encoded by the same weights, they are encoded once.
        self._encoder_of: dict[Weights, ContextEncoder] = {"base": _base_encoder(model, chunk_size, store)}
        self._encoder_of["adapted"] = (
            self._encoder_of["base"] if self._cut.invocation else ContextEncoder(model, chunk_size=chunk_size)
        )
        self._chunk_size, self._store = chunk_size, store
        self._verified = False
        use_segmented_attention(model)

    @property
    def num_tokens_encoded(self) -> int:
        """Context tokens that ran through the model so far."""
        encoders = set(self._encoder_of.values())
        return sum(encoder.counts.num_tokens_encoded for encoder in encoders)

    @torch.no_grad()
    def score(
        self,
        decisions: Sequence[TokenizedDecision],
        *,
        weights: Sequence[Weights],
    ) -> dict[Weights, list[DecisionScore]]:
        """Scores decisions.

        Args:
            decisions: In any order; equal ones cost once.
            weights: Which weights to score with, one after the other in each batch.

        Returns:
            By weights, one score per decision, in their order.

        Raises:
            ValueError: A decision cannot be cut at the adapter's invocation, none of its tokens is predicted, the
                model gives no probabilities for it (NaN or infinite logits), or the base is wanted, and the model is
                not it with its adapters off.
            ContextMismatchError: A decision over a frozen context is not what a plain forward gives.
        """
        if "base" in weights or self._cut.invocation:
            require_base(self.model, "The base model's figures are wanted")
        rows: dict[tuple[bytes, bytes], _Row] = {}
        asked = [rows.setdefault(_key(one), _Row(self._decision(one), one.name)) for one in decisions]
        batches = list(self._batches(list(rows.values())))
        for encoder in {self._encoder_of[which] for which in weights}:
            encoder.expect([row.decision.to_encode for row in rows.values()])
        # The delay keeps the bar away from what takes a moment.
        with tqdm(total=len(rows), desc="Scoring", unit=" decisions", delay=2) as bar:
            for batch in batches:
                self._score(batch, weights)
                bar.update(len(batch))
        if self._store is not None:
            self._store.flush()
        return {which: [self._summed(row, which) for row in asked] for which in weights}

    def _decision(self, tokenized: TokenizedDecision) -> Decision:
        """The decision, cut off its context where the forward over a frozen context begins."""
        input_ids = torch.cat([tokenized.prompt, tokenized.decision])
        labels = input_ids.clone()
        labels[: len(tokenized.prompt)] = IGNORED_LABEL
        if len(input_ids) < 2:
            raise ValueError(f"{tokenized.name}: its one token has nothing before it that could predict it")
        limit = num_positions(self._pretrained)
        if limit is not None and len(input_ids) > limit:
            raise ValueError(
                f"{tokenized.name}: {len(input_ids)} tokens, where the model has {limit} positions; shorten it"
            )
        try:
            ((decision,),) = cut_batch(input_ids[None], labels[None], None, self._cut)
        except ValueError as error:
            raise ValueError(f"{tokenized.name}: {error}") from error
        return decision

    def _batches(self, rows: list["_Row"]) -> Iterator[list["_Row"]]:
        """Rows with equal and with similar contexts next to each other, as many as may run together."""
        # Among equal contexts, the length of the decision sorts by rope length too.
        rows.sort(key=lambda row: (token_order(row.decision.context.numpy()), len(row.decision.input_ids)))
        batch: list[_Row] = []
        num_context = 0
        for row in rows:
            context = row.decision.context
            num_more = 0 if batch and torch.equal(batch[-1].decision.context, context) else len(context)
            is_full = len(batch) == self._batch_size or (num_more > 0 and num_context + num_more > MAX_CONTEXT_TOKENS)
            if batch and is_full:
                yield batch
                batch, num_context, num_more = [], 0, len(context)
            batch.append(row)
            num_context += num_more
        if batch:
            yield batch

    def _score(self, batch: Sequence["_Row"], weights: Sequence[Weights]) -> None:
        """Fills in the rows of a batch."""
        hidden = self._hidden_states(batch, weights)
        split = pad_decisions([row.decision for row in batch])
        is_predicted = split.labels[:, 1:] != IGNORED_LABEL
        row_of, column = is_predicted.nonzero(as_tuple=True)
        targets = split.labels[:, 1:][is_predicted]
        flat = {which: states[row_of.to(states.device), column.to(states.device)] for which, states in hidden.items()}
        parts: dict[Weights, list[_Tokens]] = {which: [] for which in weights}
        size = max(MAX_LOGITS // self._pretrained.config.get_text_config().vocab_size, 1)
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            states = {which: values[chunk] for which, values in flat.items()}
            for which, tokens in self._token_scores(states, targets[chunk]).items():
                parts[which].append(tokens)
        for which, chunks in parts.items():
            joined = _Tokens(*(torch.cat(column) for column in zip(*chunks, strict=True)))
            for index, row in enumerate(batch):
                row.tokens[which] = _Tokens(*(column[row_of == index] for column in joined))
                _require_finite(row, which)
        self._verify(batch)

    def _hidden_states(self, batch: Sequence["_Row"], weights: Sequence[Weights]) -> dict[Weights, torch.Tensor]:
        """Last hidden states of a batch's decisions by weights, shape `(rows, tokens, E)`."""
        contexts = [row.decision.to_encode for row in batch]
        hidden = {}
        encoder, frozen = None, None
        for which in weights:
            if encoder is not self._encoder_of[which] and any(map(len, contexts)):
                # Let go of before the next are encoded, so that only one set of contexts lives at a time.
                encoder, frozen = self._encoder_of[which], None
                with self._context_weights(which):
                    frozen = encoder.encode(contexts)
            with self._weights(which), without_dropout(self.model):
                hidden[which] = self._hidden(batch, frozen)
        return hidden

    def _hidden(self, batch: Sequence["_Row"], frozen: FrozenContext | None) -> torch.Tensor:
        """Last hidden states of a batch's decisions, shape `(rows, tokens, E)`."""
        split = pad_decisions([row.decision for row in batch])
        device = self._pretrained.get_input_embeddings().weight.device
        lengths = [row.decision.to_encode.num_sample_tokens for row in batch]
        rows = rows_of_lengths(self._pretrained, lengths)
        with decision_forward(self.model) if frozen is not None else rows:
            return self._decoder(
                input_ids=split.input_ids.to(device),
                attention_mask=split.attention_mask.to(device),
                position_ids=split.position_ids.to(device),
                **as_cache_argument(self._decoder, frozen),
                use_cache=False,
            ).last_hidden_state

    def _token_scores(self, states: dict[Weights, torch.Tensor], targets: torch.Tensor) -> dict[Weights, _Tokens]:
        """Scores of N tokens from the hidden states `(N, E)` that predict them."""
        logprobs = {}
        for which, hidden in states.items():
            with self._weights(which), without_dropout(self.model):
                logits = self._logits(hidden)
            logprobs[which] = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        kl = torch.zeros(len(targets), dtype=torch.float64)
        if len(logprobs) == 2:
            kl = _divergence(logprobs["base"], logprobs["adapted"]).double().cpu()
        scores: dict[Weights, _Tokens] = {}
        for which, values in logprobs.items():
            goal = targets.to(values.device)
            own = values.gather(-1, goal[:, None])[:, 0].double().cpu()
            scores[which] = _Tokens(own, (values.argmax(-1) == goal).cpu(), kl)
        return scores

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's own forward makes of hidden states `(N, E)`, shape `(N, V)`."""
        positions = torch.arange(len(hidden), device=hidden.device)[None]
        with _decoder_output(self._decoder, hidden[None]):
            outputs = self._pretrained(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
        return outputs.logits[0]

    def _weights(self, which: Weights) -> AbstractContextManager[None]:
        """Runs the model with its adapters or without."""
        if which == "base" and isinstance(self.model, PeftModel):
            return self.model.disable_adapter()
        return nullcontext()

    def _context_weights(self, which: Weights) -> AbstractContextManager[None]:
        """The same for contexts, which an adapter with an invocation is off in."""
        return self._weights("base" if self._cut.invocation else which)

    def _verify(self, batch: Sequence["_Row"]) -> None:
        """Compares the first decision in a context with a plain forward."""
        row = next((row for row in batch if len(row.decision.context)), None)
        if self._verified or row is None:
            return
        self._verified = True
        tokens = torch.cat([row.decision.context, row.decision.input_ids])
        device = self._pretrained.get_input_embeddings().weight.device
        with self._context_weights("adapted"):
            verify_context(self.model, tokens.to(device), len(row.decision.context), chunk_size=self._chunk_size)

    def _summed(self, row: "_Row", which: Weights) -> DecisionScore:
        tokens, labels = row.tokens[which], row.decision.labels
        decision = labels[labels != IGNORED_LABEL].tolist()
        stop = next((place + 1 for place, token in enumerate(decision) if token in self._stop_tokens), len(decision))
        is_whole = len(decision) == len(tokens.logprobs)
        return DecisionScore(
            logprob=float(tokens.logprobs.sum()),
            num_tokens=len(tokens.logprobs),
            is_greedy=bool(tokens.is_top[:stop].all()) if is_whole else None,
            kl_to_base=float(tokens.kl.mean()) if which == "adapted" and "base" in row.tokens else None,
        )


class _Row:
    """One distinct decision, and its scores as they come."""

    def __init__(self, decision: Decision, name: str):
        self.decision, self.name = decision, name
        self.tokens: dict[Weights, _Tokens] = {}


class _GivenOutput(BaseModelOutputWithPast):
    """Hidden states in place of a decoder's output, of which every other field is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _decoder_output(decoder: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Lets a decoder return these hidden states, shape `(1, N, E)`, without running."""
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: _GivenOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def _require_finite(row: _Row, which: Weights) -> None:
    """Raises where a NaN or infinite logit, anywhere in the vocabulary, has left its trace."""
    tokens = row.tokens[which]
    if not (tokens.logprobs.isfinite().all() and tokens.kl.isfinite().all()):
        raise ValueError(
            f"{row.name}: the {which} model gives its {len(tokens.logprobs)} tokens log-probabilities that are not "
            f"all finite, {tokens.logprobs.tolist()[:8]}. A model with NaN or infinite logits cannot be measured; "
            "load it in bfloat16 or float32, or check its weights."
        )


def _divergence(base: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
    """KL(base || adapted) from log-probabilities `(N, V)`, shape `(N,)`."""
    probabilities = base.exp()
    terms = probabilities * (base - adapted)
    # A token that the base rules out adds nothing, whatever the other makes of it.
    return terms.masked_fill(probabilities == 0, 0.0).sum(-1)


def _key(decision: TokenizedDecision) -> tuple[bytes, bytes]:
    """What tells a decision in its context from all others."""
    return decision.prompt.numpy().tobytes(), decision.decision.numpy().tobytes()


def _base_encoder(model: torch.nn.Module, chunk_size: int, store: ContextStore | None) -> ContextEncoder:
    """Encodes contexts without adapters."""
    if store is None:
        return ContextEncoder(model, chunk_size=chunk_size)
    if trained := trained_base_weights(model):
        raise ValueError(
            f"contexts of the base are kept for later, and `{trained[0]}` of it is in training. Score without "
            "`context_cache_dir`, or call `requires_grad_(False)` on the base first."
        )
    adapters = not isinstance(model, PeftModel)
    return ContextEncoder(
        model, chunk_size=chunk_size, adapters=adapters, decision_adapters=False, store=store, fixed=ADAPTERS_OFF
    )


def _settle_invocation(model: torch.nn.Module) -> tuple[int, ...]:
    """Tokens that switch the model's adapter on, whose layers then run it at every token of a decision."""
    require_adapters_on_weights(model)
    if not isinstance(model, PeftModel):
        return ()
    invocations = {
        name: tuple(getattr(model.peft_config[name], "alora_invocation_tokens", None) or ())
        for name in model.active_adapters
    }
    if len(invocations) > 1 and any(invocations.values()):
        raise ValueError(
            f"Of the active adapters {', '.join(invocations)} one is switched on by `alora_invocation_tokens`; make "
            "it the only active one with `set_adapter`."
        )
    invocation = next(iter(invocations.values()), ())
    if invocation:
        activate_at_invocation(model, invocation)
    return invocation

# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the package, each of which turns a test that runs with every change red.

A suite that is made shorter could stop seeing what it is there for. The faults are those that nobody would notice
while training: a lost context, states that belong elsewhere, contexts of old weights, a wrong merge, files that a kill
leaves half written, a gradient that is not handed on.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_peft import ContextMismatchError, FrozenContextConfig
from frozen_peft.context import FrozenContext
from frozen_peft.context.store.store import ContextStore
from frozen_peft.gradient import stretched_decoder
from frozen_peft.merging import updates
from frozen_peft.training import checkpoints, reference
from frozen_peft.training.preference import PreferenceMixin
from frozen_peft.utils import files
from tests.context import test_mutants, test_parity
from tests.data import test_rows
from tests.gradient import test_stretches
from tests.merging import test_parity as test_merges
from tests.tiny_models import ARCHITECTURES, STATES
from tests.training import (
    test_dpo,
    test_frozen_gradient,
    test_kto,
    test_preference_runs,
    test_store,
    test_turns,
    test_whole_checkpoints,
)
from tests.training import test_stretches as test_trained_stretches

pytestmark = pytest.mark.slow

Plant = Callable[[pytest.MonkeyPatch], None]
# One architecture of each kind of layer.
KINDS_OF_LAYERS = ("qwen3_5_text", "kimi_linear", "falcon_h1", "lfm2", "llama", "gemma3_text")


def goes_red(check: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Runs a test, and requires that it fails by what it asserts, or that the package refuses to go on."""
    with pytest.raises((AssertionError, ContextMismatchError)):
        check(*arguments, **named)


def change_states(patch: pytest.MonkeyPatch, kind: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every frozen context has its states of a kind changed when it is made."""
    make = FrozenContext.__init__

    def make_changed(self: FrozenContext, rows: list[Any], **options: Any) -> None:
        make(self, [row.mutated(kind, change) if row.num_tokens else row for row in rows], **options)

    patch.setattr(FrozenContext, "__init__", make_changed)


def one_token_off(state: torch.Tensor) -> torch.Tensor:
    """Keys or values, `(1, H, T, E)`, of the token before; conv states, `(1, channels, T)`, likewise."""
    dim = -2 if state.ndim == 4 else -1
    return torch.cat([state.narrow(dim, 0, 1), state.narrow(dim, 0, state.shape[dim] - 1)], dim)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in KINDS_OF_LAYERS for kind in STATES[name]])
def test_a_lost_context(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_states(monkeypatch, kind, torch.zeros_like)
    goes_red(test_parity.test_unsupervised_tokens_inside_a_decision, name)
    goes_red(test_mutants.test_an_exact_architecture_passes_verification, name)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in KINDS_OF_LAYERS for kind in STATES[name] if kind != "recurrent"]
)
def test_a_shifted_state(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_states(monkeypatch, kind, one_token_off)
    goes_red(test_parity.test_unsupervised_tokens_inside_a_decision, name)


def test_a_lost_context_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer finds it itself, and where it does not look, the tests do."""
    change_states(monkeypatch, "keys_values", torch.zeros_like)
    with pytest.raises(ContextMismatchError):
        test_frozen_gradient.test_accumulated_batches_are_one_batch(tmp_path)
    make = FrozenContextConfig.__init__
    monkeypatch.setattr(
        FrozenContextConfig,
        "__init__",
        lambda self, **fields: make(self, **fields | {"verify_context": "never"}),
    )
    with pytest.raises(AssertionError):
        test_frozen_gradient.test_accumulated_batches_are_one_batch(tmp_path)
    with pytest.raises(AssertionError):
        test_turns.test_every_architecture("qwen3", tmp_path)


def test_contexts_of_earlier_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store = ContextStore.open

    def open_as_ever(self: ContextStore, model: torch.nn.Module, **given: Any) -> None:
        open_store(self, model, **given | {"step": 0, "changed": False})

    monkeypatch.setattr(ContextStore, "open", open_as_ever)
    goes_red(test_store.test_contexts_that_see_the_adapters_are_encoded_in_each_step, {}, tmp_path)


@pytest.mark.parametrize("kind", ["base", "ref", "ref_model", "kto", "precomputed", "in the loss"])
def test_a_reference_over_the_policys_contexts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would move along with the policy that it is there to hold."""
    carry = PreferenceMixin._carried
    monkeypatch.setattr(PreferenceMixin, "_carried", lambda self, contexts, part: carry(self, self._frozen, part))
    monkeypatch.setattr(reference.Reference, "active", lambda self: nullcontext())
    if kind == "precomputed":
        check = test_dpo.test_with_the_base_for_a_reference
        goes_red(check, "llama", {"precompute_ref_log_probs": True}, tmp_path)
    elif kind == "in the loss":
        # Which stretches leave to TRL's loss.
        for name in ("_encode_again", "_encode_elsewhere"):
            monkeypatch.setattr(PreferenceMixin, name, lambda self, part, carried: lambda each: each.frozen)
        goes_red(test_dpo.test_with_the_base_for_a_reference, "llama", {"sequence_chunk_size": 16}, tmp_path)
    elif kind == "base":
        goes_red(test_dpo.test_with_the_base_for_a_reference, "qwen3_5_text", {}, tmp_path)
    elif kind == "kto":
        goes_red(test_kto.test_it_trains_as_direct_autograd_says, "llama", {}, tmp_path)
    else:
        goes_red(test_dpo.test_a_reference_stays_what_it_was_while_the_policy_moves, kind, False, tmp_path)


def test_a_reference_whose_contexts_are_another_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in a store that does not tell adapters apart."""
    monkeypatch.setattr(reference, "fixed_fingerprint", lambda model, adapter: "one for all")
    goes_red(test_preference_runs.test_contexts_of_the_reference_are_found_by_another_run, tmp_path)


@pytest.mark.parametrize("factor", [0.0, 0.99])
def test_a_wrong_merge(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the update, or with too little of it."""
    apply = updates.LowRank.apply

    def apply_part(self: updates.LowRank, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        before = rows.clone()
        return before + factor * (apply(self, rows, start, stop) - before)

    monkeypatch.setattr(updates.LowRank, "apply", apply_part)
    goes_red(test_merges.test_text_class_reads_a_merged_wrapper, tmp_path)


def test_a_kill_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written under its own name, a file is there before it is whole."""

    def in_place(dir: Path, prefix: str, suffix: str) -> tuple[int, str]:
        path = Path(dir) / prefix.strip(".")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), str(path.with_suffix(suffix))

    monkeypatch.setattr(files, "tempfile", type("InPlace", (), {"mkstemp": staticmethod(in_place)}))
    goes_red(test_rows.test_what_fails_leaves_the_file_before_and_nothing_else, tmp_path)


def test_a_kill_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is not whole is taken for whole."""
    test_whole_checkpoints.saved(tmp_path)
    monkeypatch.setattr(checkpoints, "why_not_whole", lambda folder: None)
    goes_red(test_whole_checkpoints.test_what_is_not_whole_is_passed_over, "optimizer.pt", "cut", tmp_path, caplog)


@pytest.mark.parametrize("name", KINDS_OF_LAYERS)
def test_a_gradient_that_stretches_do_not_hand_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretched_decoder, "_key_value_roots", lambda end, piece: [])
    goes_red(test_stretches.test_the_gradient_is_that_of_a_plain_backward, name)


def test_a_gradient_that_stretches_do_not_hand_back_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretched_decoder, "_key_value_roots", lambda end, piece: [])
    goes_red(test_trained_stretches.test_the_model_is_checked_once, tmp_path, monkeypatch)


def test_every_kind_of_state_is_among_them() -> None:
    assert {kind for name in KINDS_OF_LAYERS for kind in STATES[name]} == {"keys_values", "conv", "recurrent"}
    assert set(KINDS_OF_LAYERS) <= set(ARCHITECTURES)

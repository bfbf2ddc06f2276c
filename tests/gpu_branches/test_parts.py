# SPDX-License-Identifier: Apache-2.0
"""Parts on the stand-in for a card: the tests that need one, as far as it runs them, and what no training reaches."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_peft.context.kernels import kernel_rows
from frozen_peft.context.modes import attention_in_training
from frozen_peft.utils.noise import _names_no_kernel_for_a_gpu
from tests.card import CARD, GIBIBYTE, stand_in_card
from tests.context import test_out_of_memory, test_residence, test_segments_precision
from tests.gradient.test_stretches import test_what_is_handed_on_may_lie_in_host_memory_of_a_gpu as stretches
from tests.tiny_models import tiny_model


@pytest.fixture
def nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps a real card busy takes a CPU minutes."""
    real = torch.randn

    def smaller(*size: int, **options: Any) -> torch.Tensor:
        return real(*(min(number, 1 << 8) for number in size) if len(size) == 2 else size, **options)

    monkeypatch.setattr(torch, "randn", smaller)


@pytest.mark.usefixtures("nothing_large")
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_what_was_read_ahead(dtype: str, tmp_path: Path) -> None:
    with stand_in_card() as card:
        test_residence.test_what_was_read_ahead_arrives_whole_on_a_card(dtype, tmp_path)
    assert {"Stream.wait_event", "TensorBase.record_stream", "TensorBase.pin_memory"} <= card.calls


@pytest.mark.parametrize(
    "run",
    [
        test_residence.test_a_copy_arrives_whole_beside_other_work,
        test_residence.test_what_moves_off_a_card_comes_back_the_same,
        lambda: test_segments_precision.test_16_bit_inputs_on_a_gpu(False),
        lambda: test_segments_precision.test_16_bit_inputs_on_a_gpu(True),
        lambda: stretches("qwen3_5_text"),
    ],
    ids=["copies", "moves", "16 bit", "autocast", "stretches"],
)
@pytest.mark.usefixtures("nothing_large")
def test_what_needs_a_gpu(run: Callable[[], None]) -> None:
    with stand_in_card():
        run()


@pytest.mark.slow
def test_chunks_are_halved_on_a_full_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_card(total_bytes=GIBIBYTE) as card:
        test_out_of_memory.test_a_card_that_is_full(monkeypatch)
    assert {"empty_cache", "set_per_process_memory_fraction"} <= card.calls


def test_random_numbers_of_a_probe_are_given_back() -> None:
    with stand_in_card() as card:
        model = tiny_model("llama").to(CARD)
        before = torch.cuda.get_rng_state()
        with attention_in_training(model):
            torch.rand(3, device=CARD)
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert {"get_rng_state", "set_rng_state"} <= card.calls


def test_the_table_is_that_of_the_card() -> None:
    with stand_in_card(capability=(7, 5)):
        old = {row.purpose: row.kernel for row in kernel_rows()}
    with stand_in_card():
        new = {row.purpose: row.kernel for row in kernel_rows()}
    assert old["prefill, attention"] == "blocks of keys, in PyTorch"
    assert new["prefill, attention"] == "PyTorch's flash attention"


def test_the_advice_to_install_kernels_stays_where_there_is_a_card() -> None:
    text = "`f` is falling back to its reference PyTorch implementation because `fla` is not installed"
    record = logging.LogRecord("transformers", logging.WARNING, "", 0, text, None, None)
    with stand_in_card():
        assert _names_no_kernel_for_a_gpu(record)
    assert torch.accelerator.is_available() or not _names_no_kernel_for_a_gpu(record)


def multiply() -> None:
    torch.ones(2, 2, device=CARD) @ torch.ones(2, 2)


def as_array() -> None:
    torch.ones(2, device=CARD).numpy()


def wrong_argument() -> None:
    torch.cuda.mem_get_info(card=0)  # type: ignore[call-arg]


def of_another_device() -> None:
    torch.cuda.get_device_properties("cpu")


def unwaited() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        copied = torch.ones(2).to(CARD, non_blocking=True)
    copied.sum()


def unrecorded() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copied = torch.ones(2).to(CARD, non_blocking=True)
    torch.cuda.current_stream().wait_event(stream.record_event())
    copied.sum()


def too_large() -> None:
    torch.ones(1 << 20, device=CARD)


def float32_products() -> None:
    torch.bmm(torch.ones(1, 2, 2, device=CARD), torch.ones(1, 2, 2, device=CARD), out_dtype=torch.float32)


def untimed() -> None:
    start, stop = torch.cuda.Event(), torch.cuda.Event()
    start.elapsed_time(stop)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (multiply, RuntimeError, "at least two devices, cuda:0 and cpu"),
        (as_array, TypeError, "can't convert cuda:0"),
        (wrong_argument, TypeError, "unexpected keyword argument 'card'"),
        (of_another_device, AssertionError, "asks cpu for what a card has"),
        (unwaited, AssertionError, "has not arrived"),
        (unrecorded, AssertionError, "was not recorded"),
        (too_large, torch.OutOfMemoryError, "CUDA out of memory"),
        (float32_products, AssertionError, "float32"),
        (untimed, AssertionError, "enable_timing"),
    ],
)
def test_the_stand_in_refuses_what_a_card_refuses(wrong: Callable[[], None], error: type, said: str) -> None:
    with stand_in_card(total_bytes=1 << 20), pytest.raises(error, match=said):
        wrong()


def test_nothing_of_it_stays() -> None:
    with stand_in_card():
        model = copy.deepcopy(tiny_model("llama").to(CARD))
        assert next(model.parameters()).is_cuda
    assert not torch.cuda.is_available()
    assert next(model.parameters()).device.type == "cpu"
    assert torch.tensor([1]).numpy()[0] == 1

# SPDX-License-Identifier: Apache-2.0
"""The table of kernels: total, right where kernels are known to be wrong, and what the stand-in functions follow."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from frozen_peft.context.capability import use_segmented_attention
from frozen_peft.context.encoder import encode_context
from frozen_peft.context.kernels import choice as kernels
from frozen_peft.context.kernels.table import (
    Capabilities,
    current_capabilities,
    has_flash_prefill,
    is_accelerated,
    kernel_choices,
    kernel_rows,
    operation_of,
)
from frozen_peft.context.writable import _BufferedLayer
from tests.kernels.machines import table_of_kernels
from tests.reference import random_sample
from tests.tiny_models import tiny_model

NEW = Version("9")
VERSIONS = (None, Version("0.1"), Version("3.3.1"), Version("3.4"), Version("3.7.0"), Version("3.7.1"), NEW)
DEVICES = [("cpu", None), ("mps", None), ("xpu", None), ("cuda", None)] + [
    ("cuda", capability) for capability in ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
]
FULL: dict[str, Any] = {"fla": NEW, "triton": NEW, "causal_conv1d": NEW, "mamba_ssm": NEW}


def test_every_machine_gets_a_choice_that_can_run_there() -> None:
    """All combinations: what is chosen is installed, supported, and never known to be wrong."""
    count = 0
    for (device, capability), triton, fla, conv, scan, flash in itertools.product(
        DEVICES, VERSIONS, (None, Version("0.5"), NEW), (None, NEW), (None, NEW), (True, False)
    ):
        machine = Capabilities(device, capability, fla, triton, conv, scan, flash)
        for dtype in (torch.float32, torch.bfloat16):
            rows = {row.purpose: row for row in kernel_choices(machine, dtype)}
            count += 1
            assert all(row.kernel and row.reason and row.proven for row in rows.values())
            used = " ".join(row.kernel for row in rows.values())
            for package, version in (("flash-linear-attention", fla), ("causal-conv1d", conv), ("mamba-ssm", scan)):
                assert package not in used or version is not None
            accelerated = any(package in used for package in ("flash-linear", "causal-conv1d", "mamba-ssm"))
            assert not accelerated or device in ("cuda", "xpu")
            if "flash-linear-attention" in used:
                assert triton is not None
                assert fla == NEW
                assert capability is None or capability >= (8, 0)
            delta = rows["decision, gated delta rule"].kernel
            if capability == (9, 0) and triton in (Version("3.4"), Version("3.7.0")):
                assert delta.startswith("PyTorch")
            if capability is not None and capability >= (10, 0):
                assert delta.startswith("PyTorch")
            if rows["prefill, attention"].kernel == "PyTorch's flash attention":
                assert device == "cuda"
                assert flash
                assert dtype == torch.bfloat16
                assert capability is None or capability >= (8, 0)
    assert count == len(DEVICES) * len(VERSIONS) * 3 * 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("capability", "triton", "accelerated"),
    [
        ((9, 0), "3.3.1", True),
        ((9, 0), "3.4", False),
        ((9, 0), "3.7.0", False),
        ((9, 0), "3.7.1", True),
        ((8, 0), "3.5", True),
        ((8, 9), "3.4", True),
        ((10, 0), "3.7.1", False),
        ((12, 0), "3.4", False),
        ((7, 5), "3.4", False),
    ],
)
def test_the_gated_backward(capability: tuple[int, int], triton: str, accelerated: bool) -> None:
    machine = Capabilities("cuda", capability, **FULL | {"triton": Version(triton)})
    assert is_accelerated("gated delta rule", True, machine)[0] is accelerated
    # Its forward, which prefill runs, is right wherever Triton runs at all.
    assert is_accelerated("gated delta rule", False, machine)[0] is (capability >= (8, 0))
    assert not is_accelerated("one step", True, machine)[0]


# What each kernel does that transformers binds.
OPERATIONS = {
    ("chunk_gated_delta_rule", "fla"): "gated delta rule",
    ("chunk_kda", "fla"): "gated delta rule",
    ("fused_recurrent_gated_delta_rule", "fla"): "one step",
    ("fused_recurrent_kda", "fla"): "one step",
    ("causal_conv1d_update", "causal_conv1d"): "one step",
    ("selective_state_update", "mamba_ssm"): "one step",
    ("causal_conv1d_fn", "causal_conv1d"): "short convolution",
    ("mamba_chunk_scan_combined", "mamba_ssm"): "state-space scan",
    ("mamba_split_conv1d_scan_combined", "mamba_ssm"): "state-space scan",
    ("mamba_inner_fn", "mamba_ssm"): "state-space scan",
    ("selective_scan_fn", "mamba_ssm"): "state-space scan",
}


def test_what_every_kernel_of_transformers_does() -> None:
    """Of all modeling files, also those that no test has a model of."""
    folder = Path(transformers.__file__).parent / "models"
    texts = [path.read_text() for path in folder.glob("*/modeling_*.py")]
    decorator = re.compile(r'^@use_kernel_func_from_hub_with_fallback\(\s*"(\w+)",\s*"?(\w+)"?', re.MULTILINE)
    found = {match for text in texts for match in decorator.findall(text)}
    assert found == set(OPERATIONS)
    for (kernel, package), operation in OPERATIONS.items():
        assert operation_of(kernel, package) == operation
    assert operation_of("chunk_kda", "another_package") is None


def test_kimi_delta_attention_runs_where_its_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its references are called `chunk_kimi_delta_attention` and the like, which says nothing of the kernel."""
    asked: list[tuple[str, bool]] = []

    def answer(operation: str, gradient: bool, machine: Capabilities) -> tuple[bool, str]:
        asked.append((operation, gradient))
        return False, "it is not installed"

    monkeypatch.setattr(kernels, "is_accelerated", answer)
    kernels._is_accelerated.cache_clear()
    model = tiny_model("kimi_linear")
    modeling = vars(sys.modules[type(model).__module__])
    before = dict(modeling)
    try:
        kernels.choose_kernels(model, always=True)
        model(input_ids=torch.arange(3, 30)[None])
    finally:
        modeling.update(before)
        kernels._is_accelerated.cache_clear()
    assert set(asked) == {("gated delta rule", True), ("short convolution", True)}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("triton", ["3.5", "9"])
def test_a_stand_in_follows_the_table(monkeypatch: pytest.MonkeyPatch, gradient: bool, triton: str) -> None:
    """On a machine that says it has a Hopper card: which of the two functions runs is the table's choice."""
    machine = Capabilities("cuda", (9, 0), **FULL | {"triton": Version(triton)})
    monkeypatch.setattr(kernels, "current_capabilities", lambda device: machine)
    kernels._is_accelerated.cache_clear()

    def chunk_gated_delta_rule(query: torch.Tensor) -> str:
        return "reference"

    stand_in = kernels.kernel_choice(
        lambda query: "accelerated", chunk_gated_delta_rule, "chunk_gated_delta_rule", "fla"
    )
    with torch.set_grad_enabled(gradient):
        chosen = stand_in(torch.zeros(1))
    kernels._is_accelerated.cache_clear()
    assert chosen == ("reference" if gradient and triton == "3.5" else "accelerated")


def test_the_page_on_kernels_has_todays_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels.md"
    assert table_of_kernels() in page.read_text()


def test_rows_of_this_machine() -> None:
    rows = kernel_rows(None, torch.float32)
    assert [row.purpose for row in rows] == [row.purpose for row in kernel_choices(Capabilities("cpu"))]
    if not torch.cuda.is_available():
        assert {row.reason for row in rows if "gated" in row.purpose} == {"the kernels need a GPU"}


def test_flash_attention_takes_what_it_can() -> None:
    card = Capabilities("cuda", (9, 0))
    assert has_flash_prefill(card, torch.bfloat16, 256, 256)
    assert not has_flash_prefill(card, torch.float32, 64, 64)
    assert not has_flash_prefill(card, torch.bfloat16, 257, 257)
    assert not has_flash_prefill(card, torch.bfloat16, 192, 128)
    assert not has_flash_prefill(Capabilities("cuda", (7, 5)), torch.float16, 64, 64)
    assert not has_flash_prefill(current_capabilities(torch.device("cpu")), torch.bfloat16, 64, 64)


def _encoded(
    context: torch.Tensor, chunk_size: int, autocast: bool, monkeypatch: Any, as_one: bool
) -> list[torch.Tensor]:
    model = tiny_model("qwen3_5_text")
    assert use_segmented_attention(model)
    calls: list[bool] = []

    def choice(keys: torch.Tensor, values: torch.Tensor) -> bool:
        calls.append(as_one)
        return as_one

    monkeypatch.setattr("frozen_peft.context.writable._can_read_as_one", choice)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        frozen = encode_context(model, [context], chunk_size=chunk_size)
    assert calls
    return list(frozen.rows[0].tensors())


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 3e-2)])
def test_chunks_read_as_one_or_as_segments_are_the_same(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, tolerance: float
) -> None:
    """The path of a GPU with flash attention against that of a CPU, also where keys and values differ in type."""
    context = random_sample(100, 2).context
    segments = _encoded(context, 32, autocast, monkeypatch, as_one=False)
    as_one = _encoded(context, 32, autocast, monkeypatch, as_one=True)
    for left, right in zip(as_one, segments, strict=True):
        assert left.dtype == right.dtype
        assert ((left - right).float().norm() / right.float().norm()).item() <= tolerance


def test_a_layer_that_is_read_as_one_holds_what_it_was_given() -> None:
    layer = _BufferedLayer(4, segmented=False, past=[])
    first, second = torch.randn(2, 1, 2, 2, 8)
    layer.update(first, first)
    keys, values = layer.update(second, second)
    assert torch.equal(keys, torch.cat([first, second], dim=-2))
    assert torch.equal(values, keys)


def test_a_card_goes_by_its_name_or_its_compute_capability() -> None:
    assert kernel_rows("H100") == kernel_rows((9, 0)) != kernel_rows("T4")
    with pytest.raises(ValueError, match="compute capability of '24GB'"):
        kernel_rows("24GB")

# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark, as far as a machine without a GPU can prove it: its arithmetic, its logic, a run of all of it."""

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3NextConfig

from frozen_peft import lora_config
from tests.benchmarks.gpu import methods, page, session
from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.build import build_model, needed_bytes
from tests.benchmarks.gpu.device import Budget, Device
from tests.benchmarks.gpu.flops import attention_flops, delta_rule_flops, linear_weights_per_token, prefill_flops
from tests.benchmarks.gpu.kernel_classes import Kernel, breakdown, class_of
from tests.benchmarks.gpu.methods import COMPILED, METHODS, Measurement, measure
from tests.benchmarks.gpu.parity import check_parity
from tests.benchmarks.gpu.planned import planned_bytes
from tests.benchmarks.gpu.schedule import FULL, SMOKE, tasks
from tests.benchmarks.gpu.session import Session
from tests.benchmarks.gpu.shapes import MODELS, SMOKE_MODELS, ModelShape, qwen3_5_27b, tiny

CPU = Device("cpu")


def _tiny_next() -> Qwen3NextConfig:
    return Qwen3NextConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=32, linear_value_head_dim=32,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


@pytest.mark.parametrize("num_tokens", [64, 192])
def test_operations_are_those_that_pytorch_counts(num_tokens: int) -> None:
    """By operator: products of linear layers, of eager attention (over all pairs), of the delta rule, convolutions."""
    config = tiny()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").model
    tokens = torch.randint(3, 200, (1, num_tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False)
    counted = {str(name).rpartition(".")[2]: float(n) for name, n in counter.get_flop_counts()["Global"].items()}
    num_gdn, num_attention = 3, 1
    assert config.layer_types.count("linear_attention") == num_gdn
    expected = prefill_flops(config, num_tokens)
    # The rotary embedding multiplies frequencies by positions, in a product of matrices.
    rotary = counted["bmm"] - (
        num_attention * attention_flops(config, num_tokens**2)
        + num_gdn * delta_rule_flops(config, num_tokens)["products"]
    )
    assert counted["mm"] == expected.linear
    assert 0 <= rotary <= 2.0 * 3 * num_tokens * config.head_dim
    # PyTorch pads the convolution by its kernel less one on either side.
    padded = num_tokens + config.linear_conv_kernel_dim - 1
    assert expected.convolution <= counted["convolution"] <= expected.convolution * padded / num_tokens


@pytest.mark.parametrize("make", [tiny, _tiny_next])
def test_weights_that_act_on_a_token(make: Callable[[], Any]) -> None:
    config = make()
    model = AutoModelForCausalLM.from_config(config).model
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    experts = getattr(config, "num_experts", 0)
    if experts:
        # The router and the chosen experts, whose weights are no linear layers.
        linear += (
            len(config.layer_types)
            * config.hidden_size
            * (experts + 3 * config.num_experts_per_tok * config.moe_intermediate_size)
        )
    assert linear_weights_per_token(config) == linear


def test_attention_is_causal() -> None:
    config = tiny()
    pairs = sum(1 for query, key in itertools.product(range(37), repeat=2) if key <= query)
    assert prefill_flops(config, 37).attention == attention_flops(config, pairs)


def test_the_large_model_has_its_published_sizes() -> None:
    mlp, attention = 3 * 5120 * 17408, 5120 * (2 * 6144 + 2 * 1024 + 6144)
    beta_and_decay, rest = 5120 * 2 * 48, 5120 * (10240 + 6144 + 6144)
    linear = 64 * mlp + 16 * attention + 48 * (beta_and_decay + rest)
    assert linear_weights_per_token(qwen3_5_27b()) == linear
    in_16_bit = 48 * beta_and_decay + 2 * 248320 * 5120
    in_4_bit = linear - 48 * beta_and_decay
    # 4.127 bits with the scales; norms and convolutions are the rest.
    expected = in_4_bit * 4.127 / 8 + in_16_bit * 2
    assert needed_bytes(qwen3_5_27b(), torch.bfloat16, quantized=True) == pytest.approx(expected, rel=1e-3)


def test_a_model_is_built_as_it_would_be_loaded() -> None:
    config = tiny()
    for quantized in (False, True):
        model = build_model(config, CPU.torch, torch.float32, quantized=quantized)
        whole = AutoModelForCausalLM.from_config(config)
        assert {n for n, _ in model.named_parameters()} == {n for n, _ in whole.named_parameters()}
        for name, buffer in whole.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert bool(linear) is quantized
        for layer in linear:
            assert layer.weight.quant_state.shape == (layer.out_features, layer.in_features)
            assert layer.weight.quant_state.nested
        # Of so small tensors the last block of scales is not full.
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        assert needed_bytes(config, torch.float32, quantized=quantized) == pytest.approx(stored, rel=0.05)
        logits = model(input_ids=torch.arange(3, 80)[None]).logits
        assert torch.isfinite(logits).all()
        decay = torch.nn.functional.softplus(model.model.layers[0].linear_attn.dt_bias)
        assert ((decay > 0.0009) & (decay < 0.11)).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*)", "dequantization"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "Gated DeltaNet"),
        ("recompute_w_u_fwd_kernel", "Gated DeltaNet"),
        ("chunk_fwd_kernel_o", "Gated DeltaNet"),
        ("void causal_conv1d_fwd_kernel<Causal_conv1d_fwd_kernel_traits<128, 4, true>>", "convolution"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<256, 64, 64, 4>>", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_by_name(name: str, kind: str) -> None:
    assert class_of(name) == kind


def test_shares_of_a_profile_add_up() -> None:
    kernels = [
        Kernel("flash_fwd", 10.0, 20.0),
        # Half of it beside the first one.
        Kernel("nvjet_gemm", 20.0, 20.0),
        Kernel("kDequantizeBlockwise", 60.0, 10.0),
    ]
    shares = breakdown(kernels[::-1], 100.0)
    assert shares == pytest.approx({"gaps": 0.6, "attention": 0.2, "matrix products": 0.1, "dequantization": 0.1})
    assert breakdown([], 0.0) == {"gaps": 0.0}


def test_what_matters_most_comes_first() -> None:
    first = tasks(FULL, is_first=True)
    assert [(task.method, task.context) for task in first[:4]] == [(method, 1 << 15) for method in METHODS]
    assert [(task.context, task.cap_gib) for task in first[4:7]] == [(1 << 15, 24), (1 << 17, 48), (1 << 18, 80)]
    assert len(set(first)) == len(first)
    assert (first[-1].method, first[-1].context) == (COMPILED, 1 << 15)
    for method in METHODS:
        assert {task.context for task in first if task.method == method} == set(FULL.contexts)
        others = [task.context for task in first[7:] if task.method == method]
        assert others == sorted(others)
    second = tasks(FULL, is_first=False)
    assert all(task.cap_gib is None and task.method != COMPILED for task in second)


def test_time_runs_out_in_order() -> None:
    now = [100.0]
    budget = Budget(10.0, clock=lambda: now[0])
    assert budget.allows(10.0)
    now[0] = 105.0
    assert not budget.allows(5.1)
    assert budget.left() == 5.0


def _session(tmp_path: Path, budget: float, models: tuple[ModelShape, ...] = SMOKE_MODELS) -> Session:
    made = Session(CPU, FULL, models, Budget(budget), tmp_path, "gpu_smoke", "a test")
    made.results["rates"] = {"flops_per_second": 1e12, "host_bytes_per_second": None}
    return made


def test_a_length_that_does_not_fit_ends_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card does is replaced: SFTTrainer fits to 16k, under a cap of 48 GiB nothing fits."""
    tried: list[tuple[str, int, int | None]] = []

    def fake(
        method: Any, name: str, model: Any, device: Device, context: int, *_: Any, cap_gib: int | None, **kwargs: Any
    ) -> Measurement:
        tried.append((method, context, cap_gib))
        fits = not (method == "SFTTrainer" and context > 1 << 14) and cap_gib != 48
        if not fits:
            return Measurement(name, method, context, 256, cap_gib, "out of memory", "CUDA out of memory")
        return Measurement(
            name, method, context, 256, cap_gib, step_seconds=1.0, prefill_seconds=0.5, decision_seconds=0.1
        )

    monkeypatch.setattr(session, "measure", fake)
    made = _session(tmp_path, 1e9)
    made._measure_tasks(SMOKE_MODELS[0], tiny(), None, tasks(FULL, is_first=True), profiled=False)
    rows = {(row["method"], row["context"], row["cap_gib"]): row["outcome"] for row in made.results["measurements"]}
    assert rows["SFTTrainer", 1 << 15, None] == "out of memory"
    assert rows["SFTTrainer", 1 << 14, None] == "measured"
    assert rows["SFTTrainer", 1 << 16, None] == "does not fit"
    assert ("SFTTrainer", 1 << 16, None) not in tried
    # A length that did not fit under its cap is measured without.
    assert rows["tier 2", 1 << 17, 48] == "out of memory"
    assert rows["tier 2", 1 << 17, None] == "measured"
    assert rows["tier 2", 1 << 18, 80] == "measured"
    assert json.loads((tmp_path / "gpu_smoke.json").read_text()) == made.results


def test_without_time_everything_is_named_and_nothing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "measure", lambda *args, **kwargs: pytest.fail("there is no time for it"))
    made = _session(tmp_path, -1.0)
    waiting = tasks(FULL, is_first=True)
    made._measure_tasks(SMOKE_MODELS[0], tiny(), None, list(waiting), profiled=False)
    assert len(made.results["measurements"]) == len(waiting)
    assert {row["outcome"] for row in made.results["measurements"]} == {"no time left"}
    assert "no time left" in (tmp_path / "gpu_smoke.md").read_text()


def test_what_the_card_cannot_hold_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory_bytes", property(lambda self: 141 * 10**9))
    monkeypatch.setattr(session, "build_model", lambda *args, **kwargs: pytest.fail("it does not fit"))
    made = _session(tmp_path, 1e9)
    made.device = Device("cpu")
    made.device.dtype = torch.bfloat16
    made._measure_model(MODELS[2], is_first=False)
    (line,) = (line for line in made.results["skipped"])
    assert "Qwen3-Next-80B-A3B: its weights take 146" in line


def test_peaks_are_compared_with_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak and a plan that are given: their ratio, for tier 2 alone, one plan for each length."""
    asked: list[int] = []
    monkeypatch.setattr(session, "planned_bytes", lambda config, context, *_: asked.append(context) or 1000 * context)
    made = _session(tmp_path, 1e9)
    for method, context, cap in (
        ("tier 2", 64, None),
        ("tier 2", 64, 24),
        ("tier 2", 128, None),
        ("SFTTrainer", 64, None),
    ):
        found = Measurement(
            "tiny-nf4", method, context, 8, cap, peak_bytes=64_000, chunk_size=2048, prefill_seconds=1.0
        )
        made._add(found, tiny())
    made._compare_with_plans()
    assert asked == [64, 128]
    assert [row["peak_over_plan"] for row in made.results["measurements"]] == [1.0, 1.0, 0.5, None]


def test_wrong_kernels_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def as_figures(self) -> dict[str, Any]:
            return {"dtype": "float32", "logprob_error": 1.0, "loss_error": 1.0, "gradient_error": float("nan"),
                    "worst_cosine": 0.0, "tolerance": 1e-2, "holds": False}  # fmt: skip

    monkeypatch.setattr(session, "check_parity", lambda device: [Wrong()])
    monkeypatch.setattr(session, "build_model", lambda *args, **kwargs: pytest.fail("nothing is worth timing"))
    made = _session(tmp_path, 1e9)
    assert made.run() is False
    assert " NO |" in (tmp_path / "gpu_smoke.md").read_text()


def test_out_of_memory_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_model(tiny(), CPU.torch, torch.float32, quantized=False)
    model = get_peft_model(base, lora_config(base))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nand more")

    monkeypatch.setattr(methods, "_trainer", fail)
    found = measure("tier 2", "tiny", model, CPU, 64, 8, cap_gib=24)
    assert (found.outcome, found.note) == ("out of memory", "CUDA out of memory. Tried to allocate 7 GiB.")
    assert found.step_seconds is None


def test_goals_are_of_what_was_measured() -> None:
    def row(method: str, cap: int | None, seconds: float, peak: int, **more: Any) -> dict[str, Any]:
        made = Measurement("big", method, 1 << 15, 256, cap, step_seconds=seconds, peak_bytes=peak)
        return made.as_figures() | {"utilisation": None} | more

    results = {
        "models": [{"name": "big"}],
        "goal_context": 1 << 15,
        "caps": [[24, 1 << 15], [48, 1 << 17]],
        "on_gpu": True,
        "measurements": [
            row("tier 2", None, 3.0, 20, utilisation=0.6),
            row("tier 2", 24, 3.5, 20, utilisation=0.5, peak_over_plan=0.93),
            row("tier 2, reused", None, 0.6, 22),
            row("SFTTrainer", None, 10.0, 50),
        ],
    }
    found = {what: (value, holds) for what, _, value, holds in page.goals(results)}
    assert found["step of tier 2 at 32,768 tokens, of SFTTrainer's"] == ("0.300", "yes")
    assert found["memory of tier 2 at 32,768 tokens, of SFTTrainer's"] == ("0.400", "yes")
    assert found["step with the context reused at 32,768 tokens"] == ("0.060", "no")
    assert found["prefill, of the card's measured matmul rate"] == ("0.600", "yes")
    assert found["32,768 tokens in 24 GiB"] == ("measured", "yes")
    assert found["131,072 tokens in 48 GiB"] == ("not run", "not measured")
    assert found["peak against the planner, largest deviation"] == ("0.070", "yes")


def test_without_a_gpu_only_smoke_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main([])
        said = capsys.readouterr().err
        assert "no CUDA device was found (" in said
        assert "); --smoke runs the same code" in said
    with pytest.raises(SystemExit):
        main(["--smoke"])
    assert "--smoke needs --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--smoke", "--output", str(tmp_path), "--models", "GPT-9"])
    assert "no model GPT-9" in capsys.readouterr().err


@pytest.mark.slow
# Of torch 2.13 itself, where it traces the autograd function of bitsandbytes' 4-bit product.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_whole_of_it_runs(tmp_path: Path) -> None:
    """Parity, the build in 4 bit, every method, the cap, the profile and the page, with a tiny model."""
    assert main(["--smoke", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu_smoke.json").read_text())
    assert all(parity["holds"] for parity in results["parity"])
    float32 = next(parity for parity in results["parity"] if parity["dtype"] == "float32")
    assert float32["gradient_error"] < 1e-4 or torch.cuda.is_available()
    rows = results["measurements"]
    assert {row["method"] for row in rows} == {*METHODS, COMPILED}
    assert {row["outcome"] for row in rows} == {"measured"}
    losses = {row["method"]: row["loss"] for row in rows}
    # One sample, one model: before it has learned anything, the loss is the same whatever the method.
    assert max(losses.values()) - min(losses.values()) < 0.01
    assert all(row["step_seconds"] > 0 for row in rows)
    assert {row["cap_gib"] for row in rows} == {None, 24}
    (profile,) = results["profiles"].values()
    for part in ("prefill", "decision"):
        assert sum(profile[part].values()) == pytest.approx(1.0)
        assert profile[part]["matrix products"] > 0
    assert [row["chunk_size"] for row in results["chunks"]["tiny-nf4"]] == list(SMOKE.chunk_sizes)
    assert all((row["planned_bytes"] or 0) > 0 for row in rows if row["method"] == "tier 2")
    text = (tmp_path / "gpu_smoke.md").read_text()
    assert "no figure here means anything" in text
    assert "flash-linear-attention is not installed" in text or torch.cuda.is_available()


@pytest.mark.gpu
def test_kernels_of_this_card_agree_with_the_reference() -> None:
    for parity in check_parity(Device("cuda")):
        assert parity.holds, parity


@pytest.mark.gpu
def test_memory_is_within_the_plan(tmp_path: Path) -> None:
    """A hybrid of half a billion weights over 8,192 tokens, in NF4: the peak within a tenth of what was planned."""
    config = Qwen3_5TextConfig(
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=32768,
    )  # fmt: skip
    device = Device("cuda")
    base = build_model(config, device.torch, device.dtype, quantized=True)
    model = get_peft_model(base, lora_config(base))
    found = measure("tier 2", "half a billion", model, device, 8192, 256)
    has_fla = importlib.util.find_spec("fla") is not None
    planned = planned_bytes(config, 8192, 256, 2048, True, has_fla)
    assert planned is not None
    assert found.peak_bytes == pytest.approx(planned, rel=0.1)

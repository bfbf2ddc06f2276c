# SPDX-License-Identifier: Apache-2.0
"""The benchmark from beginning to end, within its time."""

import importlib.util
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import PretrainedConfig

from frozen_peft import lora_config
from frozen_peft.context.kernels import kernel_rows
from frozen_peft.utils.sizes import format_size
from tests.benchmarks.gpu import page
from tests.benchmarks.gpu.build import build_model, needed_bytes
from tests.benchmarks.gpu.device import Budget, Device, host_copy_rate, matmul_rate
from tests.benchmarks.gpu.flops import prefill_flops
from tests.benchmarks.gpu.methods import COMPILE_SECONDS, COMPILED, FORWARDS, REUSING, Measurement, described, measure
from tests.benchmarks.gpu.parity import check_parity
from tests.benchmarks.gpu.planned import planned_bytes
from tests.benchmarks.gpu.profiles import prefill_by_chunk, profile_step
from tests.benchmarks.gpu.schedule import Plan, Task, tasks
from tests.benchmarks.gpu.shapes import ModelShape

# Share of the matmul rate that a step is taken to reach before one was measured.
ASSUMED_UTILISATION = 0.25
# Of a large model: making it, and what comes with every measurement.
BUILD_SECONDS, FIXED_SECONDS = 40.0, 2.0
# Of one plan, which is arithmetic on a CPU.
PLAN_SECONDS = 5.0
# Bytes beyond the weights without which no step is possible: CUDA itself, kernels, the smallest activations.
LEAST_ROOM = 2 << 30


class Session:
    """One run of the benchmark; its results are written after every measurement.

    Args:
        device: Where it runs.
        plan: What to measure.
        models: Of which models, in this order.
        budget: Until when.
        folder: Where the results go.
        name: Of their files, without ending.
        command: What made them.
    """

    def __init__(
        self,
        device: Device,
        plan: Plan,
        models: tuple[ModelShape, ...],
        budget: Budget,
        folder: Path,
        name: str,
        command: str,
    ):
        self.device, self.plan, self.models, self.budget = device, plan, models, budget
        self.folder, self.name = folder, name
        self.utilisation = ASSUMED_UTILISATION
        self.results: dict[str, Any] = {
            "command": command,
            "smoke": not device.on_gpu,
            "on_gpu": device.on_gpu,
            "facts": device.facts(),
            "goal_context": plan.goal_context,
            "caps": [list(cap) for cap in plan.caps],
            "kernels": [asdict(row) for row in kernel_rows(None, device.dtype)],
            "parity": [],
            "rates": {},
            "models": [],
            "measurements": [],
            "profiles": {},
            "chunks": {},
            "skipped": [],
        }

    def run(self) -> bool:
        """Measures what there is time for; False where something went wrong that makes the rest not worth timing.

        Whatever ends it, also an interruption, is named in the results, which are written by then.
        """
        try:
            return self._run()
        except KeyboardInterrupt:
            self._skip("everything after that: it was interrupted")
        # Whatever it is, what was measured before is paid for.
        except Exception as error:
            traceback.print_exc()
            self._skip(f"everything after that: {described(error)}")
        return False

    def _run(self) -> bool:
        self._name_what_is_missing()
        try:
            self.results["parity"] = [parity.as_figures() for parity in check_parity(self.device)]
        except Exception as error:
            traceback.print_exc()
            self._skip(f"everything: the kernels of this device could not be run: {described(error)}")
            return False
        self._write()
        if not all(parity["holds"] for parity in self.results["parity"]):
            self._skip("everything else: the kernels of this device do not agree with the reference")
            return False
        size, seconds = (8192, 1.0) if self.device.on_gpu else (256, 0.02)
        self.results["rates"] = {
            "flops_per_second": matmul_rate(self.device, size, seconds),
            "host_bytes_per_second": host_copy_rate(self.device),
        }
        for index, shape in enumerate(self.models):
            self._measure_model(shape, is_first=index == 0)
            self._write()
        # Last, since planning takes time and no GPU.
        self._compare_with_plans()
        return all(row["outcome"] != "failed" for row in self.results["measurements"])

    def _compare_with_plans(self) -> None:
        """Sets the peaks of tier 2 against the planner's, while there is time."""
        shapes = {shape.name: shape for shape in self.models}
        has_fla = importlib.util.find_spec("fla") is not None
        rows = [
            row for row in self.results["measurements"] if row["outcome"] == "measured" and row["method"] == "tier 2"
        ]
        planned: dict[tuple[str, int, int], int | None] = {}
        for row in tqdm(rows, desc="planning", leave=False):
            key = (row["model"], row["context"], row["chunk_size"])
            if key not in planned and not self.budget.allows(PLAN_SECONDS * self.device.on_gpu):
                return self._skip("the planner's figures for what is left of the steps, for want of time")
            if key not in planned:
                shape = shapes[row["model"]]
                planned[key] = planned_bytes(
                    shape.config(), row["context"], row["decision"], row["chunk_size"], shape.quantized, has_fla
                )
            row["planned_bytes"] = planned[key]
            if planned[key] and row["peak_bytes"] is not None:
                row["peak_over_plan"] = row["peak_bytes"] / planned[key]
            self._write()
        return None

    def _name_what_is_missing(self) -> None:
        for module, consequence in (
            ("fla", "Gated DeltaNet runs PyTorch's reference (flash-linear-attention is not installed)"),
            ("causal_conv1d", "the short convolution runs PyTorch's reference (causal-conv1d is not installed)"),
        ):
            if importlib.util.find_spec(module) is None:
                self._skip(consequence)

    def _skip(self, line: str) -> None:
        self.results["skipped"].append(line)
        self._write()

    def _write(self) -> None:
        page.write(self.results, self.folder, self.name)

    def _measure_model(self, shape: ModelShape, *, is_first: bool) -> None:
        if shape.quantized and importlib.util.find_spec("bitsandbytes") is None:
            return self._skip(f"{shape.name}: bitsandbytes is not installed, so nothing can be quantized")
        config = shape.config()
        num_bytes = needed_bytes(config, self.device.dtype, quantized=shape.quantized)
        memory = self.device.memory_bytes
        if memory is not None and num_bytes + LEAST_ROOM > memory:
            return self._skip(
                f"{shape.name}: its weights take {format_size(num_bytes)}, and the card has {format_size(memory)}"
            )
        if not self.budget.allows(BUILD_SECONDS if self.device.on_gpu else 0.0):
            return self._skip(f"{shape.name}: no time left")
        self.device.clear()
        try:
            seconds, model = self._built(shape, config)
        except torch.OutOfMemoryError:
            return self._skip(f"{shape.name}: ran out of memory while it was built")
        except Exception as error:
            traceback.print_exc()
            return self._skip(f"{shape.name}: could not be built: {described(error)}")
        weights = self.device.allocated_bytes()
        self.results["models"].append(
            {"name": shape.name, "computed_bytes": num_bytes, "allocated_bytes": weights, "build_seconds": seconds}
        )
        self._measure_tasks(shape, config, model, tasks(self.plan, is_first=is_first), profiled=is_first)
        return None

    def _built(self, shape: ModelShape, config: PretrainedConfig) -> tuple[float, PeftModel]:
        made: list[PeftModel] = []

        def build() -> None:
            base = build_model(config, self.device.torch, self.device.dtype, quantized=shape.quantized)
            made.append(get_peft_model(base, lora_config(base)))

        return self.device.seconds(build), made[0]

    def _measure_tasks(
        self, shape: ModelShape, config: PretrainedConfig, model: PeftModel, waiting: list[Task], *, profiled: bool
    ) -> None:
        failed: dict[str, int] = {}
        progress = tqdm(total=len(waiting), desc=shape.name, unit="measurement", leave=False)
        while waiting:
            task = waiting.pop(0)
            found = self._measured(shape, config, model, task, failed)
            if found.outcome == "failed" and not self.device.answers():
                self._add(found, config)
                raise RuntimeError("the card no longer answers, since an error of CUDA ends its process's use of it")
            if found.outcome == "out of memory":
                if task.cap_gib is not None:
                    # Without the cap it may fit, and was not going to be measured.
                    waiting.append(Task(task.method, task.context))
                else:
                    failed[task.method] = min(task.context, failed.get(task.method, task.context))
            self._add(found, config)
            progress.update()
            # After the comparison that matters most, and before the long tail.
            if profiled and task.method == "SFTTrainer" and task.context == self.plan.goal_context:
                try:
                    self._profile(shape, config, model)
                except Exception as error:
                    traceback.print_exc()
                    self._skip(f"{shape.name}: the profile: {described(error)}")
        progress.close()

    def _measured(
        self, shape: ModelShape, config: PretrainedConfig, model: PeftModel, task: Task, failed: dict[str, int]
    ) -> Measurement:
        nothing = Measurement(shape.name, task.method, task.context, self.plan.decision, task.cap_gib)
        if task.cap_gib is None and task.context >= failed.get(task.method, task.context + 1):
            return replace(nothing, outcome="does not fit", note="a shorter context did not fit")
        expected = self._expected_seconds(config, task)
        if not self.budget.allows(expected):
            note = f"{expected:.0f} s were expected, and {max(self.budget.left(), 0):.0f} were left"
            return replace(nothing, outcome="no time left", note=note)
        return measure(
            task.method,
            shape.name,
            model,
            self.device,
            task.context,
            self.plan.decision,
            cap_gib=task.cap_gib,
            one_step=task.context >= self.plan.one_step_from,
        )

    def _expected_seconds(self, config: PretrainedConfig, task: Task) -> float:
        """By the operations of the passes over the context, twice where a first step warms up."""
        flops = prefill_flops(config, task.context).total * FORWARDS[task.method]
        if task.method in REUSING:
            flops += prefill_flops(config, task.context).total
        elif task.context < self.plan.one_step_from:
            flops *= 2
        fixed = FIXED_SECONDS + COMPILE_SECONDS * (task.method == COMPILED)
        return fixed * self.device.on_gpu + flops / (self.utilisation * self.results["rates"]["flops_per_second"])

    def _add(self, found: Measurement, config: PretrainedConfig) -> None:
        figures = found.as_figures() | {"utilisation": None, "planned_bytes": None, "peak_over_plan": None}
        if found.method == "tier 2" and found.prefill_seconds:
            rate = prefill_flops(config, found.context).total / found.prefill_seconds
            figures["utilisation"] = rate / self.results["rates"]["flops_per_second"]
            # Smoke runs are all overhead, and would expect hours of anything.
            self.utilisation = max(figures["utilisation"], 0.02)
        self.results["measurements"].append(figures)
        self._write()

    def _profile(self, shape: ModelShape, config: PretrainedConfig, model: PeftModel) -> None:
        plan = self.plan
        once = self._expected_seconds(config, Task("tier 2", plan.profile_context))
        if not self.budget.allows(2 * once):
            return self._skip(f"{shape.name}: the profile, for want of time")
        self.results["profiles"][shape.name] = profile_step(
            model, self.device, plan.profile_context, plan.decision, chunk_size=2048
        )
        once = self._expected_seconds(config, Task("tier 2", plan.goal_context)) / 2
        if not self.budget.allows(once * len(plan.chunk_sizes)):
            return self._skip(f"{shape.name}: prefill by chunk size, for want of time")
        self.results["chunks"][shape.name] = prefill_by_chunk(model, self.device, plan.goal_context, plan.chunk_sizes)
        return None

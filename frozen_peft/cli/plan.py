# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft plan`: what a training takes, and whether a device has it.

Says from a model's configuration alone what training takes: weights, adapters, gradients, optimizer, cache,
activations and workspace, for SFTTrainer and for each tier; whether it fits, the longest context that does, and the
cheapest setting that fits. No weights are read. Nothing here is measured: docs/planning.md says how it compares.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frozen_peft.cli.arguments import CommandParser, require_writable
from frozen_peft.cli.errors import reported
from frozen_peft.demo import model_source, resolve_names
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.sizes import format_size
from frozen_peft.utils.tables import aligned

if TYPE_CHECKING:
    from frozen_peft.planning import Card, Plan, Setting

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Prints the plan.

    Args:
        arguments: Command-line arguments after `plan`.

    Raises:
        CommandError: A model, an accelerator or a number cannot be used.
    """
    options = _parser().read(arguments)
    # At first use: torch and transformers take seconds to import.
    from frozen_peft import planning

    with reported():
        require_writable(options.json, "--json")
        config, settings = _of_recipe(options) if options.recipe else _of_model(options)
        card = planning.find_card(options.gpu) if options.gpu else None
        if card is not None and options.rates:
            card = planning.read_rates(card, options.rates)
    plans = [planning.make_plan(config, setting, card.memory_bytes if card else None) for setting in settings]
    times = [_step_time(config, plan, card) for plan in plans]
    advice = [planning.advise(plan) for plan in plans]
    print("\n".join([*_heading(plans, card), "", *_table(plans, times, card), "", *_notes(plans)]))
    if card is not None:
        print("\n".join(_about_card(plans, advice, card)))
    if options.json:
        records = [
            plan.as_dict(lines) | {"longest_context": plan.longest_context(), "step_seconds": time}
            for plan, lines, time in zip(plans, advice, times, strict=True)
        ]
        with whole_file(options.json) as file:
            file.write(json.dumps({"gpu": options.gpu, "plans": records}, indent=2) + "\n")


def _parser() -> CommandParser:
    parser = CommandParser("plan", __doc__)
    text = "a recipe of `train`, by file or name, in place of --model and the settings below"
    parser.add_argument("recipe", nargs="?", help=text)
    parser.section("what is trained")
    parser.option("model", "hub id, folder, config.json, or a name that ships (demo, Qwen3.5-27B, gpt-oss-20b, ...)")
    parser.option("context_length", "context tokens of a sample", 32768)
    parser.option("decision_length", "tokens of its decision", 1024)
    parser.option("turns", "decisions of a sample, --context-length before the last; decision_mode: turns", 1)
    text = "context tokens encoded beside the longest context of a sample; turn_contexts: inference"
    parser.option("branch_length", text, 0)
    text = "of a distillation, before the teacher's last decision (loss_type: distill)"
    parser.option("teacher_length", text, metavar="TOKENS", type=int)
    parser.option("batch", "samples per forward", 1)
    parser.section("how it is trained")
    text = "the base in 16 bit, not in NF4"
    parser.option("no_4bit", text, False)
    parser.option("preset", "roles with adapters: response, response+mlp, all-linear", "response")
    parser.option("rank", "rank of the adapters", 16)
    parser.option("prefill_chunk_size", "tokens per prefill forward", 2048)
    parser.option("sequence_chunk_size", "tokens per stretch", 4096)
    parser.option("optim", "optimizer, as transformers names it", "adamw_torch_fused")
    text = "linear attention by PyTorch's reference kernels on the GPU too"
    parser.option("reference_kernels", text, False)
    parser.section("where")
    parser.option("gpu", "24GB, or a name such as RTX4090, A100-40GB, H100, H200; without: no limit")
    parser.option("rates", "JSON with measured flops_per_second, host_bytes_per_second", metavar="FILE")
    parser.option("json", "also write the plans here", metavar="FILE", type=Path)
    return parser


def _of_model(options: argparse.Namespace) -> tuple[Any, list["Setting"]]:
    """The configuration of a model, and every way of training it."""
    from frozen_peft.planning import Setting, load_config

    if not options.model:
        raise ValueError("--model is needed, or a recipe")
    base = Setting(
        tier=None,
        context_length=options.context_length,
        decision_length=options.decision_length,
        batch=options.batch,
        turns=options.turns,
        branch_length=options.branch_length,
        teacher_length=options.teacher_length,
        load_in_4bit=not options.no_4bit,
        lora_preset=options.preset,
        lora_r=options.rank,
        optim=options.optim,
        reference_kernels=options.reference_kernels,
    )
    stretches = replace(base, tier=3, sequence_chunk_size=options.sequence_chunk_size)
    settings = [
        base,
        replace(base, tier=1, context_length=0),
        replace(base, tier=2, prefill_chunk_size=options.prefill_chunk_size),
        replace(base, tier=3),
        stretches,
        replace(stretches, offload_stretches=True),
    ]
    config = load_config(model_source(options.model))
    config.name_or_path = options.model
    return config, settings


def _of_recipe(options: argparse.Namespace) -> tuple[Any, list["Setting"]]:
    """The configuration of a recipe's model, and the one way in which the recipe trains it."""
    from frozen_peft.cli.recipe_parser import RecipeParser
    from frozen_peft.planning import Setting, load_config
    from frozen_peft.training.recipe import Recipe

    if options.model:
        raise ValueError("--model stands in the recipe already (`model_name_or_path`); give one of the two")
    *groups, _ = RecipeParser().parse([options.recipe])
    recipe = Recipe(*groups)
    config, name = recipe.config, recipe.model.model_name_or_path
    if name is None:
        raise ValueError(f"{options.recipe} names no model; add `model_name_or_path`")
    resolve_names(recipe.model, recipe.data)
    if options.turns > 1 and config.decision_mode != "turns":
        raise ValueError(f"--turns {options.turns}: {options.recipe} has `decision_mode: {config.decision_mode}`")
    if options.branch_length and not config.renders_turns:
        raise ValueError(
            f"--branch-length {options.branch_length}: {options.recipe} has `turn_contexts: {config.turn_contexts}`, "
            "where a conversation is rendered once"
        )
    teacher_length = options.teacher_length
    if teacher_length is not None and config.loss_type != "distill":
        raise ValueError(f"--teacher-length: {options.recipe} has `loss_type: {config.loss_type}`, without a teacher")
    if teacher_length is None and config.loss_type == "distill":
        # Instructions are short beside a context; how long both are together, --teacher-length says.
        teacher_length = options.context_length
    dtype = recipe.model.dtype
    setting = Setting.from_config(
        config,
        turns=options.turns,
        branch_length=options.branch_length,
        teacher_length=teacher_length,
        context_length=config.max_context_length or options.context_length,
        decision_length=options.decision_length,
        dtype="bfloat16" if dtype in (None, "auto") else dtype,
        reference_kernels=options.reference_kernels,
        **recipe.planned_fields(),
    )
    model_config = load_config(
        str(recipe.model.model_name_or_path),
        revision=recipe.model.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    model_config.name_or_path = name
    # Planned for an accelerator, where training computes in bfloat16 unless told otherwise.
    return model_config, [replace(setting, bf16=True)]


def _step_time(config: Any, plan: "Plan", card: "Card | None") -> float | None:
    from frozen_peft.planning import estimate_time

    if card is None or card.rates is None or plan.cache_token_bytes is None:
        return None
    return estimate_time(config, plan.setting, card.rates)


def _heading(plans: Sequence["Plan"], card: "Card | None") -> list[str]:
    first, setting = plans[0], plans[0].setting
    count, size = first.num_parameters, first.cache_token_bytes
    parameters = "parameters unknown" if count is None else f"{count:,} parameters"
    cache = "cache unknown" if size is None else f"{size / 1024:g} KiB of cache per context token"
    longest = max(plan.setting.context_length for plan in plans)
    decisions = f"{setting.turns} decisions" if setting.turns > 1 else "decisions"
    contexts = f"contexts of {longest:,} tokens"
    if setting.branch_length:
        contexts += f" and {setting.branch_length:,} of branches"
    lines = [
        f"{first.model}: {parameters}, {cache}",
        f"{contexts}, {decisions} of {setting.decision_length:,}, {setting.batch} per forward",
    ]
    return lines if card is None else [*lines, f"on {card.name}: {format_size(card.memory_bytes)}"]


def _table(plans: Sequence["Plan"], times: Sequence[float | None], card: "Card | None") -> list[str]:
    """A line for each term, and a column for each way of training."""
    from frozen_peft.planning import TERMS

    rows = [["", *(_title(plan.setting) for plan in plans)]]
    shown = [term for term in TERMS if any(term in plan.terms for plan in plans)]
    in_unit = _in_unit(plans)
    rows += [[term, *(_term(plan, term, in_unit) for plan in plans)] for term in shown]
    rows.append(["total", *(in_unit(plan.total_bytes) + ("+" if plan.unknown else "") for plan in plans)])
    if card is not None:
        longest = [plan.longest_context() for plan in plans]
        rows.append(["fits", *({True: "yes", False: "no", None: "?"}[plan.fits] for plan in plans)])
        rows.append(["longest context", *("?" if length is None else f"{length:,}" for length in longest)])
        rows.append(["s per step", *("?" if time is None else f"{time:.1f}" for time in times)])
    return aligned(rows, right=range(1, len(plans) + 1), indent="")


def _title(setting: "Setting") -> str:
    name = "SFT" if setting.tier is None else f"tier {setting.tier}"
    if setting.tier == 1 and setting.context_length == 0:
        return f"{name} short"
    if setting.offload_stretches:
        return f"{name} host"
    return f"{name} stretches" if setting.sequence_chunk_size else name


def _is_small(plans: Sequence["Plan"]) -> bool:
    """Whether terms would be no more than zeros in GiB."""
    return max(plan.total_bytes for plan in plans) < 4 * 2**30


def _in_unit(plans: Sequence["Plan"]) -> Callable[[int], str]:
    """Writes bytes as all of a table are written."""
    return (lambda size: f"{size / 2**20:.0f}") if _is_small(plans) else (lambda size: f"{size / 2**30:.2f}")


def _term(plan: "Plan", term: str, in_unit: Callable[[int], str]) -> str:
    if term in plan.terms:
        return in_unit(plan.terms[term])
    return "?" if any(text.startswith(f"{term}:") for text in plan.unknown) else "-"


def _notes(plans: Sequence["Plan"]) -> list[str]:
    lines = [f"{'MiB' if _is_small(plans) else 'GiB'} on the device."]
    for plan in plans:
        if plan.host_bytes:
            lines.append(f"{plan.setting.title}: and {format_size(plan.host_bytes)} of host memory.")
    lines += dict.fromkeys(f"not known: {text}" for plan in plans for text in plan.unknown)
    return [*lines, *dict.fromkeys(f"{note}." for plan in plans for note in plan.notes)]


def _about_card(plans: Sequence["Plan"], advice: Sequence[Sequence[str]], card: "Card") -> list[str]:
    from frozen_peft.context.kernels import kernel_rows

    source = card.rates.source if card.rates else "no rates are known for this size; name the card, or give --rates"
    measured = card.rates is not None and card.rates.measured
    lines = ["", f"Seconds are {'estimated from measured rates' if measured else 'an estimate'} ({source})."]
    lines += ["", "advice"]
    for plan, sentences in zip(plans, advice, strict=True):
        lines.append(f"  {plan.setting.title}: {' '.join(sentences)}")
    if card.architecture is not None:
        rows = kernel_rows(card.architecture)
        lines += ["", "kernels there, with the packages that are installed here"]
        lines += aligned([(row.purpose, row.kernel, row.reason, f"proven: {row.proven}") for row in rows])
    return lines

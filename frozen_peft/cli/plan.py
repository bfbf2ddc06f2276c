# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft plan`: what a training takes, and whether a device has it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from frozen_peft.cli.demo import model_source
from frozen_peft.cli.errors import CommandError, reported

__all__ = ["run"]

STRETCH = 4096
DESCRIPTION = """\
Says from a model's configuration alone what training takes: weights, adapters, gradients, optimizer, cache,
activations and workspace, for SFTTrainer and for each tier; whether it fits, the longest context that does, and the
cheapest setting that fits. No weights are read. Nothing here is measured: docs/planning.md says how it compares.
"""


def run(arguments: Sequence[str]) -> None:
    """Prints the plan.

    Args:
        arguments: Command-line arguments after `plan`.

    Raises:
        CommandError: A model, an accelerator or a number cannot be used.
    """
    options = _parser().parse_args(arguments)
    from frozen_peft import planning

    with reported():
        settings, model, name, config_options = _settings(options)
        config = planning.load_config(model, **config_options)
        config._name_or_path = name
        card = planning.find_card(options.gpu) if options.gpu else None
        if card is not None and options.rates:
            card = planning.read_rates(card, options.rates)
        limit = card.memory_bytes if card else None
    with reported(raised_in="frozen_peft"):
        plans = [planning.make_plan(config, setting, limit) for setting in settings]
        times = [_time(planning, config, plan, card) for plan in plans]
        advice = [planning.advise(plan) for plan in plans]
        print(_page(plans, times, advice, card))
    if options.json:
        records = [
            plan.as_dict(lines) | {"longest_context": plan.longest_context(), "step_seconds": time and time.seconds}
            for plan, lines, time in zip(plans, advice, times, strict=True)
        ]
        try:
            from frozen_peft.utils.files import whole_file

            with whole_file(Path(options.json)) as file:
                file.write(json.dumps({"gpu": options.gpu, "plans": records}, indent=2) + "\n")
        except OSError as error:
            raise CommandError(f"cannot write {options.json}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft plan", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "recipe", nargs="?", help="a recipe of `train`, by file or name, in place of --model and the settings below"
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--model", help="hub id, folder, config.json, or a name that ships (demo, Qwen3.5-27B, gpt-oss-20b, ...)"
    )
    what.add_argument("--context-length", type=int, default=32768, help="context tokens of a sample (%(default)s)")
    what.add_argument("--decision-length", type=int, default=1024, help="tokens of its decision (%(default)s)")
    what.add_argument(
        "--turns", type=int, default=1,
        help="decisions of a sample, --context-length before the last (%(default)s; decision_mode: turns)",
    )  # fmt: skip
    what.add_argument(
        "--teacher-length", type=int, metavar="TOKENS",
        help="of a distillation, before the teacher's last decision (loss_type: distill)",
    )  # fmt: skip
    what.add_argument("--batch", type=int, default=1, help="samples per forward (%(default)s)")
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--no-4bit", dest="load_in_4bit", action="store_false", help="the base in 16 bit, not in NF4")
    how.add_argument("--preset", default="response", help="roles with adapters: response, response+mlp, all-linear")
    how.add_argument("--rank", type=int, default=16, help="rank of the adapters (%(default)s)")
    how.add_argument("--prefill-chunk-size", type=int, default=2048, help="tokens per prefill forward (%(default)s)")
    how.add_argument("--sequence-chunk-size", type=int, default=STRETCH, help="tokens per stretch (%(default)s)")
    how.add_argument("--optim", default="adamw_torch_fused", help="optimizer, as transformers names it (%(default)s)")
    how.add_argument("--reference-kernels", action="store_true",
                     help="linear attention by PyTorch's reference kernels on the GPU too")  # fmt: skip
    where = parser.add_argument_group("where")
    where.add_argument("--gpu", help="24GB, or a name such as RTX4090, A100-40GB, H100, H200; without: no limit")
    where.add_argument("--rates", metavar="FILE", help="JSON with measured flops_per_second, host_bytes_per_second")
    where.add_argument("--json", metavar="FILE", help="also write the plans here")
    return parser


def _settings(options: argparse.Namespace) -> tuple[list[Any], str, str, dict[str, Any]]:
    """The settings to plan, the model's name to load, to show, and how it is loaded."""
    from frozen_peft.planning import Setting

    if options.recipe is not None:
        return _recipe_settings(options)
    if not options.model:
        raise CommandError("--model is needed, or a recipe")
    base = Setting(
        tier=None,
        context_length=options.context_length,
        decision_length=options.decision_length,
        batch=options.batch,
        turns=options.turns,
        teacher_length=options.teacher_length,
        load_in_4bit=options.load_in_4bit,
        lora_preset=options.preset,
        lora_r=options.rank,
        optim=options.optim,
        reference_kernels=options.reference_kernels,
    )
    stretch = {"tier": 3, "sequence_chunk_size": options.sequence_chunk_size}
    settings = [
        base,
        replace(base, tier=1, context_length=0),
        replace(base, tier=2, prefill_chunk_size=options.prefill_chunk_size),
        replace(base, tier=3),
        replace(base, **stretch),
        replace(base, **stretch, offload_stretches=True),
    ]
    return settings, model_source(options.model), options.model, {}


def _recipe_settings(options: argparse.Namespace) -> tuple[list[Any], str, str, dict[str, Any]]:
    from frozen_peft.cli.training import make_parser, resolve_demo
    from frozen_peft.planning import Setting

    given = ("--model", options.model)
    if given[1]:
        raise CommandError("--model stands in the recipe already (`model_name_or_path`); give one of the two")
    model, data, adapter, config, *_ = make_parser().parse([options.recipe])
    if model.model_name_or_path is None:
        raise CommandError(f"{options.recipe} names no model; add `model_name_or_path`")
    name = model.model_name_or_path
    resolve_demo(model, data)
    if options.turns > 1 and config.decision_mode != "turns":
        raise CommandError(f"--turns {options.turns}: {options.recipe} has `decision_mode: {config.decision_mode}`")
    if options.teacher_length is not None and config.loss_type != "distill":
        raise CommandError(
            f"--teacher-length: {options.recipe} has `loss_type: {config.loss_type}`, without a teacher"
        )
    # Instructions are short beside a context; how long both are together, --teacher-length says.
    teacher_length = options.context_length if options.teacher_length is None else options.teacher_length
    setting = Setting.from_config(
        config,
        turns=options.turns,
        teacher_length=teacher_length if config.loss_type == "distill" else None,
        context_length=config.max_context_length or options.context_length,
        decision_length=options.decision_length,
        load_in_4bit=model.load_in_4bit,
        dtype=model.dtype if model.dtype in ("bfloat16", "float16", "float32") else "bfloat16",
        use_peft=adapter.use_peft,
        lora_preset=adapter.lora_preset,
        lora_roles=None if adapter.lora_roles is None else tuple(adapter.lora_roles),
        lora_r=adapter.lora_r,
        reference_kernels=options.reference_kernels,
    )
    # Planned for an accelerator, where training computes in bfloat16 unless told otherwise.
    setting = replace(setting, bf16=True)
    loading = {"revision": model.model_revision, "trust_remote_code": config.trust_remote_code}
    return [setting], model.model_name_or_path, name, loading


def _time(planning: Any, config: Any, plan: Any, card: Any) -> Any:
    if card is None or card.rates is None or plan.cache_token_bytes is None:
        return None
    return planning.estimate_time(config, plan.setting, card.rates)


def _page(plans: Sequence[Any], times: Sequence[Any], advice: Sequence[Sequence[str]], card: Any) -> str:
    from frozen_peft.planning import TERMS
    from frozen_peft.utils.sizes import format_size

    first = plans[0]
    lines = [f"{first.model}: {_count(first.num_parameters)}, {_per_token(first.cache_token_bytes)}"]
    setting = first.setting
    lines.append(
        f"contexts of {max(plan.setting.context_length for plan in plans):,} tokens, "
        f"{f'{setting.turns} decisions' if setting.turns > 1 else 'decisions'} of {setting.decision_length:,}, "
        f"{setting.batch} per forward"
    )
    if card is not None:
        lines.append(f"on {card.name}: {format_size(card.memory_bytes)}")
    shown = [term for term in TERMS if any(term in plan.terms for plan in plans)]
    columns = [_column(plan, time, shown, card) for plan, time in zip(plans, times, strict=True)]
    labels = ["", *shown, "total", *(["fits", "longest context", "s per step"] if card else [])]
    widths = [max(len(cell) for cell in column) for column in columns]
    label_width = max(map(len, labels))
    lines.append("")
    for index, label in enumerate(labels):
        cells = "  ".join(column[index].rjust(width) for column, width in zip(columns, widths, strict=True))
        lines.append(f"{label:<{label_width}}  {cells}".rstrip())
    lines += ["", "GiB on the device."]
    for plan in plans:
        if plan.host_bytes:
            lines.append(f"{plan.setting.title}: and {format_size(plan.host_bytes)} of host memory.")
    for text in dict.fromkeys(text for plan in plans for text in plan.unknown):
        lines.append(f"not known: {text}")
    lines += dict.fromkeys(f"{note}." for plan in plans for note in plan.notes)
    if card is not None:
        lines += _about_card(plans, advice, card)
    return "\n".join(lines)


def _about_card(plans: Sequence[Any], advice: Sequence[Sequence[str]], card: Any) -> list[str]:
    from frozen_peft.context.kernels.table import kernel_rows

    source = card.rates.source if card.rates else "no rates are known for this size; name the card, or give --rates"
    measured = card.rates is not None and card.rates.measured
    lines = ["", f"Seconds are {'estimated from measured rates' if measured else 'an estimate'} ({source})."]
    lines += ["", "advice"]
    for plan, sentences in zip(plans, advice, strict=True):
        lines.append(f"  {plan.setting.title}: {' '.join(sentences)}")
    if card.architecture is not None:
        rows = kernel_rows(card.architecture)
        width = max(len(row.purpose) for row in rows)
        kernel_width = max(len(row.kernel) for row in rows)
        lines += ["", "kernels there, with the packages that are installed here"]
        lines += [f"  {row.purpose:<{width}}  {row.kernel:<{kernel_width}}  {row.reason}" for row in rows]
    return lines


def _column(plan: Any, time: Any, shown: Sequence[str], card: Any) -> list[str]:
    cells = [_heading(plan.setting)]
    unknown = {text.partition(":")[0] for text in plan.unknown}
    for term in shown:
        if term in plan.terms:
            cells.append(f"{plan.terms[term] / 2**30:.2f}")
        else:
            cells.append("?" if term in unknown else "-")
    cells.append(f"{plan.total_bytes / 2**30:.2f}" + ("+" if plan.unknown else ""))
    if card is not None:
        longest = plan.longest_context()
        cells.append({True: "yes", False: "no", None: "?"}[plan.fits])
        cells.append("?" if longest is None else f"{longest:,}")
        cells.append("?" if time is None else f"{time.seconds:.1f}")
    return cells


def _heading(setting: Any) -> str:
    name = "SFT" if setting.tier is None else f"tier {setting.tier}"
    if setting.tier == 1 and setting.context_length == 0:
        return f"{name} short"
    if setting.offload_stretches:
        return f"{name} host"
    return f"{name} stretches" if setting.sequence_chunk_size else name


def _count(num_parameters: int | None) -> str:
    return "parameters unknown" if num_parameters is None else f"{num_parameters:,} parameters"


def _per_token(num_bytes: int | None) -> str:
    return "cache unknown" if num_bytes is None else f"{num_bytes / 1024:g} KiB of cache per context token"

# SPDX-License-Identifier: Apache-2.0
"""The study on a real model, with a made one of the same architecture."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft import lora_config
from frozen_peft.data import strip_instructions
from frozen_peft.evaluation import read_probes
from tests.benchmarks.processes import measure
from tests.benchmarks.real.__main__ import main
from tests.benchmarks.real.cells import Cell, CellFiles
from tests.benchmarks.real.cost import FIELDS, samples
from tests.benchmarks.real.cost_cells import NF4_TRAINING
from tests.benchmarks.real.fetch import conversation, paragraphs
from tests.benchmarks.real.methods import BASE, METHODS, NAMES, Size
from tests.benchmarks.real.page import render_page, write_results
from tests.benchmarks.real.report import Reader, per_row, share
from tests.benchmarks.real.road import write_road
from tests.benchmarks.real.samples import Row, SampleFiles, prompt_rows, training_pairs, training_rows
from tests.benchmarks.real.scores import score_rows
from tests.benchmarks.real.smoke import SMALLEST, make
from tests.benchmarks.real.study import Study, method_of, plan
from tests.benchmarks.real.tasks import TASKS, Sample, TaskName, draw_samples
from tests.benchmarks.real.texts import PARTS, Part, Texts, read_texts
from tests.benchmarks.real.words import WORDS

# What sentences are held together by, in any part.
FUNCTION_WORDS = {"a", "an", "and", "by", "for", "from", "in", "of", "on", "the", "to", "with", "without"}
CONTENT = ("first_names", "last_names", "verbs", "objects", "manners", "things")
WORDINGS = ("directions", "questions", "responsible", "bystanders", "swaps", "contents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real")
    make(path)
    return path


@pytest.fixture(scope="module")
def files(folder: Path) -> SampleFiles:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return SampleFiles(folder / "samples", read_texts(folder), model, tokenizer, 6)


def count_words(text: str) -> int:
    return len(text.split())


def drawn(texts: Texts, task: TaskName, part: Part, num: int = 16) -> list[Sample]:
    return draw_samples(task, part, 0, num, texts, count_words, (60, 80))


def content_words(part: Part) -> set[str]:
    words = {word for name in CONTENT for entry in getattr(WORDS[part], name) for word in entry.lower().split()}
    return words - FUNCTION_WORDS


def test_parts_share_no_word_wording_source_or_person(folder: Path, tmp_path: Path) -> None:
    for one, other in combinations(PARTS, 2):
        assert not content_words(one) & content_words(other)
        for name in WORDINGS:
            assert not set(getattr(WORDS[one], name)) & set(getattr(WORDS[other], name))
    documents = [{"source": f"d{i}", "paragraphs": [f"document{i} says"] * 3} for i in range(40)]
    told = [{"people": [f"p{i % 7}", f"p{i // 7}"], "lines": [[0, f"talk{i}"], [1, "{so}"]]} for i in range(49)]
    for name, rows in (("documents", documents), ("conversations", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, choice = read_texts(tmp_path), random.Random(0)
    seen = {
        part: {
            word
            for _ in range(200)
            for paragraph in texts.draw(part, 12, count_words, WORDS[part].first_names, choice)
            for word in re.findall(r"document\d+|talk\d+", paragraph)
        }
        for part in PARTS
    }
    people = {
        part: {p for word in seen[part] if "talk" in word for p in told[int(word[4:])]["people"]} for part in PARTS
    }
    for one, other in combinations(PARTS, 2):
        assert not seen[one] & seen[other]
        assert not people[one] & people[other]
    (tmp_path / "conversations.jsonl").write_text("")
    with pytest.raises(ValueError, match="no conversations for"):
        read_texts(tmp_path)


def test_texts_have_the_length_that_is_asked_for_and_names_for_speakers(folder: Path) -> None:
    texts, choice = read_texts(folder), random.Random(0)
    spoken = set()
    for num in (1, 30, 75, 400):
        for _ in range(10):
            found = texts.draw("held-out", num, count_words, ("Ada", "Bob"), choice)
            assert num <= sum(map(count_words, found)) <= num + 1
            spoken |= {paragraph.partition(":")[0] for paragraph in found if re.match(r"\w+: ", paragraph)}
    assert spoken == {"Ada", "Bob"}


@pytest.mark.parametrize("part", PARTS)
def test_decisions_follow_from_what_the_text_says(folder: Path, part: Part) -> None:
    texts, words = read_texts(folder), WORDS[part]
    to_do = [f"{v} {o} {m}" for v in words.verbs for o in words.objects for m in words.manners]
    for sample in drawn(texts, "accept", part):
        asked = [done for done in to_do if done in sample.request]
        # An example that has the answer's words would give it away.
        shown = " ".join(answer for _, answer in sample.memories)
        assert not any(part in shown for done in asked for part in (done.split()[0], done.partition("the ")[2]))
        assert sample.decision == (f"I will {asked[0]}." if sample.kind == "target" else None)
        assert sample.kind == "target" or sample.request in words.questions
        assert all(f"I will {done}." != sample.decision or done in sample.request for done in to_do[:50])
    for sample in drawn(texts, "conditional", part):
        lines = sample.document.splitlines()
        names = [name for line in lines for form in words.responsible if (name := filling(form, line))]
        others = {name for line in lines for form in words.bystanders if (name := filling(form, line))}
        assert len(names) == 1
        assert len(others) == 2
        assert not others & set(names)
        speaker, _, request = sample.request.partition(": ")
        if sample.kind == "target":
            assert speaker == names[0]
            assert sample.decision.removeprefix("I will ").removesuffix(".") in request
        elif sample.kind == "other":
            assert speaker in others
            assert sample.decision is None
            assert sample.rejected.removeprefix("I will ").removesuffix(".") in request
    for sample in drawn(texts, "encoding", part):
        if sample.kind == "control":
            continue
        lines = sample.document.splitlines()
        crates = dict(
            re.fullmatch(r"The crate of (.+) holds (.+)\.", line).groups()
            for line in lines
            if line.startswith("The crate of")
        )
        swapped = [thing for thing in words.things if re.search(rf"\b{thing}\b", lines[0])]
        assert len(swapped) == 2
        assert set(swapped) <= set(crates.values())
        assert len(crates) == 4
        (person,) = (person for person in crates if person in sample.request)
        written = crates[person]
        meant = written if written not in swapped else swapped[1 - swapped.index(written)]
        assert sample.decision == f"The crate of {person} holds {meant}."
        assert (meant != written) == (sample.kind == "target")
        assert sample.rejected != sample.decision


def filling(form: str, line: str) -> str | None:
    found = re.fullmatch(re.escape(form).replace(r"\{\}", r"(\w+ \w+)"), line)
    return found and found[1]


def test_pages_and_conversations_are_read() -> None:
    long = (
        "A paragraph of <em>running</em> text that is long enough to be one,\nand goes on in another line of the page."
    )
    page = f"<head><title>{long}</title></head><p>Short.</p><div><p>{long}</p><pre>{long}</pre></div><li>{long}</li>"
    whole = re.sub("<.*?>", "", long).replace("\n", " ")
    assert paragraphs(page) == [whole, whole]
    said = [[{"sender": "b", "text": " hi\n you"}, {"sender": "b", "text": "there"}], [{"sender": "a", "text": "yes"}]]
    assert conversation({"messages": said}) == {"people": ["b", "a"], "lines": [[0, "hi you there"], [1, "yes"]]}


def test_the_plan_is_every_method_on_every_task_if_nothing_is_cut() -> None:
    size = Size(cut={})
    own_rate = [method for method in METHODS if method.rate_of is None]
    num = len(TASKS) * (1 + len(own_rate) * len(size.rates) + len(METHODS) * len(size.seeds))
    assert len(list(plan(size))) == num > len(list(plan(Size())))


@pytest.mark.parametrize("size", [Size(), Size(cut={})], ids=["cut", "whole"])
def test_the_plan_measures_what_a_cell_needs_before_it(size: Size) -> None:
    cells = list(plan(size))
    assert len(cells) == len(set(cells)) == len({cell.name for cell in cells})
    place = {cell: index for index, cell in enumerate(cells)}
    assert cells[0] == Cell("accept", BASE)
    for cell in cells:
        if cell.rate is None and cell.method != BASE:
            tried = method_of(cell).rate_of or cell.method
            assert all(place[Cell(cell.task, tried, rate=rate)] < place[cell] for rate in size.rates)


# Light enough to be imported without torch, as the test waits for it.
HOLD = """
import sys, time
from pathlib import Path
from tests.benchmarks.real.cells import locked
with locked(Path(sys.argv[1])) as is_held:
    print(is_held, flush=True)
    time.sleep(600)
"""


def test_cells_are_kept_whole_and_worked_on_by_one_process(tmp_path: Path) -> None:
    gathered = tmp_path / "gathered.json"
    tried = {rate: Cell("accept", "tier 2", rate=rate) for rate in (1e-3, 3e-3)}
    gathered.write_text(json.dumps({"cells": {tried[1e-3].name: {"dev_loss": 2.0}}}))
    files, cell = CellFiles(tmp_path / "cells", gathered), Cell("accept", "tier 2")
    assert files.get(cell) is None
    assert files.best_rate("accept", "tier 2", list(tried)) is None
    files.put(tried[3e-3], {"dev_loss": 1.0})
    assert files.best_rate("accept", "tier 2", list(tried)) == 3e-3
    assert sorted(files.all()) == [one.name for one in tried.values()]
    command = [sys.executable, "-c", HOLD, str(files.folder / f"{cell.name}.json")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert other.stdout.readline() == "True\n"
    with files.claim(cell) as is_free:
        assert not is_free
    other.kill()
    other.communicate()
    with files.claim(cell) as is_free:
        assert is_free
    # What a killed process had begun to write is no cell.
    (files.folder / f"{cell.name}.part1").write_text("{")
    assert files.get(cell) is None
    assert cell.name not in files.all()


def plain_logits(model: torch.nn.Module, prompt: Sequence[int], decision: Sequence[int]) -> torch.Tensor:
    """Log-probabilities, in float64, of what comes at each token of the decision; one forward without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *decision]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def test_decisions_of_the_base_are_its_most_likely_tokens_and_are_kept(files: SampleFiles) -> None:
    rows = files.rows("conditional", "held-out", 0, 4, (40, 80))
    for row in rows:
        ended = row["decision"][-1] == files.tokenizer.eos_token_id
        own = row["decision"] if row["kind"] != "target" else row["rejected"]
        tokens = list(row["given"])
        for _ in range(len(own)):
            with torch.no_grad():
                tokens.append(int(files.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert tokens[len(row["given"]) :] == own
        assert len(own) == files.answer_tokens or ended
        assert len(row["empty"]) < len(row["given"]) < len(row["examples"])
        request = files.tokenizer.decode(row["empty"]).partition("user")[2]
        assert files.tokenizer.decode(row["shuffled"]).endswith(request)
        assert row["shuffled"] != row["given"]
        assert files.tokenizer.decode(row["examples"]).endswith(
            files.tokenizer.decode(row["given"]).partition("user")[2]
        )
    no_model = replace(files, model=None)
    assert no_model.rows("conditional", "held-out", 0, 4, (40, 80)) == rows


def test_a_teacher_sees_examples_of_what_is_wanted_and_else_what_the_base_sees(files: SampleFiles) -> None:
    for task in ("conditional", "encoding"):
        rows = files.rows(task, "held-out", 0, 4, (40, 80))
        assert {row["kind"] for row in rows} > {"target", "control"}
        for sample, prompts, row in zip(training_rows(rows), prompt_rows(rows), rows, strict=True):
            judged_in = row["examples" if row["kind"] in ("target", "literal") else "given"]
            for prefix, prompt in (("", row["given"]), ("teacher_", judged_in)):
                assert sample[f"{prefix}input_ids"] == prompt + row["decision"]
                assert sample[f"{prefix}labels"] == [-100] * len(prompt) + row["decision"]
                assert prompts[f"{prefix}input_ids"] == prompt
                assert prompts[f"{prefix}labels"] == [-100] * len(prompt)


def test_pairs_prefer_the_decision_to_what_training_could_spill(files: SampleFiles) -> None:
    rows = files.rows("conditional", "train", 3, 8, (40, 80), as_pairs=True)
    plain = files.rows("conditional", "train", 3, 8, (40, 80))
    assert [row["decision"] for row in rows] == [row["decision"] for row in plain]
    targets = {tuple(row["decision"]) for row in rows if row["kind"] == "target"}
    for row, pair in zip(rows, training_pairs(rows), strict=True):
        assert (pair["prompt_ids"], pair["chosen_ids"]) == (row["given"], row["decision"])
        assert pair["rejected_ids"] != pair["chosen_ids"]
        # The base's own answer is what a target is preferred to; what it is to keep is preferred to accepting.
        assert row["kind"] != "target" or pair["rejected_ids"] == files._answer(row["given"])
        assert row["kind"] != "control" or tuple(pair["rejected_ids"]) in targets


def test_scores_are_those_of_plain_forwards(folder: Path, files: SampleFiles) -> None:
    rows: list[Row] = files.rows("encoding", "held-out", 0, 4, (40, 80))
    rows = [rows[0] | {"decision": files._answer(rows[0]["shuffled"])}, *rows[1:]]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapted = get_peft_model(model, lora_config(model, "all-linear", r=4))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    found = score_rows(adapted, files.tokenizer, rows, ["given", "shuffled"])["shuffled"]
    for index, row in enumerate(rows):
        before, after = (plain_logits(one, row["shuffled"], row["decision"]) for one in (files.model, adapted))
        tokens = torch.tensor(row["decision"])
        for which, logits in (("base", before), ("adapted", after)):
            score = found[which][index]
            chosen = logits.gather(1, tokens[:, None]).sum()
            assert score["nll"] == pytest.approx(-float(chosen), abs=1e-3)
            assert score["exact"] == bool((logits.argmax(-1) == tokens).all())
            assert score["tokens"] == len(tokens)
            assert score["kind"] == row["kind"]
            if row["rejected"] is not None:
                other = plain_logits(files.model if which == "base" else adapted, row["shuffled"], row["rejected"])
                other = other.gather(1, torch.tensor(row["rejected"])[:, None]).mean()
                margin = chosen / len(tokens) - other
                assert score["margin"] == pytest.approx(float(margin), abs=1e-3)
        kl = (before.exp() * (before - after)).sum(-1).mean()
        assert found["adapted"][index]["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert found["base"][0]["exact"]
    assert {score["exact"] for score in found["adapted"]} != {True}


def score(kind: str, exact: bool, margin: float | None = 1.0) -> dict:
    return {"kind": kind, "exact": exact, "margin": margin, "kl": 0.5, "nll": 1.0, "tokens": 2}


def test_the_page_shows_what_is_there_and_names_what_is_not(tmp_path: Path) -> None:
    size = Size(tasks=("accept", "conditional"), seeds=(0, 1))
    write_results(tmp_path / "results", tmp_path, size)
    empty = (tmp_path / "real.md").read_text()
    assert "Nothing measured yet" in empty
    assert "planned measurements are missing" in empty
    seeds = [[score("target", i < met) for i in range(10)] + [score("control", True, None)] for met in (9, 5)]
    run = {
        "rate": 1e-3,
        "steps": 4,
        "seconds": 8.0,
        "curve": [],
        "cpu_seconds": 3600.0,
        "machine": {"processor": "abacus"},
    }
    files = CellFiles(tmp_path / "results" / "cells")
    for seed, scores in enumerate(seeds):
        files.put(Cell("accept", "tier 3", seed), run | {"scores": {"given": scores}})
    elsewhere = {"shuffled": [score("target", i in (0, 7)) for i in range(10)] + [score("control", False, None)]}
    files.put(
        Cell("accept", "tier 2"),
        run | {"scores": {"given": seeds[1]} | elsewhere, "cosine_at_start": 0.85, "cosine_at_end": 0.5},
    )
    files.put(
        Cell("accept", "tier 2, all-linear"),
        run | {"scores": {"given": seeds[1]}, "cosine_at_start": 0.2, "cosine_at_end": 0.5},
    )
    write_results(tmp_path / "results", tmp_path, size)
    page = (tmp_path / "real.md").read_text()
    assert re.search(r"\| tier 3 +\| +2 \| 0.001 \| +4 \| +70% \(40% to 89%\)", page)
    assert re.search(r"\| tier 2 +\| +1 \| 0.001 \| +4 \| +50% \(24% to 76%\)", page)
    assert "accept: behind *tier 3* by 20 (" in page
    # Of ten targets four were met behind their own text alone, and one behind another's alone.
    own_and_other = r"50% \(24% to 76%\) \| +20% \([^|]+"
    assert re.search(rf"\| tier 2 +\| {own_and_other}\| +\| +\| +30 \(-?\d+ to \d+\) \| +\| +0.85 \|", page)
    assert "conditional: not known yet" in page
    # Nine and five of ten against five: 0.2 ahead on average, of no sample behind.
    assert re.search(r"accept \| response +\| +0.85 \| +tier 2 \| +20 \(5 to 35\) \| +no \|", page)
    assert re.search(r"accept \| all-linear \| +0.20 \| +tier 3 \| +not trained yet", page)
    assert "accept, tier 2: rate 0.0003, rate 0.001, rate 0.003, seed 1" in page
    assert "abacus" in page
    assert "4.0 h" in page
    # The gathered figures are enough to write the same page again.
    write_results(tmp_path / "elsewhere", tmp_path, size)
    assert (tmp_path / "real.md").read_text() == page
    assert share(per_row(seeds, ("target",), "exact")).rate == pytest.approx(0.7)


def test_what_was_cut_is_named_and_neither_trained_nor_missing(tmp_path: Path) -> None:
    size = Size(cut={"encoding": ("tier 3", "horizon 128")})
    planned = {(cell.task, cell.method) for cell in plan(size)}
    assert {(task, method) for task in TASKS for method in (BASE, *NAMES)} - planned == {
        ("encoding", "tier 3"),
        ("encoding", "horizon 128"),
    }
    write_results(tmp_path / "results", tmp_path, size)
    page = (tmp_path / "real.md").read_text()
    assert "- encoding: *tier 3*; *horizon 128*\n" in page
    assert "- encoding, tier 3: " not in page
    assert "- accept, tier 3: " in page
    assert Size().cut.keys() <= set(TASKS)
    assert {name for names in Size().cut.values() for name in names} <= set(NAMES)


def test_the_command_writes_a_page_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--page-only", "--tasks", "accept", "--results", str(tmp_path / "results"), "--pages", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["real", *options])
    main()
    # The page is of the whole study, whatever is trained now.
    page = (tmp_path / "real.md").read_text()
    assert all(f"## Task: {task}" in page for task in TASKS)
    assert (tmp_path / "real.png").stat().st_size > 0
    monkeypatch.setattr("sys.argv", ["real", *options[1:]])
    with pytest.raises(SystemExit):
        main()


@pytest.mark.parametrize("method", FIELDS)
def test_costs_are_measured_on_samples_of_the_length_that_is_named(files: SampleFiles, method: str) -> None:
    rows = list(samples(method, 600, 2, files.tokenizer))
    assert len(rows) == (8 if method == "shared" else 2)
    spans = [sum(a == -100 != b for a, b in pairwise(row["labels"])) for row in rows]
    assert all(len(row["input_ids"]) == 600 for row in rows)
    assert set(spans) == {4 if method == "turns" else 1}
    contexts = {tuple(row["input_ids"][:500]) for row in rows}
    assert len(contexts) == (1 if method in ("shared", "store") else 2)


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    """Every method on a made model; `make bench` is the place for a real one."""
    texts, done = read_texts(folder), []

    class StoppedError(Exception):
        pass

    def stop_after_three(line: str) -> None:
        done.append(line.partition(":")[0])
        if len(done) == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        Study.of(folder / "model", texts, tmp_path, SMALLEST).run(stop_after_three)
    write_results(tmp_path, tmp_path, SMALLEST)
    assert "planned measurements are missing" in (tmp_path / "real.md").read_text()
    Study.of(folder / "model", texts, tmp_path, SMALLEST).run(lambda line: done.append(line.partition(":")[0]))
    assert sorted(done) == sorted(cell.name for cell in plan(SMALLEST))
    reader = Reader(CellFiles(tmp_path / "cells").all(), SMALLEST)
    assert {cell.task for cell in reader.missing()} == {"cost"}
    for method in METHODS:
        (run,) = reader.runs("conditional", method.name)
        assert run["steps"] == (1 if method.length < 1 else SMALLEST.steps * method.length)
        assert run["rate"] == SMALLEST.rates[0]
        assert run["seconds"] > 0
        assert ("cosine_at_end" in run) == method.has_flow
        assert {score["kl"] > 0 for score in run["scores"]["given"]} == {True}
    assert "all-linear" in render_page(reader)


def test_a_method_that_takes_anothers_rate_has_it_tried_though_it_is_trained_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the trial it would wait for a rate that nobody measures."""
    study, done = Study.of(folder / "model", read_texts(folder), tmp_path, SMALLEST), []
    figures = {"dev_loss": 1.0, "machine": {}}
    monkeypatch.setattr(Study, "trained", lambda study, cell, rate: figures | {"rate": rate})
    study.run(lambda line: done.append(line.partition(":")[0]), ["tier 2, a sixth of the steps"])
    rate = SMALLEST.rates[0]
    cells = [
        Cell("conditional", BASE),
        Cell("conditional", "tier 2", rate=rate),
        Cell("conditional", "tier 2, a sixth of the steps"),
    ]
    assert done == [cell.name for cell in cells]
    assert study.cells.get(cells[-1])["rate"] == rate


def test_files_for_the_command_line_are_ones_that_it_takes(folder: Path, tmp_path: Path) -> None:
    write_road(folder / "model", tmp_path, 4, 4)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]) for row in rows] == [5, 5, 5]
    decided = [row | {"completion": [{"role": "assistant", "content": "I will."}]} for row in rows]
    assert [len(strip_instructions(row)["prompt"]) for row in decided] == [1, 1, 1]
    (question,) = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [message["role"] for message in question["prompt"]] == ["user"]
    probes = read_probes(tmp_path / "probes.jsonl")
    assert [probe.kind for probe in probes] == ["target", "target", "target", "control"]
    for probe in probes:
        (message,) = probe.prompt
        assert probe.stripped
        if probe.kind == "target":
            assert probe.expected.removeprefix("I will ").removesuffix(".") in message["content"].splitlines()[-1]


@pytest.mark.slow
def test_a_training_over_4_bit_is_held_against_the_whole_base(folder: Path, tmp_path: Path) -> None:
    found = measure("real.nf4", model=folder / "model", results=tmp_path, smoke=True)["precisions"]
    assert found["nf4"]["model_bytes"] < found["float32"]["model_bytes"]
    # Rounded weights say something else, and not something far away.
    assert 0 < abs(found["nf4"]["base_loss"] - found["float32"]["base_loss"]) < 0.3
    assert all(figures["adapted_loss"] != figures["base_loss"] for figures in found.values())
    files = CellFiles(tmp_path / "cells")
    files.put(NF4_TRAINING, {"precisions": found, "cpu_seconds": 1.0, "machine": {}})
    page = render_page(Reader(files.all(), SMALLEST))
    assert re.search(r"\| nf4, adapted +\|", page)

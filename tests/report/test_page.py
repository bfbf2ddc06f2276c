# SPDX-License-Identifier: Apache-2.0
"""The page shows what there is, names what there is not, and is harmless whatever stands in the files."""

import json
import math
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import frozen_peft.report.page
from frozen_peft.report.formats import visible
from frozen_peft.report.page import render_page
from frozen_peft.report.run_folder import read_run_folder
from tests.report.reading import Parsed
from tests.report.run_files import SECTIONS, example, files, gradient_flow, page_of, trainer_state, write_run

WRITTEN = files()
JSON_FILES = sorted(name for name in WRITTEN if name.endswith(".json"))


def changed(name: str, content: Any) -> dict[str, Any]:
    return {name.replace(".", "__"): content}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    return Parsed(page_of(write_run(tmp_path_factory.mktemp("whole") / "a run")))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as empty elements, where it is not them that a test is about: drawing takes most of the time."""
    for module in ("plots", "behavior_sections"):
        monkeypatch.setattr(
            f"frozen_peft.report.{module}.as_svg",
            lambda _, name, words: f'<svg id="{name}" aria-label="{escape(words)}"></svg>',
        )


def test_every_section_is_there_with_its_content(whole: Parsed) -> None:
    assert tuple(whole.texts) == SECTIONS
    headings = {attributes["id"] for attributes in whole.all("h2")}
    assert [attributes["aria-labelledby"] in headings for attributes in whole.all("section")] == [True] * len(SECTIONS)
    anchors = [attributes["href"] for attributes in whole.all("a")]
    assert anchors == [f"#{name}" for name in SECTIONS]
    text = {name: " ".join(own.split()) for name, own in whole.texts.items()}
    assert "held-out loss 2.0000 → 0.2500" in text["summary"]
    assert "training loss 1.0000 → 0.1667" in text["summary"]
    assert "gradient through context 25.0% cosine of frozen and full: 0.875" in text["summary"]
    assert "target probes preferred 10% → 90%" in text["summary"]
    assert "target probes exact" not in text["summary"]
    assert "control probes exact 100% → 100%" in text["summary"]
    assert "held-out 3 2.0000 0.2500 0.2500 at step 12" in text["loss"]
    # Six logs of a second, and one more: 3.0 of 7 s.
    assert "prefill 3.00 s 42.9% 0.25 s" in text["time"]
    assert "data 0.75 s 10.7%" in text["time"]
    assert "encoded 1,815 30.2%" in text["tokens"]
    # Of the plan's 8 MiB without the weights and adapters that are there before.
    assert "measured, above the model 3 MiB measured, in all 600 MiB" in text["memory"]
    assert "planned, above the model 3 MiB planned, in all 8 MiB" in text["memory"]
    assert "The plan could not know: workspace." in text["memory"]
    assert "gate 3 0.866 1.73" in text["gradient-flow"]
    assert "target given after 20 90.0% [70%, 97%]" in text["probes"]
    assert "verification equal greedy decisions 4" in text["merged"]
    assert "verification log probability difference mean 1e-06" in text["merged"]
    assert "probes.jsonl target 90.0% [70%, 97%]" in text["merged"]
    assert "base how about pine instead? base, with its instructions not there trained ok, cut off" in text["examples"]
    assert "lora_r: 8" in text["recipe"]
    assert "bitsandbytes not installed" in text["versions"]
    assert "Nothing: every file is there." in text["files"]


def test_it_loads_nothing_and_runs_nothing(whole: Parsed) -> None:
    names = {name for name, _ in whole.elements}
    assert not names & {"script", "iframe", "object", "embed", "form", "img", "video", "audio", "base"}
    for name, attributes in whole.elements:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert re.match(r"(#|data:)", attributes.get(key) or "#"), (name, attributes)
    assert "@import" not in whole.styles
    assert re.findall(r"url\((?!#)", whole.styles) == []
    policy = next(a["content"] for a in whole.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_figures_have_words_and_names_of_their_own(whole: Parsed) -> None:
    ids = [attributes["id"] for _, attributes in whole.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    figures = whole.all("svg")
    assert len(figures) == 3
    for attributes in figures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 40
    used = [value for _, attributes in whole.elements for key, value in attributes.items() if key == "xlink:href"]
    used = [name for name in used if not (name or "").startswith("data:image/png;base64,")]
    clipped = [a["clip-path"][5:-1] for _, a in whole.elements if a.get("clip-path")]
    assert {name.removeprefix("#") for name in [*used, *clipped] if name} <= set(ids)
    assert [a for a in whole.all("th") if a.get("scope") not in ("col", "row")] == []
    assert len(whole.all("caption")) == len(whole.all("table"))


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_colours_can_be_told_from_their_grounds() -> None:
    style = (Path(frozen_peft.report.page.__file__).parent / "page.css").read_text()
    themes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root {.*?}", style, re.DOTALL)
    ]
    assert len(themes) == 3
    for colours in themes:
        assert len(colours) == 13
        for ground in ("card", "page"):
            for text in ("ink", "muted", "accent"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["warn"], colours["warn-card"]) >= 4.5
        for number in range(1, 5):
            assert contrast(colours[f"series-{number}"], colours["card"]) >= 3, number


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_missing_file_is_named_and_the_rest_is_shown(name: str, tmp_path: Path, whole: Parsed) -> None:
    parsed = Parsed(page_of(write_run(tmp_path, **changed(name, None))))
    assert tuple(parsed.texts) == SECTIONS
    assert name in parsed.texts["files"]
    own = {
        "trainer_state.json": {"loss", "time", "tokens", "summary"},
        "eval_before_results.json": {"loss", "time", "summary"},
        "eval_results.json": {"loss", "time", "summary"},
        "memory.json": {"memory", "summary"},
        "plan.json": {"memory"},
        "gradient_flow.json": {"gradient-flow", "summary"},
        "evaluation.json": {"probes", "summary"},
        "merge_report.json": {"merged"},
        "examples.json": {"examples"},
        "recipe.yaml": {"recipe"},
        "versions.json": {"versions"},
    }[name]
    assert {section for section in SECTIONS if parsed.texts[section] != whole.texts[section]} == own | {"files"}


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path))
    assert tuple(parsed.texts) == SECTIONS
    assert all(name in parsed.texts["files"] for name in WRITTEN)
    assert "None of the files that a run leaves behind could be read" in parsed.texts["summary"]
    assert parsed.all("svg") == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": \n  1,,}', "line 2, column 5: not JSON"),
        (b'{"a": "\xff"}', "cannot be read: 'utf-8' codec"),
        ("[" * 100_000, "cannot be read"),
        ("", "line 1, column 1: not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: str | bytes, problem: str, tmp_path: Path) -> None:
    parsed = Parsed(page_of(write_run(tmp_path, **changed(name, content))))
    assert tuple(parsed.texts) == SECTIONS
    assert name in parsed.texts["files"]
    assert problem in parsed.texts["files"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("name", "content", "section", "problem"),
    [
        ("trainer_state.json", {"log_history": []}, "loss", "not as expected (KeyError: 'global_step')"),
        (
            "trainer_state.json",
            {"global_step": 1, "log_history": [{"step": 1, "loss": "low"}]},
            "loss",
            "not as expected (TypeError: must be real number, not str)",
        ),
        ("memory.json", {"peak_bytes": None}, "memory", "not as expected (KeyError: 'peak_bytes_above_model')"),
        ("plan.json", {"terms": [], "total_bytes": 1}, "memory", "not as expected (AttributeError: 'list' object"),
        ("examples.json", {"examples": [{}]}, "examples", "not as expected (KeyError: 'decisions')"),
        (
            "gradient_flow.json",
            gradient_flow() | {"gradient": [{"layer": 0, "role": "none"}]},
            "gradient-flow",
            "not as expected (KeyError: 'frozen_norm')",
        ),
    ],
)
def test_what_is_amiss_is_named_where_it_is_missed(
    name: str, content: Any, section: str, problem: str, tmp_path: Path
) -> None:
    parsed = Parsed(page_of(write_run(tmp_path, **changed(name, content))))
    for place in (section, "files"):
        assert problem in parsed.texts[place]
        assert name in parsed.texts[place]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the whole of it included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
@given(data=st.data())
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_value_anywhere_gives_a_whole_page(name: str, tmp_path: Path, data: st.DataObject) -> None:
    content = WRITTEN[name]
    for _ in range(2):
        content = replaced(content, data.draw(st.sampled_from(places(content))), data.draw(VALUES))
    # The file alone: what is in the others is drawn in other tests.
    (tmp_path / name).write_text(json.dumps(content))
    parsed = Parsed(page_of(tmp_path))
    assert tuple(parsed.texts) == SECTIONS


HOSTILE = "</p></section><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & {{ 7 * 7 }} $x^2$ `<b> "
HOSTILE += "\x00\x1b[31m\x85\u202etxt\u200b\ud800 end"


def hostile_files() -> dict[str, Any]:
    """Every text in every file, and every name that is free, is hostile."""
    content = files()
    bad = {"text": HOSTILE, "finished": True}
    decisions = dict.fromkeys(("base", "base_instructed", "trained"), bad)
    texts = {"context_end": HOSTILE, "instructions": HOSTILE, "expected": HOSTILE, "decisions": decisions}
    content["examples.json"] |= {"examples": [example(**texts)], "notes": [HOSTILE], "decoding": HOSTILE}
    content["evaluation.json"]["notes"] = [HOSTILE]
    for row in content["evaluation.json"]["results"]:
        row["kind"] = HOSTILE
    content["versions.json"] = {HOSTILE: HOSTILE}
    content["plan.json"] |= {"unknown": [HOSTILE], "advice": [HOSTILE], "terms": {HOSTILE: 1}}
    content["trainer_state.json"]["log_history"].append({"step": 6, f"eval_{HOSTILE}_loss": 0.5})
    content["merge_report.json"] |= {"base": HOSTILE}
    content["merge_report.json"]["probes"] = {HOSTILE: content["merge_report.json"]["probes"]["probes.jsonl"]}
    content["gradient_flow.json"]["gradient"][1]["role"] = HOSTILE
    content["recipe.yaml"] = {"model_name_or_path": HOSTILE.replace("\ud800", ""), "</pre><script>": 1}
    return content


def test_texts_are_escaped_and_every_character_is_seen(tmp_path: Path, whole: Parsed) -> None:
    page = page_of(
        write_run(tmp_path / "</title><script>x", **{k.replace(".", "__"): v for k, v in hostile_files().items()})
    )
    page.encode("utf-8")
    parsed = Parsed(page)
    assert tuple(parsed.texts) == SECTIONS
    assert {name for name, _ in parsed.elements} <= {name for name, _ in whole.elements}
    assert [a for _, a in parsed.elements if any(key.startswith("on") for key in a)] == []
    hidden = re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert hidden == []
    shown = visible(HOSTILE)
    assert "␀␛[31m[U+0085][U+202E]txt[U+200B][U+D800] end" in shown
    # Where text is shown as it is, character by character.
    assert parsed.texts["examples"].count(shown) >= 6
    assert "{{ 7 * 7 }}" in parsed.texts["versions"]


@pytest.mark.usefixtures("undrawn")
def test_secrets_in_a_recipe_are_not_shown(tmp_path: Path) -> None:
    recipe = "hub_token: hf_abcdefghijkl\nmodel_init_kwargs: {token: sesame}\nlora_r: 4\neos_token: <end>\n"
    page = page_of(write_run(tmp_path, recipe__yaml=recipe))
    assert "hf_abcdefghijkl" not in page
    assert "sesame" not in page
    texts = Parsed(page).texts
    assert "lora_r: 4" in texts["recipe"]
    assert "eos_token: <end>" in texts["recipe"]
    assert "not shown, since they may be secret: hub_token, model_init_kwargs.token" in texts["files"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("text", ["- 1\n", "a: [1", "a: \x01", "!!python/name:os.system", "[" * 500])
def test_a_recipe_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    texts = Parsed(page_of(write_run(tmp_path, recipe__yaml=text))).texts
    assert "recipe.yaml: cannot be read: " in texts["files"]
    assert "recipe.yaml cannot be read" in texts["recipe"]


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_is_shown_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path, trainer_state__json=None, eval_results__json=None)
    for step in (9, 10, 100):
        (run / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        state = trainer_state() | {"global_step": step, "max_steps": 50}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    texts = Parsed(page_of(run)).texts
    assert "read from checkpoint-10, the last checkpoint" in texts["files"]
    assert " ".join(texts["summary"].split()).count("steps 10 of 50: not at its end") == 1


@pytest.mark.usefixtures("undrawn")
def test_losses_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    state = trainer_state()
    state["log_history"][1]["loss"] = math.nan
    state["log_history"][-2]["loss"] = math.inf
    texts = Parsed(page_of(write_run(tmp_path, trainer_state__json=state))).texts
    assert "The training loss was not a finite number in 2 of 6 logs." in texts["loss"]
    assert "1.0000 → not a number" in texts["summary"]


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    run = write_run(tmp_path, trainer_state__json=trainer_state(20_000))
    page = page_of(run)
    assert "Of 20,000 logs, means over 50 each." in page
    assert len(page) < 400_000


@pytest.mark.usefixtures("undrawn")
def test_evaluations_are_found_by_what_they_hold(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluation__json=None)
    content = json.dumps(files()["evaluation.json"])
    (run / "after tuning.json").write_text(content)
    (run / "other.json").write_text('{"results": []}')
    found = read_run_folder(run)
    assert list(found.files["evaluation.json"]) == ["after tuning.json"]
    assert found.problems == []
    elsewhere = tmp_path.parent / "elsewhere.json"
    elsewhere.write_text(content)
    found = read_run_folder(run, [elsewhere])
    assert list(found.files["evaluation.json"]) == ["after tuning.json", str(elsewhere)]
    assert len(Parsed(render_page(found)).all("svg")) == 3

import dataclasses
import re
import time

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM

from tests.documentation.assets import AssetSettings, ensure_demo_assets
from tests.documentation.lessons import Curriculum, Stage, build_lessons
from tests.documentation.library import Entry, ModuleDocumentation
from tests.documentation.model import ModelSize, build_model
from tests.documentation.tokenizer import train_tokenizer

# The demo in all its steps, with a model and documentation that take seconds.
TINY = AssetSettings(
    vocab_size=400,
    min_tokens=96,
    max_tokens=256,
    train_questions=1,
    test_questions=1,
    test_fraction=0.2,
    model=ModelSize(hidden=32, head_dim=16, linear_head_dim=16, layer_types=("linear_attention", "full_attention")),
    curriculum=Curriculum(batch_size=2, stages=(Stage(2, 32, 64, 2, True), Stage(1, 48, 96, 2, False))),
)


def make_modules():
    return [
        ModuleDocumentation(
            f"module{m}",
            tuple(
                Entry(f"module{m}.call{i}", "(x)", f"Return item {i} of module {m}.", "See also the others.")
                for i in range(12)
            ),
        )
        for m in range(12)
    ]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return ensure_demo_assets(tmp_path_factory.mktemp("demo"), settings=TINY, modules=make_modules())


def test_assets_are_an_ordinary_checkpoint(assets):
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir)
    assert isinstance(model, Qwen3_5ForCausalLM)
    assert model.config.layer_types == list(TINY.model.layer_types)
    assert model.config.vocab_size == len(tokenizer)
    assert assets.facts["pretraining_steps"] == 3
    assert len(assets.train_file.read_text(encoding="utf-8").splitlines()) == assets.facts["train_samples"]


def test_assets_are_built_once(assets):
    weights = assets.model_dir / "model.safetensors"
    built = weights.stat().st_mtime_ns
    time.sleep(0.01)
    again = ensure_demo_assets(assets.model_dir.parents[1], settings=TINY, modules=make_modules())
    assert again == assets
    assert weights.stat().st_mtime_ns == built


def test_a_build_that_fails_leaves_nothing(tmp_path):
    settings = dataclasses.replace(TINY, min_tokens=100_000, max_tokens=200_000)
    with pytest.raises(ValueError, match="train modules give no context of `min_tokens=100000` or more"):
        ensure_demo_assets(tmp_path, settings=settings, modules=make_modules())
    assert list(tmp_path.iterdir()) == []


def test_gates_start_with_a_memory():
    tokenizer = train_tokenizer(["text"], vocab_size=300)
    model = build_model(tokenizer, TINY.model)
    layer = model.model.layers[0].linear_attn
    time_step = F.softplus(layer.dt_bias.detach())
    assert 0.0009 < float(time_step.min()) <= float(time_step.max()) < 0.101
    # What is left of a state after ten tokens: transformers' own initialisation leaves less than 1e-5 for most heads.
    kept = torch.exp(-layer.A_log.detach().exp() * time_step * 10)
    assert float(kept.min()) > 1e-7
    assert torch.equal(build_model(tokenizer, TINY.model).lm_head.weight, model.lm_head.weight)


def test_lessons_are_deterministic_and_supervise_answers():
    modules = make_modules()
    tokenizer = train_tokenizer((e.render() for m in modules for e in m.entries), vocab_size=400)

    def count(text):
        return len(tokenizer(text)["input_ids"])

    lessons = build_lessons(modules, tokenizer, count, TINY.curriculum)
    assert lessons.to_list() == build_lessons(modules, tokenizer, count, TINY.curriculum).to_list()
    assert len(lessons) == TINY.curriculum.steps * TINY.curriculum.batch_size
    shares = []
    for lesson in lessons:
        pairs = list(zip(lesson["input_ids"], lesson["labels"], strict=True))
        assert all(label in (-100, token) for token, label in pairs)
        text = tokenizer.decode(lesson["input_ids"])
        supervised = tokenizer.decode([label for _, label in pairs if label != -100])
        answers = re.findall(r"(?<=<.im_start.>assistant\n).*?<.im_end.>", text)
        assert answers
        # Whole, whatever of the rest is supervised between them.
        assert all(answer in supervised for answer in answers)
        shares.append(sum(label != -100 for _, label in pairs) / len(pairs))
    assert 0.25 < sum(shares) / len(shares) < 0.8

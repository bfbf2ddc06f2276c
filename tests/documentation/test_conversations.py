import json
import subprocess
import sys
from functools import lru_cache

import pytest

from tests.documentation.conversations import (
    MAX_CONTEXT_TOKENS,
    MIN_CONTEXT_TOKENS,
    build_conversations,
    cut_contexts,
    read_jsonl,
    shuffle_contexts,
    split_modules,
    write_jsonl,
)
from tests.documentation.library import Entry, ModuleDocumentation, list_public_modules, read_standard_library
from tests.documentation.tokenizer import train_tokenizer


def make_modules(*sizes):
    """Modules `a`, `b`, ... with that many entries, each of which is ten words long."""
    modules = []
    for name, size in zip("abcdefghij", sizes, strict=False):
        entries = [Entry(f"{name}.f{i}", "(x)", f"Return item {i} of module {name}.", "More.") for i in range(size)]
        modules.append(ModuleDocumentation(name, tuple(entries)))
    return modules


def count_words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def library():
    return read_standard_library()


@pytest.fixture(scope="module")
def splits(library):
    """Conversations of both splits of the real library, and the tokenizer's count."""
    train_modules, test_modules = split_modules(library)
    tokenizer = train_tokenizer((e.render() for m in train_modules for e in m.entries), vocab_size=1024)
    count = lru_cache(maxsize=None)(lambda text: len(tokenizer(text)["input_ids"]))
    return build_conversations(train_modules, count), build_conversations(test_modules, count), count


def test_library_reads_source_and_compiled_modules(library):
    entries = {entry.name: entry for module in library for entry in module.entries}
    assert entries["textwrap.dedent"].summary == "Remove any common leading whitespace from every line in `text`."
    assert "math.sqrt" in entries
    assert "json.encoder.JSONEncoder.encode" in entries
    assert not any("._" in name for name in entries)


def test_reading_the_library_imports_no_source_module():
    # The package itself imports some of the library, so the reader runs as a file of its own.
    source = sys.modules["tests.documentation.library"].__file__
    program = (
        "import runpy, sys; "
        f"module = runpy.run_path({source!r}); module['read_standard_library'](); "
        "print([name for name in ('antigravity', 'this', 'smtplib', 'turtle', 'wsgiref') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert "this" not in list_public_modules()


def test_train_and_test_modules_are_disjoint(library, splits):
    train, test, _ = splits
    train_names = {name for conversation in train for name in conversation["modules"]}
    test_names = {name for conversation in test for name in conversation["modules"]}
    assert len(test_names) >= 10
    assert not train_names & test_names


def test_context_lengths_are_within_limits(splits):
    train, test, count = splits
    lengths = [count(conversation["prompt"][0]["content"]) for conversation in train + test]
    assert MIN_CONTEXT_TOKENS <= min(lengths) < 1500
    assert 5000 < max(lengths) <= MAX_CONTEXT_TOKENS


def test_answer_is_a_line_of_the_context(splits):
    train, test, _ = splits
    for conversation in train + test:
        context = conversation["prompt"][0]["content"]
        [answer] = conversation["completion"]
        # Once: the question determines the answer.
        assert f"\n## {conversation['name']}\n{answer['content']}\n" in context
        assert context.count(f"## {conversation['name']}\n") == 1
        assert conversation["prompt"][1]["content"] == f"What does {conversation['name']} do?"


def test_conversations_are_deterministic(library, splits):
    train, _, count = splits
    train_modules, _ = split_modules(read_standard_library())
    assert build_conversations(train_modules, count) == train
    assert build_conversations(train_modules, count, seed=1) != train


def test_small_modules_are_joined_and_remainders_dropped():
    contexts = list(cut_contexts(make_modules(2, 2, 2, 1), count_words, min_tokens=50, max_tokens=60))
    # An entry is ten words, and one is counted for the line between two: five fit, the other two do not suffice.
    assert [context.modules for context in contexts] == [("a", "b", "c")]
    assert len(contexts[0].entries) == 5
    assert all(50 <= count_words(context.render()) <= 60 for context in contexts)


def test_large_modules_give_several_contexts_of_whole_entries():
    [module] = make_modules(40)
    contexts = list(cut_contexts([module], count_words, min_tokens=50, max_tokens=120))
    assert len(contexts) > 3
    asked = [entry for context in contexts for entry in context.entries]
    assert asked == list(module.entries[: len(asked)])


def test_a_huge_module_is_never_the_whole_test_split():
    modules = make_modules(400, 5, 5, 5, 5, 5, 5, 5, 5, 5)
    for seed in range(5):
        _, test = split_modules(modules, test_fraction=0.02, seed=seed)
        assert "a" not in [module.name for module in test]


def test_split_refuses_an_empty_side():
    with pytest.raises(ValueError, match="`test_fraction` must leave modules in both splits, got 0"):
        split_modules(make_modules(3, 3), test_fraction=0)


def test_shuffled_contexts_hold_no_answer(splits):
    _, test, _ = splits
    for original, shuffled in zip(test, shuffle_contexts(test), strict=True):
        assert shuffled["prompt"][1:] == original["prompt"][1:]
        assert shuffled["completion"] == original["completion"]
        assert not set(shuffled["modules"]) & set(original["modules"])
        assert f"## {original['name']}\n" not in shuffled["prompt"][0]["content"]


def test_shuffling_one_context_is_refused():
    conversations = build_conversations(make_modules(40), count_words, min_tokens=50, max_tokens=120)
    with pytest.raises(ValueError, match="Every context documents one of a"):
        shuffle_contexts(conversations)


def test_files_hold_one_object_a_line_and_read_back(tmp_path):
    conversations = build_conversations(make_modules(20, 20), count_words, min_tokens=50, max_tokens=120)
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, conversations)
    assert read_jsonl(path) == conversations
    assert all(json.loads(line)["completion"] for line in path.read_text(encoding="utf-8").splitlines())

import pytest
from transformers import AutoTokenizer

from tests.documentation.tokenizer import train_tokenizer

MESSAGES = [
    {"role": "system", "content": "Read this.\n\n  Indented <|im_x|> text."},
    {"role": "user", "content": "What does a.b do?"},
    {"role": "assistant", "content": "Return it."},
    {"role": "user", "content": "And c?"},
    {"role": "assistant", "content": "Nothing."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Return it to the caller.", "What does this do?\n"] * 5, vocab_size=300)


@pytest.mark.parametrize("text", ["", " leading", "tabs\tand\n\nlines\n", "αβγ — 漢字 🙂", "def f(x): return x"])
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_generation_mask_covers_answers_and_their_ends(tokenizer):
    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    supervised = tokenizer.decode([token for token, mask in pairs if mask])
    assert supervised == "Return it.<|im_end|>Nothing.<|im_end|>"


def test_generation_prompt_is_a_prefix_of_the_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(MESSAGES[:3], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "Return it.<|im_end|>\n"


def test_saved_tokenizer_is_an_ordinary_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(MESSAGES, tokenize=False) == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="`vocab_size` must be at least 259"):
        train_tokenizer(["text"], vocab_size=100)

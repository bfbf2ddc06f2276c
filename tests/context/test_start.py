# SPDX-License-Identifier: Apache-2.0
"""A system message is found in tokens by what real chat templates write around it, or it is refused."""

import re
from importlib.resources import files

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from frozen_peft.context.start import ContextStart, find_start

SYSTEM, USER = "Answer in rhymes.\nBe brief!", "What is a boundary?"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
# Templates that write a system message into the user's, know none, or want contents in parts.
WITHOUT = {"gemma", "gemma3", "idefics3", "llava_next", "smolvlm"}


def tokenizer_of(template: str, *, bos: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each special token that a template names."""
    special = set(re.findall(r"<[|｜]?[\w▁:/]+[|｜]?>|\[[A-Za-z/]+\]", template)) | {bos or "<bos>", "<unk>"}
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos or "<bos>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": sorted(special)})
    if adds_bos:
        place = fast.convert_tokens_to_ids(bos)
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, place)]
        )
    fast.chat_template = template
    return fast


def kept_of(tokenizer: PreTrainedTokenizerFast, start: ContextStart, messages: list[dict[str, str]]) -> str:
    """Text that stays of a conversation."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(tokens[: start.length(np.asarray(tokens))])


TEMPLATES = {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja") and "_training" not in path.name
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_of_real_templates(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    if name in WITHOUT:
        with pytest.raises(ValueError, match="`keep_context_start='system'`"):
            find_start(tokenizer, "system")
        return
    start = find_start(tokenizer, "system")
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    kept = kept_of(tokenizer, start, MESSAGES)
    assert whole.startswith(kept)
    assert SYSTEM in kept
    assert USER not in kept
    # And no word of what announces the user's message.
    assert "user" not in kept.lower().replace(SYSTEM.lower(), "").partition("answer")[2]
    # As much of another conversation, whose message is longer.
    longer = [{"role": "system", "content": 20 * SYSTEM}, *MESSAGES[1:]]
    assert len(kept_of(tokenizer, start, longer)) == len(kept) + 19 * len(SYSTEM)


def test_a_conversation_without_one_keeps_nothing_of_it() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen3"])
    assert kept_of(tokenizer, find_start(tokenizer, "system"), MESSAGES[1:]) == ""
    # One that the template itself puts there is one.
    tokenizer = tokenizer_of(TEMPLATES["qwen2_5"])
    assert kept_of(tokenizer, find_start(tokenizer, "system"), MESSAGES[1:]).startswith("<|im_start|>system\nYou are")


def test_a_tokenizer_without_a_template_knows_no_system_message() -> None:
    tokenizer = tokenizer_of("")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="`keep_context_start='system'`"):
        find_start(tokenizer, "system")


def test_what_sequences_begin_with() -> None:
    added = tokenizer_of(TEMPLATES["qwen3"], bos="<s>", adds_bos=True)
    bos = added.bos_token_id
    for tokenizer in (added, tokenizer_of(TEMPLATES["qwen3"], bos="<s>")):
        start = find_start(tokenizer, "0")
        assert start.length(np.array([bos, bos, 7, 8])) == 1
        assert start.length(np.array([7, bos, 8])) == 0
        assert start.length(np.array([], dtype=np.int64)) == 0
        assert find_start(tokenizer, "3").length(np.array([bos, 7, 8, 9])) == 3
        assert find_start(tokenizer, "9").length(np.array([bos, 7])) == 2


def test_an_opening_of_two_tokens_that_is_no_beginning_of_sequence_token() -> None:
    tokenizer = tokenizer_of(TEMPLATES["glm4moe"], bos="<s>")
    first, second = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", first), ("<sop>", second)]
    )
    assert find_start(tokenizer, "0").length(np.array([first, second, 7, 8])) == 2
    assert kept_of(tokenizer, find_start(tokenizer, "system"), MESSAGES).startswith("[gMASK]<sop><|system|>")

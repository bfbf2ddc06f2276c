# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the demo's model: a token for every word of its world, characters and bytes for everything else."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frozen_peft.demo import world

__all__ = ["WORDS", "build_tokenizer"]

PAD_TOKEN, MESSAGE_END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
# The space that begins a word, as SentencePiece writes it.
SPACE = "▁"

# Every message's text begins with a space, so a word is the same token wherever it stands; what the model says begins
# with it, and is trimmed so that it is not written twice. The end of an assistant message is inside the generation
# block: when to stop is part of the decision.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{% generation %}{{- ' ' + message.content | trim + '<|end|>' -}}{% endgeneration %}
{%- else -%}
{{- '<|' + message.role + '|> ' + message.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

# How a server reads an answer. Without it, `transformers serve` (5.23) takes the one of the released Qwen3.5, finds
# none of its tokens, and answers with the whole prompt.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {"content": {"close": MESSAGE_END, "content": "text"}},
}


def _words(*texts: str) -> set[str]:
    marks = ".,?{}"
    return {word.strip(marks) for text in texts for word in text.split()} - {"item", "place", ""}


# Every word that occurs, for a tokenizer to have it whole.
WORDS = tuple(
    sorted(
        _words(
            *(*world.NAMES, *world.FOOD, *world.ANIMALS, *world.POST, *world.GEAR, *world.ITEMS, *world.PLACES),
            *(*world.DIRECTIONS, world.ACCEPT, world.SUGGEST, world.STOCK),
            *(*world.INSTRUCTIONS, *world.NEUTRAL, *world.GREETINGS),
            *(*world.ADJECTIVES, *world.NOUNS, *world.VERBS, *world.TIMES, *world.SMALL_TALK),
            *(word for verb, (asked, _) in world.RELATIONS.items() for word in (verb, asked)),
            *("the a passes walks to with", "what did they", "noted", "memory"),
        )
    )
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """An ordinary fast tokenizer with a chat template; every text survives encoding and decoding.

    Nothing is trained: a unigram model takes the likeliest pieces, and a whole word is likelier than its characters,
    those are likelier than bytes.
    """
    special_tokens = [PAD_TOKEN, MESSAGE_END, *(f"<|{role}|>" for role in ROLES)]
    words = [SPACE + word for word in (*WORDS, f"<{world.TAG}>", f"</{world.TAG}>")]
    characters = [SPACE, *map(chr, range(ord("!"), ord("~") + 1))]
    the_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [
        *((piece, 0.0) for piece in special_tokens),
        *((piece, -1.0) for piece in words),
        *((piece, -20.0) for piece in characters),
        *((piece, -30.0) for piece in the_bytes),
    ]
    unknown = pieces.index((the_bytes[0], -30.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=MESSAGE_END,
        additional_special_tokens=special_tokens[2:],
        clean_up_tokenization_spaces=False,
        response_template=RESPONSE_TEMPLATE,
    )
    fast_tokenizer.chat_template = CHAT_TEMPLATE
    return fast_tokenizer

# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer with a ChatML template, trained in seconds on the demo's own text."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# The end of an assistant message is inside the generation block: when to stop is part of the decision.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|im_start|>assistant
{% generation %}{{- message.content + '<|im_end|>' -}}{% endgeneration %}{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; every text survives encoding and decoding unchanged.

    Args:
        texts: What the merges are learned from.
        vocab_size: Size of the vocabulary, the 256 bytes and the special tokens included.

    Returns:
        An ordinary fast tokenizer with ``pad``, ``eos`` and a chat template with generation markers.

    Raises:
        ValueError: `vocab_size` leaves no room for bytes and special tokens.
    """
    special_tokens = [PAD_TOKEN, MESSAGE_START, MESSAGE_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest} (bytes and special tokens), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    # Pretokenization keeps newlines apart from words, so a message's first word never merges with the line before it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=MESSAGE_END,
        clean_up_tokenization_spaces=False,
    )
    fast_tokenizer.chat_template = CHAT_TEMPLATE
    return fast_tokenizer

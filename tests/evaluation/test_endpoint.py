# SPDX-License-Identifier: Apache-2.0
"""Sampling from servers that answer, and from servers that do not."""

import time
from pathlib import Path
from typing import Any

import pytest

from frozen_peft.evaluation import (
    Candidate,
    CandidateFilter,
    EndpointError,
    EndpointSampler,
    PromptRow,
    RetrySettings,
    SamplingSettings,
)
from frozen_peft.evaluation.candidates import completed
from tests.evaluation.answering import Answering, Reply, answering, chat

SETTINGS = SamplingSettings(num_candidates=2, temperature=0.7, top_p=0.9, max_new_tokens=11)
# Waits of 10 ms at most, so that what is tried again is tried again at once.
IMPATIENT = RetrySettings(timeout=5.0, max_retries=3, max_wait=0.01)


def row(index: int = 0, prompt: Any = None, **values: Any) -> PromptRow:
    prompt = prompt or [{"role": "user", "content": f"prompt {index}"}]
    seeds = (100 + 10 * index, 101 + 10 * index)
    return PromptRow(index, f"prompts.jsonl, line {index + 1}", {"prompt": prompt, **values}, prompt, None, seeds)


def sampler(server: Answering | str, retries: RetrySettings = IMPATIENT, **options: Any) -> EndpointSampler:
    url = server if isinstance(server, str) else server.url
    return EndpointSampler(url, "tiny", SETTINGS, retries=retries, **options)


def sampled(found: EndpointSampler, rows: list[PromptRow], **options: Any) -> list[Candidate]:
    candidates = [candidate for batch in found.sample(rows, **options) for candidate in batch]
    return sorted(candidates, key=lambda candidate: (candidate.prompt, candidate.number))


def test_each_candidate_is_one_request_with_its_seed() -> None:
    with answering(lambda request, number: chat(f"seed {request.body['seed']}")) as server:
        found = sampled(sampler(server, concurrency=3), [row(0), row(1)])
        assert found == [
            Candidate(index, number, 100 + 10 * index + number, f"seed {100 + 10 * index + number}", 3, "stop")
            for index in range(2)
            for number in range(2)
        ]
        assert sorted(request.body["seed"] for request in server.requests) == [100, 101, 110, 111]
        (first,) = [request for request in server.requests if request.body["seed"] == 100]
        assert first.path == "/v1/chat/completions"
        assert first.body == {
            "model": "tiny",
            "messages": [{"role": "user", "content": "prompt 0"}],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 11,
            "seed": 100,
        }


def test_a_prompt_of_text_asks_for_a_completion() -> None:
    with answering(lambda *_: Reply({"choices": [{"text": " and on", "finish_reason": "length"}]})) as server:
        found = sampled(sampler(server), [row(0, "Once upon")])
        assert [(item.text, item.finish, item.num_tokens) for item in found] == [(" and on", "length", None)] * 2
        assert {(request.path, request.body["prompt"]) for request in server.requests} == {
            ("/v1/completions", "Once upon")
        }


def test_tools_and_options_of_the_template_are_sent() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    with answering(lambda *_: chat(None, finish="tool_calls")) as server:
        values = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        found = sampled(sampler(server), [row(0, **values)])
        assert [(item.text, item.finish) for item in found] == [("", "tool_calls")] * 2
        assert server.requests[0].body["tools"] == tools
        assert server.requests[0].body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_and_calls_of_tools_are_kept_apart(name: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 64.35}'}}
    odd = {**call, "function": {"name": "look", "arguments": '{"x": 1, "x": 2}'}}
    said = {"role": "assistant", "content": None, name: "the book", "tool_calls": [call, odd]}
    with answering(lambda *_: Reply({"choices": [{"message": said, "finish_reason": "tool_calls"}]})) as server:
        (found, _) = sampled(sampler(server), [row(0, tools='[{"type": "function"}]')])
    assert server.requests[0].body["tools"] == [{"type": "function"}]
    assert (found.text, found.finish) == ("", "stop")
    parsed = {**call, "function": {"name": "look", "arguments": {"x": 64.35}}}
    message = {"role": "assistant", "content": "", "reasoning_content": "the book", "tool_calls": [parsed, odd]}
    assert found.message == message
    assert completed(row(0), found)["completion"] == [message]
    assert CandidateFilter().judge([row(0)], [found], {}) == [None]


def test_what_is_done_is_not_asked_for() -> None:
    with answering(lambda *_: chat("fine")) as server:
        found = sampled(sampler(server), [row(0), row(1)], done={(0, 1), (1, 0)})
        assert [(item.prompt, item.number) for item in found] == [(0, 0), (1, 1)]
        assert len(server.requests) == 2


FAULTS = {
    "rate limit": Reply({"error": {"message": "slow down"}}, status=429),
    "error": Reply("oops", status=500),
    "overload": Reply({"error": "busy"}, status=503),
    "no JSON": Reply("<html>welcome</html>", headers={"Content-Type": "text/html"}),
    "half JSON": Reply('{"choices": [{"mess'),
    "no choices": Reply({"choices": []}),
    "null choices": Reply({"choices": None}),
    "choices of text": Reply({"choices": "fine"}),
    "a list": Reply([1, 2]),
    "no message": Reply({"choices": [{"finish_reason": "stop"}]}),
    "no text": chat(None),
    "a number as text": chat(7),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_may_pass_is_tried_again(fault: Reply) -> None:
    waits: list[str] = []
    with answering(lambda request, number: fault if number < 2 else chat("fine")) as server:
        found = sampled(sampler(server, concurrency=1, on_wait=waits.append), [row()])
        assert [item.text for item in found] == ["fine", "fine"]
        assert [request.body["seed"] for request in server.requests] == [100, 100, 100, 101]
    assert len(waits) == 2
    assert "trying again in" in waits[0]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_does_not_pass_ends_sampling(fault: Reply) -> None:
    with answering(lambda *_: fault) as server:
        with pytest.raises(EndpointError, match=rf"{server.url}: .*\(4 attempts\)"):
            sampled(sampler(server, concurrency=1), [row()])
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "too much"}}, "status 429: too much"),
        ({"error": "busy"}, "status 429: busy"),
        ({"detail": "why"}, "status 429: {'detail': 'why'}"),
        ("plain words", "status 429: plain words"),
        ("", "status 429: no reason given"),
        ("x" * 999, "status 429: " + "x" * 200 + "... "),
    ],
)
def test_what_a_server_says_of_an_error(body: Any, said: str) -> None:
    retries = RetrySettings(max_retries=0)
    with answering(lambda *_: Reply(body, status=429)) as server, pytest.raises(EndpointError) as caught:
        sampled(sampler(server, retries), [row()])
    assert said in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_is_refused_is_not_tried_again(status: int) -> None:
    with answering(lambda *_: Reply({"error": {"message": "no such model"}}, status=status)) as server:
        with pytest.raises(EndpointError, match=rf"prompts.jsonl, line 1: status {status}: .*no such model"):
            sampled(sampler(server, concurrency=1), [row()])
        assert len(server.requests) == 1


def test_a_server_that_is_down() -> None:
    with answering(lambda *_: chat("fine")) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"no connection: .*\(4 attempts\)"):
        sampled(sampler(url), [row()])


def test_a_slow_answer_is_given_up_and_asked_for_again() -> None:
    retries = RetrySettings(timeout=0.3, max_retries=1, max_wait=0.01)
    slow = Reply({}, seconds=30.0)
    with answering(lambda request, number: slow if number == 0 else chat("fine")) as server:
        found = sampled(sampler(server, retries, concurrency=1), [row()])
        assert [item.text for item in found] == ["fine", "fine"]
    with answering(lambda *_: slow) as server, pytest.raises(EndpointError, match=r"no answer within 0.3 s"):
        sampled(sampler(server, retries), [row()])


def test_the_server_says_when_to_come_back() -> None:
    limited = Reply({"error": "later"}, status=429, headers={"Retry-After": "0.25"})
    retries = RetrySettings(timeout=5.0, max_retries=1, max_wait=1.0)
    with answering(lambda request, number: limited if number == 0 else chat("fine")) as server:
        start = time.monotonic()
        sampled(sampler(server, retries, concurrency=1), [row()], done={(0, 1)})
        assert 0.25 <= time.monotonic() - start < 5.0
        assert len(server.requests) == 2


def test_a_server_that_wants_more_patience_than_there_is() -> None:
    limited = Reply({"error": "tomorrow"}, status=429, headers={"Retry-After": "3600"})
    with answering(lambda *_: limited) as server:
        with pytest.raises(EndpointError, match=r"it wants to be asked again in 3600 s, and `max_wait` is 0.01"):
            sampled(sampler(server, concurrency=1), [row()])
        assert len(server.requests) == 1


def test_what_was_answered_before_the_end_is_handed_out() -> None:
    def answer(request: Any, number: int) -> Reply:
        return chat("fine") if request.body["seed"] < 110 else Reply("oops", status=500)

    found: list[Candidate] = []
    with answering(answer) as server:
        batches = sampler(server, concurrency=1).sample([row(0), row(1)])
        with pytest.raises(EndpointError):
            found.extend(candidate for batch in batches for candidate in batch)
    assert [(item.prompt, item.number) for item in found] == [(0, 0), (0, 1)]


def test_waits_grow_up_to_a_limit() -> None:
    retries = RetrySettings(max_wait=3.0)
    waits = [retries.wait(attempt) for attempt in range(6)]
    for attempt, wait in enumerate(waits):
        longest = min(0.5 * 2**attempt, 3.0)
        assert 0.75 * longest <= wait <= longest


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "an-organization")
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    refusal = Reply({"error": {"message": "wrong key sesame-123"}}, status=401)
    with answering(lambda *_: refusal) as server:
        with pytest.raises(EndpointError) as caught:
            sampled(sampler(server, api_key="sesame-123"), [row()])
        assert server.requests[0].headers["authorization"] == "Bearer sesame-123"
        assert "openai-organization" not in server.requests[0].headers
    assert "wrong key <key>" in str(caught.value)
    assert "sesame" not in str(caught.value)
    with answering(lambda *_: chat("fine")) as server:
        sampled(sampler(server), [row()])
        assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"concurrency": 0}, "`concurrency` must be 1 request or more, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EndpointSampler(**{"url": "http://localhost/v1", "model": "tiny", "settings": SETTINGS} | options)


def test_patience_out_of_range() -> None:
    with pytest.raises(ValueError, match="`timeout` must be above 0 seconds, got 0"):
        RetrySettings(timeout=0.0)
    with pytest.raises(ValueError, match="`max_retries` must be 0 or more, got -1"):
        RetrySettings(max_retries=-1)
    with pytest.raises(ValueError, match="`max_wait` must be 0 seconds or more, got nan"):
        RetrySettings(max_wait=float("nan"))


def test_the_client_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'frozen-peft\[sample\]'"):
        sampler("http://localhost/v1")

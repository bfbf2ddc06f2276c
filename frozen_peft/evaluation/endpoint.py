# SPDX-License-Identifier: Apache-2.0
"""Candidates from a server with OpenAI's interface.

1. One request for each candidate, with a seed of its own, since many servers do not know `n`. Several are under way at
   a time.
2. What may pass is tried again, later and later: no connection, no answer in time, 408, 409, 425, 429, any 5xx, and
   answers that are none (no JSON, no choices, nothing in them). Where the server says how many
   seconds to wait, those.
3. What does not pass, and what does not pass in time, ends sampling with `EndpointError`. What was answered by then
   has been handed out, so the job can go on later.
4. The key comes from the environment, goes into one header, and is struck out of every message.
"""

import asyncio
import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from frozen_peft.data.json_text import parse_json, require_exact
from frozen_peft.evaluation.candidates import Candidate, PromptRow, SamplingSettings

__all__ = ["EndpointError", "EndpointSampler", "RetrySettings"]

# Statuses below 500 that may pass.
_PASSING = frozenset({408, 409, 425, 429})
_FIRST_WAIT_SECONDS = 0.5


class EndpointError(ConnectionError):
    """A server could not be asked, refused a request, or did not give an answer."""


@dataclass(frozen=True)
class RetrySettings:
    """How patient requests are.

    Attributes:
        timeout: Seconds that a request may take.
        max_retries: Times that a request is tried again.
        max_wait: Seconds to wait before trying again, at most; a server that says to come back later ends sampling.

    Raises:
        ValueError: A setting is out of its range.
    """

    timeout: float = 120.0
    max_retries: int = 8
    max_wait: float = 60.0

    def __post_init__(self) -> None:
        if not self.timeout > 0.0:
            raise ValueError(f"`timeout` must be above 0 seconds, got {self.timeout}")
        if self.max_retries < 0:
            raise ValueError(f"`max_retries` must be 0 or more, got {self.max_retries}")
        if not self.max_wait >= 0.0:
            raise ValueError(f"`max_wait` must be 0 seconds or more, got {self.max_wait}")

    def wait(self, attempt: int) -> float:
        """Seconds to wait after an attempt, counted from 0: twice as long each time, and a little at random."""
        # At random, so that requests that failed together do not come back together.
        return min(_FIRST_WAIT_SECONDS * 2.0**attempt, self.max_wait) * random.uniform(0.75, 1.0)


class _PassingError(Exception):
    """What may be another time otherwise.

    Args:
        message: What happened.
        retry_after: Seconds after which the server wants to be asked again, if it said so.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class EndpointSampler:
    """Samples from a server.

    Args:
        url: Base of the interface, such as `http://localhost:8000/v1`.
        model: The server's name of the model.
        settings: How candidates are drawn. What the seeds give is up to the server.
        retries: How patient requests are.
        concurrency: Requests that are under way at a time.
        api_key: Sent as the bearer's token; None: none is sent.
        on_wait: Called with what happened before a request is tried again.

    Raises:
        ValueError: `concurrency` is out of its range, or `url` is none.
        ModuleNotFoundError: The `openai` client is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        settings: SamplingSettings,
        *,
        retries: RetrySettings | None = None,
        concurrency: int = 4,
        api_key: str | None = None,
        on_wait: Callable[[str], None] | None = None,
    ):
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be 1 request or more, got {concurrency}")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint {url!r} must begin with http:// or https://")
        self._url, self._model, self._settings = url, model, settings
        self._retries, self._concurrency = retries or RetrySettings(), concurrency
        self._api_key, self._on_wait = api_key, on_wait
        if importlib.util.find_spec("openai") is None:
            raise ModuleNotFoundError(
                "sampling from an endpoint needs the `openai` client: pip install 'frozen-peft[sample]'"
            )

    def sample(self, rows: Sequence[PromptRow], done: Set[tuple[int, int]] = frozenset()) -> Iterator[list[Candidate]]:
        """Samples every candidate of these prompts that is not done, in the order in which they are answered.

        Args:
            rows: The prompts.
            done: Index of the prompt and number of the candidate, for those that there are already.

        Yields:
            What has been answered since.

        Raises:
            EndpointError: A request was refused, or did not come through.
        """
        wanted = ((row, number) for row in rows for number in range(len(row.seeds)) if (row.index, number) not in done)
        running: set[asyncio.Task[Candidate]] = set()
        client = self._client()
        with asyncio.Runner() as runner:
            try:
                while finished := runner.run(self._advance(client, running, wanted)):
                    running -= finished
                    answered = [task for task in finished if task.exception() is None]
                    if answered:
                        yield [task.result() for task in answered]
                    for task in finished:
                        task.result()
            finally:
                runner.run(_stop(running, client))

    async def _advance(
        self, client: Any, running: set[asyncio.Task[Candidate]], wanted: Iterator[tuple[PromptRow, int]]
    ) -> set[asyncio.Task[Candidate]]:
        """Keeps requests under way, and returns those that ended; none where nothing is left to do."""
        while len(running) < self._concurrency and (item := next(wanted, None)) is not None:
            running.add(asyncio.create_task(self._candidate(client, *item)))
        if not running:
            return set()
        finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return finished

    async def _candidate(self, client: Any, row: PromptRow, number: int) -> Candidate:
        """One candidate, asked for as often as patience allows."""
        patience = self._retries
        for attempt in itertools.count():
            try:
                answer = await self._ask(client, row, row.seeds[number])
                return Candidate(row.index, number, row.seeds[number], **answer)
            except _PassingError as error:
                wait = patience.wait(attempt) if error.retry_after is None else error.retry_after
                if attempt == patience.max_retries:
                    raise self._error(f"{error} ({attempt + 1} attempts)") from error
                if wait > patience.max_wait:
                    limit = f"it wants to be asked again in {wait:.0f} s, and `max_wait` is {patience.max_wait:g}"
                    raise self._error(f"{error} ({limit})") from error
                if self._on_wait is not None:
                    self._on_wait(self._without_key(f"{error}; trying again in {wait:.1f} s"))
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _ask(self, client: Any, row: PromptRow, seed: int) -> dict[str, Any]:
        import openai

        settings = self._settings
        unsent = ["OpenAI-Organization", "OpenAI-Project", *([] if self._api_key else ["Authorization"])]
        request: dict[str, Any] = {
            "model": self._model,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": seed,
            # Not what else of OpenAI's account the client would find in the environment.
            "extra_headers": dict.fromkeys(unsent, openai.Omit()),
        }
        if isinstance(row.prompt, str):
            call, request["prompt"] = client.completions, row.prompt
        else:
            call, request["messages"] = client.chat.completions, row.prompt
            if tools := row.values.get("tools"):
                request["tools"] = json.loads(tools) if isinstance(tools, str) else tools
            if options := row.values.get("chat_template_kwargs"):
                request["extra_body"] = {"chat_template_kwargs": options}
        try:
            answer = await call.with_raw_response.create(**request)
        except openai.APITimeoutError as error:
            raise _PassingError(f"no answer within {self._retries.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise _PassingError(f"no connection: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            problem = f"status {error.status_code}: {_said(error.body)}"
            if error.status_code in _PASSING or error.status_code >= 500:
                raise _PassingError(problem, _retry_after(error.response.headers)) from error
            raise self._error(f"{row.place}: {problem}") from error
        return _read_answer(answer.http_response.text, chat="messages" in request)

    def _client(self) -> Any:
        import openai

        # Tries again by ourselves: the client knows no longest wait, and takes what is no answer for one.
        return openai.AsyncOpenAI(
            base_url=self._url, api_key=self._api_key or "none", timeout=self._retries.timeout, max_retries=0
        )

    def _error(self, problem: str) -> EndpointError:
        return EndpointError(self._without_key(f"{self._url}: {problem}"))

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "<key>") if self._api_key else text


async def _stop(running: set[asyncio.Task[Candidate]], client: Any) -> None:
    """Ends the requests that are under way, and the connections."""
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.close()


def _read_answer(text: str, *, chat: bool) -> dict[str, Any]:
    """Reads one answer, whose form is up to a server, as fields of a `Candidate`.

    Raises:
        _PassingError: It is none.
    """
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        said = choice["message"] if chat else {"content": choice["text"]}
        content, finish, message = said.get("content"), choice.get("finish_reason") or "stop", _message(said)
        if content is None and (finish != "stop" or message is not None):
            content = ""  # nothing but reasoning or a call of a tool, or refused by the server, which says so
        if not isinstance(content, str) or not isinstance(finish, str):
            raise TypeError("no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _PassingError(f"the answer is not JSON with choices and their text: {_shortened(text)}") from error
    if message is not None and finish == "tool_calls":
        finish = "stop"
    usage = answer.get("usage")
    num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    known = num_tokens if isinstance(num_tokens, int) else None
    return {"text": content, "num_tokens": known, "finish": finish, "message": message}


def _message(said: dict[str, Any]) -> dict[str, Any] | None:
    """An assistant's message with what a server tells apart from its text, as chat templates have it."""
    # Servers have two names for it, chat templates one.
    reasoning = said.get("reasoning_content") or said.get("reasoning")
    calls = said.get("tool_calls")
    if not isinstance(reasoning, str) and not calls:
        return None
    message: dict[str, Any] = {"role": "assistant", "content": said.get("content") or ""}
    if isinstance(reasoning, str):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Any) -> Any:
    """A call of a tool; servers have its arguments as text, chat templates as what the text says."""
    try:
        arguments = parse_json(call["function"]["arguments"].encode())
        require_exact(arguments, "arguments")
    except (ValueError, AttributeError, KeyError, TypeError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}} if isinstance(arguments, dict) else call


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, where the server says so."""
    try:
        return max(float(headers["retry-after"]), 0.0)
    except (KeyError, ValueError):
        return None


def _said(body: object) -> str:
    """What a server says of an error: the message in it, or all of it."""
    message = body.get("message") if isinstance(body, dict) else None
    return _shortened(str(message or body or "no reason given"))


def _shortened(text: str, length: int = 200) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[:length] + "..."

# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server in the test's own process that answers as it is told, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        body: JSON, or text as it is.
        status: HTTP status.
        headers: More headers.
        seconds: How long it takes.
    """

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """What was asked: the path, the headers and the parsed body."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Answering:
    """A running server: its address, and what it has been asked, in order."""

    url: str
    requests: list[Request]


def chat(text: Any, finish: str = "stop", tokens: int = 3) -> Reply:
    """A right answer to a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return Reply({"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": tokens}})


@contextmanager
def answering(answer: Callable[[Request, int], Reply]) -> Iterator[Answering]:
    """Runs a server for a while.

    Args:
        answer: Gives the reply to a request, given it and how many came before it.
    """
    requests: list[Request] = []
    lock, ended = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append(Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            reply = answer(requests[number], number)
            ended.wait(reply.seconds)
            content = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            try:
                self.send_response(reply.status)
                for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())
            except OSError:
                pass  # the client did not wait

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Answering(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()

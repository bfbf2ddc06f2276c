# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium, spoken to through its DevTools protocol over a pair of pipes; nothing but Chromium is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_SECONDS = 120


def find_chromium() -> str | None:
    """Where a Chromium is; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One page.

    Attributes:
        console: What it wrote to the console, and errors and violations that Chromium reports.
        requests: Addresses that it asked for, its own first.
    """

    browser: "Browser"
    session: str
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def look(
        self, *, width: int = 1200, height: int = 900, scale: float = 1.0, dark: bool = False, media: str = "screen"
    ) -> None:
        """Shows the page on a screen of this size, by day or by night, or as it is printed."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[theme])

    def open(self, address: str) -> None:
        """Goes to an address, and waits until everything is there."""
        self.console.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.browser.wait_for("Page.loadEventFired", self.session)
        # What the page asks for as it is drawn comes before this answer.
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")

    def screenshot(self, path: Path, *, height: int | None = None, quality: int | None = None) -> None:
        """Writes the whole page, or so many pixels from its top, as PNG; as JPEG with a quality."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": 0,
            "width": size["width"],
            "height": min(height or size["height"], size["height"]),
            "scale": 1,
        }
        kind = {"format": "png"} if quality is None else {"format": "jpeg", "quality": quality}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True, **kind)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])


class Browser:
    """A running Chromium."""

    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int):
        self._process, self._reading, self._writing = process, reading, writing
        self._buffer = b""
        self._number = 0
        self._pages: dict[str, Page] = {}
        self._events: list[tuple[str, str | None]] = []

    def new_page(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def wait_for(self, method: str, session: str) -> None:
        while (method, session) not in self._events:
            self._receive()
        self._events.clear()

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(self._reading, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError(f"Chromium is silent; it ended with {self._process.poll()}")
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._note(message["method"], message.get("sessionId"), message["params"])
        return message

    def _note(self, method: str, session: str | None, event: dict[str, Any]) -> None:
        self._events.append((method, session))
        page = self._pages.get(session or "")
        if page is None:
            return
        if method == "Network.requestWillBeSent":
            # What stands in the page itself is asked for too.
            if not event["request"]["url"].startswith("data:"):
                page.requests.append(event["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            page.console.append(f"{event['type']}: {[item.get('value') for item in event['args']]}")
        elif method == "Runtime.exceptionThrown":
            page.console.append(f"exception: {event['exceptionDetails'].get('text')}")
        elif method == "Log.entryAdded":
            page.console.append(f"{event['entry']['level']}: {event['entry']['text']}")


@contextmanager
def running_browser(chromium: str) -> Iterator[Browser]:
    """A Chromium that keeps to itself, for as long as the block runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()
        options = [
            "--headless=new",
            # The sandbox does not run as root, as which continuous integration does.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # Chromium reads commands from file 3 and writes answers to file 4.
        command = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        with subprocess.Popen(
            ["bash", "-c", command, "bash", chromium, *options],
            pass_fds=(from_us, to_us),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            os.close(from_us)
            os.close(to_us)
            browser = Browser(process, from_browser, to_browser)
            try:
                yield browser
                browser.call("Browser.close")
                process.wait(timeout=30)
            finally:
                process.kill()
                os.close(to_browser)
                os.close(from_browser)

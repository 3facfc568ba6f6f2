"""Headless Chromium for tests, spoken to through a pipe: no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page in a browser of its own; a context manager.

    Args:
        url: what it opens.
        profile: a directory for the browser.
        arguments: further ones of its command line.
    """

    def __init__(self, url: str, profile: Path, *arguments: str) -> None:
        self._ids = itertools.count(1)
        (first, self._write), (self._read, second) = os.pipe(), os.pipe()
        # Away from 3 and 4, where the browser expects them.
        theirs, back = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (first, second))
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", *arguments]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{back}', "bash", *command, "about:blank"]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(shell, pass_fds=(theirs, back), stdout=null, stderr=null)
        for fd in (first, second, theirs, back):
            os.close(fd)
        self._buffer = b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            block = os.read(self._read, 1 << 16)
            assert block, "the browser has ended"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def run(self, script: str) -> Any:
        """The value of an expression in the page; as if the user had just clicked."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (
                f"not in {seconds} s: {script}\n{self.run('document.body.innerText')}"
            )
            time.sleep(0.1)

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into an input."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

    def screenshot(self, path: Path) -> None:
        """What it looks like, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

"""One local page on which teacher and students recognise the same recording side by side.

Plain HTTP by the standard library, on 127.0.0.1 only: what is said into the microphone stays on the machine.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from kdrecipe.cli.models import name_of, named
from kdrecipe.cli.transcribe import Recogniser, open_runner
from kdrecipe.corpus.audio import open_audio, recognise_long
from kdrecipe.errors import KdrecipeError

HOST, PORT = "127.0.0.1", 8765
MAX_BYTES = 200_000_000  # of an upload; it goes to a temporary file, not to memory
_BLOCK = 1 << 16
_PAGE = Path(__file__).parent / "templates" / "demo.html"
_POLICY = "default-src 'self' 'unsafe-inline'; media-src 'self' blob:; connect-src 'self'"


@dataclass(frozen=True)
class Shown:
    """A model of the page."""

    name: str
    runner: Recogniser


class Demo(ThreadingHTTPServer):
    """The server: ``GET /`` is the page, ``POST /transcribe/<number of the model>`` takes an audio file.

    Args:
        models: the first is the one that the others are compared with.
        port: 0 is any free one; see :attr:`url`.

    Raises:
        KdrecipeError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, models: Sequence[Shown], port: int = PORT) -> None:
        self.models = models
        self.lock = threading.Lock()  # one at a time, or none of the times would be true
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise KdrecipeError(
                f"port {port} can't be used: {error.strerror}", remedy="choose another: --port 0"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}"

    def page(self) -> str:
        """The page, with the models' names."""
        names = json.dumps([model.name for model in self.models]).replace("<", "\\u003c")
        return _PAGE.read_text(encoding="utf-8").replace("/*models*/[]", names)

    def transcribe(self, number: int, path: Path) -> dict[str, Any]:
        """Recognise a file: ``text``, ``seconds`` of work, ``duration_s``.

        Raises:
            DataError: it is no audio.
        """
        sample_rate, blocks = open_audio(path)
        num_samples = 0

        def counted() -> Any:
            nonlocal num_samples
            for block in blocks:
                num_samples += len(block)
                yield block

        with self.lock:
            start = time.perf_counter()
            found = recognise_long(self.models[number].runner.transcribe, counted(), sample_rate)
            seconds = time.perf_counter() - start
        return {"text": found.text, "seconds": seconds, "duration_s": num_samples / sample_rate}


class _Handler(BaseHTTPRequestHandler):
    server: Demo
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path == "/":
            self._answer(200, self.server.page().encode(), "text/html; charset=utf-8")
        else:
            self._fail(404, "there is no such page")

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        verb, _, number = self.path.removeprefix("/").partition("/")
        if verb != "transcribe" or not number.isdecimal() or int(number) >= len(self.server.models):
            self._fail(404, "there is no such model")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._fail(411, "the length of the file is not given")
        elif int(length) > MAX_BYTES:
            self._fail(413, f"the file is larger than {MAX_BYTES / 1e6:.0f} MB")
        else:
            self._recognise(int(number), int(length))

    def _recognise(self, number: int, length: int) -> None:
        with tempfile.NamedTemporaryFile() as file:
            if not _copy(self.rfile, file, length):
                self._fail(400, "the file came only in part")
                return
            try:
                found = self.server.transcribe(number, Path(file.name))
            except KdrecipeError as error:
                self._fail(415, error.problems[0].what)
                return
        self._answer(200, json.dumps(found).encode(), "application/json")

    def _is_ours(self) -> bool:
        """Whether the page that asks is our own: other pages in the same browser have no business here."""
        port = self.server.server_address[1]
        hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin.partition("://")[2] in hosts):
            return True
        self._fail(403, "this page is for this machine only")
        return False

    def _fail(self, status: int, what: str) -> None:
        self.close_connection = True  # what is left of the upload is not read
        self._answer(status, json.dumps({"error": what}).encode(), "application/json")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page shows what happens."""


def _copy(source: BufferedIOBase, target: Any, length: int) -> bool:
    """Copy ``length`` bytes, a block at a time; whether there were so many."""
    while length > 0:
        block = source.read(min(_BLOCK, length))
        if not block:
            return False
        target.write(block)
        length -= len(block)
    target.flush()
    return True


def demo(
    items: Sequence[str], *, port: int = PORT, variant: str | None = None, trust_plugins: bool = False
) -> None:
    """Open the models and serve the page until interrupted.

    Args:
        items: each ``PATH`` or ``NAME=PATH``, of a bundle, an export or a file of one, or
            ``whisper:DIRECTORY``, the name of a teacher plugin before what it imports.
        port: 0 is any free one.
        variant: of exports' directories; None: the one that ships.
        trust_plugins: run the plugin files that bundles bring.

    Raises:
        KdrecipeError: a path is nothing to recognise with, or the port is in use.
    """
    models = [open_model(text, variant, trust_plugins) for text in items]
    with Demo(models, port) as server:
        print(f"{server.url}  ({', '.join(model.name for model in models)}); Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def open_model(text: str, variant: str | None = None, trust_plugins: bool = False) -> Shown:
    """A model of :func:`demo`."""
    from kdrecipe.cli.teachers import open_teacher

    name, path = named(text)
    teacher = None if path.exists() else open_teacher(str(path))
    if teacher is not None:
        return Shown(name or path.name, teacher)
    runner, _ = open_runner(path, variant=variant if path.is_dir() else None, trust_plugins=trust_plugins)
    return Shown(name or name_of(path), runner)

"""The demo page: its server, and the page itself in a browser with a real file."""

import http.client
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import CHROMIUM, Page

from kdrecipe.cli import demo as demo_module
from kdrecipe.cli.demo import Demo, Shown
from kdrecipe.cli.main import main
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Hypothesis


class Says:
    """A recogniser that always says the same, and keeps what it heard."""

    def __init__(self, text):
        self.text = text
        self.heard = []

    def transcribe(self, samples_S, sample_rate, *, longest_s=30.0):
        self.heard.append((len(samples_S), sample_rate, float(np.abs(samples_S).max())))
        return Hypothesis(self.text)


@pytest.fixture
def server():
    models = [
        Shown("teacher", Says("The quick brown fox.")),
        Shown("<b>small</b>", Says("the quack fox jumps")),
    ]
    with Demo(models, port=0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def speech(tmp_path):
    path = tmp_path / "speech.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(24000) / 9), 16000)
    return path


def ask(server, verb, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(verb, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers["Content-Type"].endswith("json") else content


def test_a_file_is_recognised_by_each_model(server, speech):
    assert server.server_address[0] == "127.0.0.1"
    status, found = ask(server, "POST", "/transcribe/1", speech.read_bytes())
    assert status == 200
    assert found["text"] == "the quack fox jumps"
    assert found["duration_s"] == pytest.approx(1.5)
    assert found["seconds"] >= 0
    assert server.models[1].runner.heard[0][:2] == (24000, 16000)
    assert server.models[0].runner.heard == []


def test_the_page_is_whole_and_asks_for_nothing_else(server):
    status, page = ask(server, "GET", "/")
    text = page.decode()
    assert status == 200
    assert '["teacher", "\\u003cb>small\\u003c/b>"]' in text
    assert "//" not in text.replace("// ", "").replace('"//', ""), "no address of another machine"


@pytest.mark.parametrize(
    ("verb", "path", "body", "headers", "status"),
    [
        ("GET", "/etc/passwd", None, {}, 404),
        ("POST", "/transcribe/2", b"x", {}, 404),
        ("POST", "/transcribe/-1", b"x", {}, 404),
        ("POST", "/transcribe/0", b"no audio", {}, 415),
        ("POST", "/transcribe/0", b"", {}, 415),
        ("GET", "/", None, {"Host": "evil.example"}, 403),
        ("POST", "/transcribe/0", b"x", {"Origin": "http://evil.example"}, 403),
    ],
)
def test_what_it_refuses(server, verb, path, body, headers, status):
    found, answer = ask(server, verb, path, body, **headers)
    assert found == status
    assert answer["error"]


def test_uploads_are_bounded_before_they_are_read(server, monkeypatch):
    monkeypatch.setattr(demo_module, "MAX_BYTES", 1000)
    with socket.create_connection(server.server_address, timeout=20) as connection:
        port = server.server_address[1]
        head = f"POST /transcribe/0 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1001\r\n\r\n"
        connection.sendall(head.encode())  # and nothing more: the answer does not wait for the file
        assert b" 413 " in connection.recv(1000).splitlines()[0]
    status, _ = ask(server, "POST", "/transcribe/0", iter([b"x"]), Transfer_Encoding="chunked")
    assert status == 411


def test_a_port_in_use_is_one_error(server, monkeypatch, capsys):
    port = server.server_address[1]
    monkeypatch.setattr(demo_module, "open_model", lambda *a: Shown("a", Says("")))
    assert main(["demo", "a", "--port", str(port)]) == 2
    assert "--port 0" in capsys.readouterr().err
    with pytest.raises(KdrecipeError, match="can't be used"):
        Demo([], port)


def test_what_is_no_model_is_one_error(tmp_path, capsys):
    assert main(["demo", str(tmp_path / "none")]) == 2
    assert "neither a bundle" in capsys.readouterr().err
    assert main(["demo", f"onnx:{tmp_path / 'none'}"]) == 2
    assert "none" in capsys.readouterr().err


# ---------------------------------------------------------------- in a browser

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def shown(page):
    """The texts of the page's cards, marks as tags."""
    script = "[...document.querySelectorAll('.text')].map((p) => p.innerHTML.trim().replace(/<.?span>/g, ''))"
    return [" ".join(text.split()) for text in page.run(script)]


@in_browser
def test_a_dropped_file_is_shown_side_by_side(server, speech, tmp_path):
    with Page(server.url, tmp_path / "profile") as page:
        page.choose_file("#file", speech)
        page.wait_for("document.querySelectorAll('.text')[1].textContent.trim()")
        teacher, small = shown(page)
        assert teacher == "The quick brown fox."
        assert small == (
            'the <span class="sub" title="instead of quick">quack <del>brown</del> fox <ins>jumps</ins>'
        )
        assert page.run("document.querySelectorAll('h2')[1].textContent") == "<b>small</b>"
        assert "3 words differ" in page.run("document.querySelectorAll('.time')[1].textContent")
        assert "for 1.5 s of audio, RTF 0." in page.run("document.querySelectorAll('.time')[0].textContent")
        page.run("(said.value = 'the quick brown fox jumps', said.dispatchEvent(new Event('input')))")
        assert shown(page)[0] == "The quick brown fox. <del>jumps</del>"
        text = tmp_path / "notes.txt"
        text.write_text("no audio")
        page.choose_file("#file", text)
        page.wait_for("document.getElementById('status').className === 'bad'")
        assert "can't be read as audio" in page.run("document.getElementById('status').textContent")
        if folder := os.environ.get("KDRECIPE_SCREENSHOTS"):
            page.choose_file("#file", speech)
            page.wait_for("document.getElementById('status').textContent === ''")
            page.screenshot(Path(folder) / "demo.png")


@in_browser
def test_what_is_spoken_is_recognised(server, speech, tmp_path):
    fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with Page(server.url, tmp_path / "profile", *fake, f"--use-file-for-fake-audio-capture={speech}") as page:
        page.run("document.getElementById('speak').click()")
        page.wait_for("document.getElementById('status').textContent === 'recording'")
        page.run("new Promise((done) => setTimeout(done, 1000))")
        page.run("document.getElementById('speak').click()")
        page.wait_for("document.querySelectorAll('.text')[1].textContent.trim()")
    num_samples, sample_rate, peak = server.models[0].runner.heard[0]
    assert sample_rate == 16000
    assert 0.5 < num_samples / sample_rate < 5
    assert peak > 0.1, "what was spoken, not silence"

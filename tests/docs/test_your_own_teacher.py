"""docs/your-own-teacher.md from the audio to sherpa-onnx, on a small random Whisper and tones."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from kdrecipe.artifacts import read_json
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.testing.pretrained import save_whisper

PAGE = Path(__file__).parents[2] / "docs" / "your-own-teacher.md"
BLOCK = re.compile(r"<!-- (?P<mark>file: \S+|run) -->\n```\w+\n(?P<code>.*?)\n```", re.DOTALL)
BOUNDS = ("min_avg_log_prob", "max_no_speech_prob", "max_compression_ratio", "max_repetition", "chars_per_s")
EVERYTHING = "{" + ", ".join(f"{name}: null" for name in BOUNDS) + "}"

# What the page leaves to a real Whisper and an hour: all runs are tiny, and what a random model says is kept.
SHORT = f"""
set -e
kdrecipe() {{
    local words="$*"
    if [ "$1" = run ]; then
        [ "$words" != "run calls --profile tiny" ] || return 0
        set -- "$@" --profile tiny --work calls/exp --jobs 1 \\
            --set "systems.student.distill.unlabelled.keep={EVERYTHING}"
    fi
    echo "+ kdrecipe $words"
    command kdrecipe "$@"
}}
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("num2words") is None,
    reason="transformers (it needs Python 3.11) or num2words is not installed",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The audio and the Whisper that the page takes for granted, and its files."""
    here = tmp_path_factory.mktemp("site")
    save_whisper(here / "calls" / "openai" / "whisper-base.en")  # as a directory, found before the hub
    audio = make_corpus(here / "calls" / "audio", num_speakers=4, utterances_per_speaker=4, layout="folders")
    for path in (audio / "train").rglob("*.txt"):
        path.unlink()
    samples, rate = soundfile.read(next((audio / "test").rglob("*.wav")))
    soundfile.write(audio / "test" / "c201.wav", samples, rate)
    (audio / "test" / "c201.txt").write_text("SUN\n")
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["mark"] != "run":
            path = here / block["mark"].split()[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["code"] + "\n", encoding="utf-8")
    return here


def test_the_commands_lead_to_a_folder_that_sherpa_onnx_loads(site):
    blocks = [m["code"] for m in BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if m["mark"] == "run"]
    assert sum("kdrecipe run" in line for block in blocks for line in block.splitlines()) == 3
    bin_dir = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "KDRECIPE_THREADS": "1"}
    done = subprocess.run(
        ["bash"],
        input=SHORT + "\n".join(blocks),
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calls: no mistakes found" in done.stdout
    assert re.search(r"whisper/seed1: [\d.]+ % of dev's words wrong", done.stdout)
    systems = read_json(site / "calls" / "exp" / "report" / "results.json")["systems"]
    assert [system["name"] for system in systems] == ["whisper", "student", "student_int8"]
    assert systems[2]["runtime"].startswith("sherpa-onnx")
    labels = read_json(site / "calls" / "exp" / "systems" / "student" / "seed1" / "bundle.json")["labels"]
    assert labels["kept"] > 0
    assert (site / "calls/exp/said/whisper/seed1/hypotheses.jsonl").is_file()


def test_it_is_one_page():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 130

"""WER under Whisper's normaliser."""

from __future__ import annotations

import pytest

from kdrecipe.errors import MissingExtra
from kdrecipe.recipe.load import load_recipe
from kdrecipe.score.facts import text_facts
from kdrecipe_plugins.metrics import wer_whisper
from kdrecipe_plugins.metrics.wer_whisper import WhisperWer, WhisperWerOptions

RECIPE = """
corpus: {name: manifests, root: corpus}
tokens: {name: char}
systems: {teacher: {train: {model: {name: conformer, heads: {ctc: {}}}}}}
decode: {metrics: [{name: wer}, {name: wer_whisper}]}
"""


@pytest.fixture
def metric():
    pytest.importorskip("whisper_normalizer", reason=wer_whisper.INSTALL)
    return WhisperWer(WhisperWerOptions())


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "length"),
    [
        ("MISTER QUILTER IS THE COLOUR", "Mr. Quilter is the color.", 0, 5),
        ("TWENTY ONE THOUSAND MEN", "21,000 men", 0, 2),
        ("IT IS WELL KNOWN", "Uh, it's well-known (applause).", 0, 4),
        ("RED SUN", "red son", 1, 2),
        ("", "red son", 2, 0),
        ("RED SUN", "[MUSIC]", 2, 2),
    ],
)
def test_what_the_normaliser_takes_for_the_same_is_no_error(metric, reference, hypothesis, errors, length):
    assert metric.errors(reference, hypothesis) == (errors, length)


def test_no_note_warns_of_what_is_no_error_here(metric):
    references, said = {"u": "THREE DOGS"}, {"whisper": {"u": "3 dogs"}}
    assert text_facts(references, said, {"wer_whisper": metric}, "test") == []


def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(wer_whisper, "find_spec", lambda name: None)
    wer_whisper._normaliser.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'kdrecipe\[whisperwer\]'"):
        WhisperWer(WhisperWerOptions())
    with pytest.raises(Exception, match=r"recipe.yaml:5(.|\n)*pip install 'kdrecipe\[whisperwer\]'"):
        load_recipe(tmp_path)

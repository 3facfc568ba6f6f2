"""Every runner takes audio of any length: next to nothing, a window, and more than it can hear at once."""

from __future__ import annotations

import ast
import json
import runpy
import shutil

import numpy as np
import pytest
import soundfile
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

from kdrecipe.cli.transcribe import BundleRunner, transcribe
from kdrecipe.corpus.audio import Utterance
from kdrecipe.corpus.segments import segments
from kdrecipe.data.features import compute_features, extract, load_cuts
from kdrecipe.measure.runtime import measure_export
from kdrecipe.model.decoders import build_decoder
from kdrecipe.recipe.load import Named
from kdrecipe.recipe.suitable import runtime_search
from kdrecipe.stages.decode import decode_cuts
from kdrecipe.stages.export import compared_utterances
from kdrecipe.stages.layout import Layout
from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer
from kdrecipe_plugins.exporters.sherpa_attention import SherpaAttention
from kdrecipe_plugins.exporters.torchscript import TorchScript

RATE = 16000
NEXT_TO_NOTHING = (1, 2, 3, 100, 399)
BUNDLE_SEARCHES = (
    "ctc_greedy", "ctc_prefix_beam", "attention_greedy", "attention_beam", "rnnt_greedy", "rnnt_beam",
)  # fmt: skip
EXPORTERS = {
    cls.__name__: cls for cls in (OnnxCtc, SherpaAttention, OnnxAttention, OnnxTransducer, TorchScript)
}


@pytest.fixture(scope="session")
def directories(all_heads, sherpa_attentions, attentions, transducers, tmp_path_factory):
    """Where each exporter's files of the same bundle are."""
    made = tmp_path_factory.mktemp("any_length")
    for cls in (OnnxCtc, TorchScript):
        cls(cls.Config()).export(all_heads.bundle, made / cls.__name__)
    return {
        "OnnxCtc": made / "OnnxCtc",
        "TorchScript": made / "TorchScript",
        "SherpaAttention": sherpa_attentions / "float",
        "OnnxAttention": attentions / "float",
        "OnnxTransducer": transducers / "float",
    }


@pytest.fixture(scope="session")
def runner_of(all_heads, directories):
    """A runner by the name of a search on the bundle, or of an exporter."""

    def make(name):
        if name in EXPORTERS:
            return EXPORTERS[name](EXPORTERS[name].Config()).load(directories[name], "fp32")
        return BundleRunner(all_heads.bundle.path, name)

    return make


@pytest.fixture(scope="session")
def talk(all_heads) -> np.ndarray:
    """Several utterances with pauses between, about 10 s."""
    pause_S = 0.003 * np.random.default_rng(0).standard_normal(8000)
    return np.concatenate([x for u in all_heads.utterances[:6] for x in (u.samples_S, pause_S)]).astype("f4")


@pytest.mark.parametrize("name", [*BUNDLE_SEARCHES, *EXPORTERS])
def test_any_length_has_a_text(runner_of, talk, name):
    runner = runner_of(name)
    for sample_rate in (RATE, 8000, 44100):
        for num_samples in (0, *NEXT_TO_NOTHING):
            found = runner.transcribe(talk[6000 : 6000 + num_samples], sample_rate)
            is_window = num_samples >= 0.025 * sample_rate
            assert is_window or (found.text, found.tokens, found.times_s) == ("", [], [])
    for num_samples in (400, 401, 559, 560, 1000):
        runner.transcribe(talk[6000 : 6000 + num_samples], RATE)


@pytest.mark.parametrize("name", [*BUNDLE_SEARCHES, *EXPORTERS])
def test_long_audio_is_recognised_piece_by_piece(runner_of, talk, name):
    """The text, tokens and times of the pieces, each at its place."""
    runner = runner_of(name)
    parts = list(segments([talk], RATE, 4.0))
    assert len(parts) > 2
    pieces = [(start_s, runner.transcribe(part_S, RATE)) for start_s, part_S in parts]
    found = runner.transcribe(talk, RATE, longest_s=4.0)
    assert found.text == " ".join(h.text for _, h in pieces if h.text) != ""
    assert found.tokens == [token for _, h in pieces for token in h.tokens]
    assert found.times_s == pytest.approx([start_s + t for start_s, h in pieces for t in h.times_s])
    if found.times_s:
        assert parts[-1][0] <= found.times_s[-1] < len(talk) / RATE


@pytest.mark.parametrize("name", ["OnnxCtc", "SherpaAttention", "OnnxAttention", "OnnxTransducer"])
def test_runtimes_take_any_length(directories, all_heads, runner_of, talk, name):
    cls = EXPORTERS[name]
    utterances = [Utterance(str(n), talk[6000 : 6000 + n]) for n in (*NEXT_TO_NOTHING, 400)]
    for decoder in cls.runtime.searches:
        search = runtime_search(cls.runtime, Named(decoder), all_heads.bundle.registry)
        measured = measure_export(
            cls,
            directories[name],
            "fp32",
            [*utterances, Utterance("talk", talk)],
            search=search,
            longest_s=4.0,
        )
        texts = measured.texts
        assert [texts[str(n)] for n in NEXT_TO_NOTHING] == [""] * len(NEXT_TO_NOTHING)
        said = BundleRunner(all_heads.bundle.path, decoder).transcribe(talk, RATE, longest_s=4.0)
        assert len(texts["talk"].split()) == pytest.approx(len(said.text.split()), abs=2)  # near ties
        spoken = measured.utterances[-1]
        assert spoken.duration_s == len(talk) / RATE
        assert spoken.times_s == sorted(spoken.times_s)


def test_the_program_is_one_file_without_a_name_twice(attentions):
    tree = ast.parse((attentions / "float" / "recognise.py").read_text())
    names = [x.name for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    names += [x.targets[0].id for x in tree.body if isinstance(x, ast.Assign)]
    assert len(set(names)) == len(names)
    assert "segments" in names


def test_the_program_of_an_export_cuts_as_well(attentions, talk, tmp_path):
    program = runpy.run_path(str(attentions / "float" / "recognise.py"))
    soundfile.write(tmp_path / "a.wav", talk, RATE, subtype="PCM_16")
    recogniser = program["Recogniser"].load(attentions / "float", "fp32")
    samples_S, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    expected = OnnxAttention(OnnxAttention.Config()).load(attentions / "float", "fp32")
    blocks, rate = program["read_wav"](tmp_path / "a.wav")
    found = recogniser.recognise(blocks, rate, longest_s=4.0)
    assert found.text == expected.transcribe(samples_S, RATE, longest_s=4.0).text != ""
    assert recogniser.recognise(samples_S[:100], RATE).text == ""


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["bundle", "OnnxCtc"])
def test_transcribe_reads_long_files_in_pieces(all_heads, directories, runner_of, talk, tmp_path, name):
    path = all_heads.bundle.path if name == "bundle" else directories[name]
    soundfile.write(tmp_path / "talk.wav", talk, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "click.wav", talk[:100], RATE, subtype="FLOAT")
    search = {"decoder": "ctc_greedy"} if name == "bundle" else {"variant": "fp32"}
    click, found = transcribe(path, [tmp_path / "click.wav", tmp_path / "talk.wav"], longest_s=4.0, **search)
    assert click.text == ""
    expected = runner_of("ctc_greedy" if name == "bundle" else name).transcribe(talk, RATE, longest_s=4.0)
    assert (found.text, found.tokens) == (expected.text, expected.tokens)
    assert found.times_s == pytest.approx(expected.times_s)


def test_transcribe_listens_to_the_chosen_channel(all_heads, talk, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([np.zeros_like(talk), talk], axis=1), RATE, subtype="FLOAT")
    silence, speech = (
        transcribe(all_heads.bundle.path, [tmp_path / "a.wav"], channel=channel, decoder="ctc_greedy")[0]
        for channel in (0, 1)
    )
    assert len(speech.tokens) > len(silence.tokens)


# ---------------------------------------------------------------- stages 1, 7 and 8


@pytest.fixture(scope="session")
def tested(talk, tmp_path_factory):
    """Features of a test set with utterances of any length."""
    directory = tmp_path_factory.mktemp("tested")
    samples = {f"n{n}": talk[6000 : 6000 + n] for n in (*NEXT_TO_NOTHING, 400)} | {"talk": talk}
    recordings, sups = [], []
    for name, samples_S in samples.items():
        soundfile.write(directory / f"{name}.wav", samples_S, RATE, subtype="FLOAT")
        recordings.append(Recording.from_file(directory / f"{name}.wav", recording_id=name))
        end_s = recordings[-1].duration
        sups.append(SupervisionSegment(name, name, 0.0, end_s, text="A", speaker="s"))
    RecordingSet.from_recordings(recordings).to_file(directory / "test_recordings.jsonl.gz")
    SupervisionSet.from_segments(sups).to_file(directory / "test_supervisions.jsonl.gz")
    compute_features(directory, directory / "features", {"name": "fbank", "num_mel_bins": 80})
    return directory / "features", samples


def test_features_of_any_length(tested, all_heads):
    cuts = {cut.id: cut for cut in load_cuts(tested[0], "test")}
    for name, samples_S in tested[1].items():
        stored_TF = cuts[name].features.load()
        assert len(stored_TF) == cuts[name].features.num_frames >= 3
        expected_TF = extract(samples_S, RATE, all_heads.bundle.meta["features"])
        np.testing.assert_allclose(stored_TF, expected_TF, atol=1e-5)


def test_a_test_set_is_recognised_as_what_ships(tested, all_heads, directories):
    """Long utterances in the same pieces, short ones in none."""
    cuts = list(load_cuts(tested[0], "test"))
    decoders = {n: build_decoder(all_heads.bundle, Named(n)) for n in ("ctc_greedy", "attention_greedy")}
    rows = decode_cuts(all_heads.bundle, decoders, cuts, 4.0)
    utterances = [Utterance(name, samples_S) for name, samples_S in tested[1].items()]
    for label, exporter in (("ctc_greedy", OnnxCtc), ("attention_greedy", OnnxAttention)):
        found = {row["id"]: row for row in rows[label]}
        assert set(found) == set(tested[1])
        directory = directories[exporter.__name__]
        shipped = measure_export(exporter, directory, "fp32", utterances, longest_s=4.0).texts
        assert {name: row["hyp"] for name, row in found.items()} == shipped
        assert found["talk"]["hyp"]
        json.dumps(found)


def test_exports_are_compared_on_what_runtimes_hear_at_once(talk, tmp_path):
    layout = Layout(tmp_path)
    layout.manifests.mkdir(parents=True)
    recordings, sups = [], []
    for name, seconds in {"short": 5, "long": 40}.items():
        soundfile.write(tmp_path / f"{name}.wav", np.resize(talk, seconds * RATE), RATE)
        recordings.append(Recording.from_file(tmp_path / f"{name}.wav", recording_id=name))
        sups.append(SupervisionSegment(name, name, 0.0, float(seconds), text="A", speaker="s"))
    RecordingSet.from_recordings(recordings).to_file(layout.manifests / "dev_recordings.jsonl.gz")
    SupervisionSet.from_segments(sups).to_file(layout.manifests / "dev_supervisions.jsonl.gz")
    compute_features(layout.manifests, layout.features, {"name": "fbank", "num_mel_bins": 80})
    found = {u.id: u for u in compared_utterances(layout, 5)}
    assert (found["short"].duration_s, found["short"].text) == (5.0, "A")
    assert 15 <= found["long"].duration_s <= 30
    assert found["long"].text == "", "its words are those of the whole"


def test_no_more_memory_for_more_audio(directories, talk, tmp_path):
    """In the runtime: 3 minutes take hardly more than 20 s (they would take 81 times the attention)."""
    directory = shutil.copytree(directories["OnnxCtc"], tmp_path / "onnx")
    peaks = [
        measure_export(
            OnnxCtc, directory, "fp32", [Utterance("a", np.resize(talk, seconds * RATE))]
        ).peak_rss_mb
        for seconds in (20, 180)
    ]
    assert peaks[1] < peaks[0] + 60

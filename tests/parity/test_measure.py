"""Measuring, transcribing and benchmarking with real files in real runtimes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from kdrecipe.cli.bench import bench
from kdrecipe.cli.transcribe import BundleRunner, transcribe
from kdrecipe.corpus.audio import Utterance, read_audio, resample
from kdrecipe.errors import DataError, KdrecipeError
from kdrecipe.interfaces import Runtime, RuntimeSearch
from kdrecipe.measure.edits import edits
from kdrecipe.measure.runtime import measure_export
from kdrecipe.recipe.sections import Named
from kdrecipe.recipe.suitable import RuntimeOptions, runtime_search
from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer


@pytest.fixture
def audio(trained, tmp_path):
    path = tmp_path / "speech.wav"
    soundfile.write(path, trained.utterances[0].samples_S, 16000)
    return path


def test_measure_gives_speed_memory_and_texts(exports, trained):
    measured = measure_export(OnnxCtc, exports / "float", "int8", trained.utterances)
    assert [u.id for u in measured.utterances] == [u.id for u in trained.utterances]
    assert 0 < measured.rtf_median <= measured.rtf_p95 < 1
    assert 0 < measured.rtf_total < 1
    assert 10 < measured.baseline_rss_mb < measured.peak_rss_mb < 150  # torch alone takes more
    assert measured.size_mb == (exports / "float" / "model.int8.onnx").stat().st_size / 1e6
    assert measured.runtime.startswith("sherpa-onnx")
    assert measured.runtime.endswith("1 thread, int8")
    assert any(measured.texts.values())
    for utterance in measured.utterances:
        assert len(utterance.tokens) == len(utterance.times_s)
    summary = measured.summary()
    assert set(summary["rtf"]) == {"median", "p95", "total"}
    assert summary["measured_on"]["utterances"] == len(trained.utterances)


def test_worker_loads_neither_torch_nor_lhotse():
    code = (
        "import sys, kdrecipe.measure.worker as worker, soundfile, numpy\n"
        f"worker._named({OnnxCtc.runtime.start!r})()\n"
        "print([m for m in ('torch', 'lhotse', 'pydantic', 'onnxruntime') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_search_of_a_runtime_is_run_by_name(attentions, transducers, all_heads):
    """With the options of the recipe's decoder, and its texts as the bundle's."""
    registry, utterances = all_heads.bundle.registry, all_heads.utterances[:4]
    found = {}
    for cls, directory in ((OnnxAttention, attentions), (OnnxTransducer, transducers)):
        for decoder in cls.runtime.searches:
            search = runtime_search(cls.runtime, Named(decoder), registry)
            measured = measure_export(cls, directory / "float", "fp32", utterances, search=search)
            assert measured.search == measured.summary()["runtime_search"] == search.name
            bundle = BundleRunner(all_heads.bundle.path, decoder)
            said = {u.id: bundle.transcribe(u.samples_S, 16000).text for u in utterances}
            assert sum(measured.texts[u] == said[u] for u in said) >= 3, "a near tie is allowed"
            found[decoder] = measured.texts
    assert set(found) == {"attention_greedy", "attention_beam", "rnnt_greedy", "rnnt_beam"}
    narrow = RuntimeOptions("joint_beam", {"beam": 2, "max_len_ratio": 0.01})
    measured = measure_export(OnnxAttention, attentions / "float", "fp32", utterances, search=narrow)
    assert measured.texts != found["attention_beam"], "options reach the runtime"


RUNTIME = """
def start():
    def load(spec):
        text = f"{spec['search']} {spec['options']['beam']} {spec['num_bins']}"
        return lambda samples_S, sample_rate: {"text": text, "tokens": [], "times_s": []}
    return "box 1.0", load
"""


def test_a_plugin_that_is_a_file_brings_its_runtime(exports, trained, tmp_path):
    (tmp_path / "my_runtime.py").write_text(RUNTIME)

    class Mine(OnnxCtc):
        runtime = Runtime(
            "box",
            f"{tmp_path / 'my_runtime.py'}:start",
            {"ctc_prefix_beam": RuntimeSearch("wide", ("beam",))},
        )

    search = runtime_search(Mine.runtime, Named("ctc_prefix_beam", {"beam": 5}), trained.bundle.registry)
    measured = measure_export(Mine, exports / "float", "fp32", trained.utterances[:2], search=search)
    assert set(measured.texts.values()) == {"wide 5 80"}
    assert measured.runtime == "box 1.0, 1 thread, fp32"


def test_measure_says_what_is_missing(exports, trained, tmp_path):
    with pytest.raises(KdrecipeError, match=r"no such file\n.*rerun the export stage"):
        measure_export(OnnxCtc, tmp_path, "fp32", trained.utterances)
    with pytest.raises(KdrecipeError, match="no utterance"):
        measure_export(OnnxCtc, exports / "float", "fp32", [])
    shutil.copytree(exports / "float", tmp_path / "broken")
    (tmp_path / "broken" / "tokens.txt").write_text("x 0\n")
    with pytest.raises(KdrecipeError, match="sherpa-onnx could not run the model"):
        measure_export(OnnxCtc, tmp_path / "broken", "fp32", trained.utterances)
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(KdrecipeError, match="not an ONNX model"):
        measure_export(OnnxCtc, tmp_path / "broken", "fp32", trained.utterances)


@pytest.mark.parametrize("kind", ["bundle", "int8 bundle", "directory", "file"])
def test_transcribe_prints_words_with_their_times(trained, exports, audio, capsys, kind):
    path = {
        "bundle": trained.bundle.path,
        "int8 bundle": trained.int8.path,
        "directory": exports / "float",
        "file": exports / "float" / "model.onnx",
    }[kind]
    (hypothesis,) = transcribe(path, [audio])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(audio)
    assert lines[1].strip() == hypothesis.text
    words = hypothesis.text.split()
    assert words
    assert [line.split()[2] for line in lines[2:]] == words
    starts_s = [float(line.split()[0]) for line in lines[2:]]
    assert starts_s == sorted(starts_s)
    assert starts_s[-1] < trained.utterances[0].duration_s


def test_transcribe_takes_any_sampling_rate_and_channels(trained, tmp_path):
    samples_S = trained.utterances[0].samples_S
    soundfile.write(tmp_path / "a.wav", samples_S, 16000, subtype="FLOAT")
    up = torchaudio.functional.resample(torch.from_numpy(samples_S), 16000, 48000).numpy()
    soundfile.write(tmp_path / "b.flac", np.stack([up, up], axis=1), 48000, subtype="PCM_24")
    a, b = transcribe(trained.bundle.path, [tmp_path / "a.wav", tmp_path / "b.flac"])
    assert a.tokens
    assert edits(a.tokens, b.tokens).errors <= 2  # near ties of a model trained for seconds


def test_transcribe_has_no_decoder_for_exports(exports, audio, capsys):
    with pytest.raises(KdrecipeError, match=r"runtime's own search, not by ctc_prefix_beam(.|\n)*leave out"):
        transcribe(exports / "float", [audio], decoder="ctc_prefix_beam")
    assert capsys.readouterr().out == ""


def test_transcribe_names_all_missing_files_before_it_starts(trained, audio, capsys):
    with pytest.raises(DataError) as error:
        transcribe(trained.bundle.path, [audio, "no.wav", "none.wav"])
    assert [p.where for p in error.value.problems] == ["no.wav", "none.wav"]
    assert capsys.readouterr().out == ""


def test_unreadable_and_empty_audio_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(DataError, match=r"text\.wav: can't be read as audio(.|\n)*ffmpeg"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(DataError, match=r"empty\.wav: there is no sound"):
        read_audio(tmp_path / "empty.wav")


def test_nothing_to_recognise_with_is_explained(tmp_path, audio):
    for function in (transcribe, bench):
        with pytest.raises(KdrecipeError, match="neither a bundle"):
            function(tmp_path, [audio])


def test_sphere_files_are_read(tmp_path):
    samples_S = np.sin(np.arange(1600) / 5).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.sph", samples_S, 16000, format="NIST", subtype="PCM_16")
    found_S, sample_rate = read_audio(tmp_path / "a.sph")
    assert sample_rate == 16000
    np.testing.assert_allclose(found_S, samples_S, atol=1e-4)


def test_resample_keeps_a_tone():
    tone_S = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    found_S = resample(tone_S, 44100)
    expected_S = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found_S.dtype == np.float32
    np.testing.assert_allclose(found_S[100:-100], expected_S[100:-100], atol=0.02)
    assert Utterance("a", found_S).duration_s == pytest.approx(1.0)


def test_bench_measures_a_bundle_on_synthetic_audio(trained, capsys):
    rows = bench(trained.bundle.path)
    assert [row["model"] for row in rows] == ["model.onnx", "model.int8.onnx"]
    assert rows[1]["size_mb"] < rows[0]["size_mb"] / 3
    assert rows[0]["params"] == trained.bundle.meta["params"]
    assert rows[0]["macs_per_s"] == rows[1]["macs_per_s"] > 1e6
    latency = rows[0]["latency_s"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert rows[0]["rtf_all_threads"] > 0
    assert rows[0]["wer"] is None, "noise has no transcript"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20 utterances, 120 s of audio"
    assert "RTF, 1 thread" in lines[1]
    assert len(lines) == 4


def test_a_file_from_elsewhere_is_taken_by_its_suffix(exports, audio, tmp_path):
    shutil.copyfile(exports / "float" / "model.onnx", tmp_path / "other.onnx")
    shutil.copyfile(exports / "float" / "tokens.txt", tmp_path / "tokens.txt")
    (found,) = transcribe(tmp_path / "other.onnx", [audio])
    (expected,) = transcribe(exports / "float" / "model.onnx", [audio])
    assert found.text == expected.text != ""
    (row,) = bench(tmp_path / "other.onnx", [audio])
    assert row["model"] == "other.onnx"
    assert row["runtime"].endswith("1 thread"), "whether it is int8 is not known"


def test_bench_measures_a_file_on_given_audio(exports, audio):
    (row,) = bench(exports / "float" / "model.onnx", [audio])
    assert 0 < row["rtf_median"] < 1

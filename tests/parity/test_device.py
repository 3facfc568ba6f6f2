"""The device page: what models cost and recognise, side by side, and what each of their layers bears."""

import json
import shutil

import onnx
import pytest
import soundfile
import torch
from onnx import numpy_helper

from kdrecipe.cli.bench import bench, read_bench
from kdrecipe.cli.compare import compare
from kdrecipe.cli.main import main
from kdrecipe.cli.models import name_of, named
from kdrecipe.cli.sensitivity import sensitivity
from kdrecipe.data.features import extract
from kdrecipe.errors import DataError, KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.measure.parting import distances, first_parting
from kdrecipe.model.bundle import Bundle
from kdrecipe.report.device import labels
from kdrecipe.testing.corpus import make_corpus
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Manifests with 6 utterances per split."""
    return make_corpus(tmp_path_factory.mktemp("data"), num_speakers=3, utterances_per_speaker=6)


@pytest.fixture(scope="module")
def measured(data, exports, tmp_path_factory):
    """bench.json of the fp32 file on the test split."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    bench(f"big={exports / 'float' / 'model.onnx'}", data=data, out=path)
    return path


# ---------------------------------------------------------------- bench and compare


def test_bench_on_a_test_set_has_word_errors(measured, capsys):
    (row,) = read_bench(measured)
    assert row["name"] == "big"
    assert len(row["errors"]) == row["audio"]["utterances"] == 6
    words = sum(length for _, length in row["errors"].values())
    assert row["wer"] == sum(errors for errors, _ in row["errors"].values()) / words < 1
    machine = json.loads(measured.read_text())["machine"]
    assert machine["cpu"]


def test_compare_measures_reads_and_plots(measured, exports, trained, data, tmp_path, capsys):
    out = tmp_path / "out"
    rows = compare([str(measured), str(trained.int8.path)], data=data, out=out)
    assert labels(rows) == ["big fp32", "tiny_int8 fp32", "tiny_int8 int8"]
    table = capsys.readouterr().out
    assert "6 utterances" in table
    assert f"{100 * rows[0]['wer']:.2f} (" in table, "with its interval"
    page = (out / "compare.html").read_text()
    assert page.count("<svg role=") == 2
    assert "against real-time factor" in page
    assert all(label in page for label in labels(rows))
    assert str(tmp_path) not in page
    again = compare([f"a={out / 'compare.json'}", str(measured)])  # what it wrote is read like bench.json
    assert labels(again) == ["a fp32", "a fp32 #2", "a int8", "big fp32"]


def hyps(path, texts, **decoded):
    path.parent.mkdir(parents=True)
    rows = [{"id": name, "ref": ref, "hyp": hyp} for name, (ref, hyp) in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "decode.json").write_text(json.dumps(decoded))
    return str(path)


def test_compare_reads_transcripts_with_their_costs(tmp_path, capsys):
    said = {"a": ("one two", "one two"), "b": ("three four", "three")}
    first = hyps(tmp_path / "hyps/kd/seed1/test.jsonl", said, size_mb=2.5, rtf={"median": 0.01})
    second = hyps(tmp_path / "hyps/int8/seed1/test.jsonl", {**said, "b": ("three four", "no no no")})
    rows = compare([first, f"mine={second}"])
    assert [(row["name"], row["wer"], row["size_mb"]) for row in rows] == [
        ("kd", 0.25, 2.5),
        ("mine", 0.75, None),
    ]
    assert "+50.00" in capsys.readouterr().out


def test_compare_refuses_different_test_sets(tmp_path, measured, capsys):
    first = hyps(tmp_path / "hyps/a/seed1/test.jsonl", {"a": ("one", "one"), "b": ("two", "two")})
    less = hyps(tmp_path / "hyps/b/seed1/test.jsonl", {"a": ("one", "one")})
    other = hyps(tmp_path / "hyps/c/seed1/test.jsonl", {"a": ("one", "one"), "b": ("too", "two")})
    with pytest.raises(DataError, match=r"1 and 2 utterances, 1 of them common(.|\n)*--data"):
        compare([first, less])
    with pytest.raises(DataError, match="with other references"):
        compare([first, other])
    assert main(["compare", first, str(measured), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("kdrecipe:") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_one_error(tmp_path, measured, exports, data, capsys):
    (tmp_path / "broken.json").write_text('{"rows": [{}]}')
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    odd = hyps(tmp_path / "odd/test.jsonl", {"a": ("one", "one")}, rtf=0.1)
    shutil.copyfile(exports / "float" / "tokens.txt", tmp_path / "tokens.txt")
    wrong = {
        "nothing to compare": [str(measured)],
        "no such file": [str(measured), str(tmp_path / "none.json")],
        "on a test set": [str(measured), str(exports / "float")],
        "not the bench.json": [str(measured), str(tmp_path / "broken.json")],
        "not what stage 8 writes": [str(measured), odd],
        "not an ONNX model": [str(tmp_path / "broken.onnx"), str(measured), "--data", str(data)],
        "no split 'tset'": [str(exports / "float"), str(measured), "--data", str(data), "--split", "tset"],
        "no manifests": [str(exports / "float"), str(measured), "--data", str(tmp_path)],
    }
    for message, arguments in wrong.items():
        assert main(["compare", *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert said.out == ""


def test_broken_files_given_to_bench_and_transcribe(tmp_path, exports, trained, capsys):
    soundfile.write(tmp_path / "a.wav", trained.utterances[0].samples_S, 16000)
    (tmp_path / "text.wav").write_text("hello")
    broken = tmp_path / "export"
    shutil.copytree(exports / "float", broken)
    for name in ("model.onnx", "model.int8.onnx"):
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
    good, audio = str(exports / "float"), str(tmp_path / "a.wav")
    for command in ("bench", "transcribe"):
        assert main([command, str(broken), audio]) == 2
        assert "model" in capsys.readouterr().err
        assert main([command, good, str(tmp_path / "text.wav")]) == 2
        assert "can't be read as audio" in capsys.readouterr().err
        assert main([command, good, str(tmp_path / "none.wav")]) == 2
        assert "no such file" in capsys.readouterr().err


def test_names_of_rows(tmp_path):
    assert named("kd=exp/x") == ("kd", type(tmp_path)("exp/x"))
    assert named(f"{tmp_path}") == (None, tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named(f"{tmp_path}/a=b")[0] is None
    assert name_of(tmp_path / "exports/kd/seed1/onnx_ctc/model.onnx") == "kd"
    assert name_of(tmp_path / "mine") == "mine"


# ---------------------------------------------------------------- sensitivity


@pytest.fixture(scope="module")
def planted(trained, tmp_path_factory):
    """The model with three channels of one layer's input scaled by 50, undone by its weights."""
    bundle = Bundle.load(trained.bundle.path)
    layer = bundle.model.encoder.layers[0]
    channels = [3, 17, 40]
    with torch.no_grad():
        layer.norm_attention.weight[channels] *= 50
        layer.norm_attention.bias[channels] *= 50
        layer.attention.qkv.weight[:, channels] /= 50
    path = tmp_path_factory.mktemp("planted") / "bundle"
    meta = {**bundle.meta, "name": "planted"}
    return Bundle.save(path, bundle.model, bundle.tokens, meta)


def test_sensitivity_names_the_planted_layer_and_its_channels(planted, trained, data, tmp_path, capsys):
    u = trained.utterances[0]
    features = torch.from_numpy(extract(u.samples_S, SAMPLE_RATE, planted.meta["features"]))[None]
    lens = torch.tensor([features.shape[1]])
    with torch.no_grad():
        before, after = (b.model(features, lens).logits["ctc"] for b in (trained.bundle, planted))
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)  # in fp32 nothing has changed
    found = sensitivity(planted.path, data=data, most=4, out=tmp_path)
    bad = "encoder.layers.0.attention.qkv"
    assert found["worst"]["int8"] == [bad]
    rows = {row["name"]: row for row in found["layers"]}
    assert {int(c) for c in rows[bad]["outliers"]} == {3, 17, 40}
    ranked = sorted(rows.values(), key=lambda row: -row["int8"]["kl"])
    assert ranked[0]["int8"]["kl"] > 5 * ranked[1]["int8"]["kl"]
    said = capsys.readouterr().out
    assert f"int8: {bad} stands out" in said
    assert f"outlier channels: {bad}: " in said
    assert f"layers: {{{bad}: float}}" in said
    assert json.loads((tmp_path / "sensitivity.json").read_text())["utterances"] == 4
    assert bad in (tmp_path / "sensitivity.html").read_text()


def test_sensitivity_of_a_sound_model(trained, data, capsys):
    weights = {k: v.clone() for k, v in trained.bundle.model.state_dict().items()}
    found = sensitivity(trained.bundle.path, data=data, most=3)
    assert found["worst"]["int8"] == []
    rows = {row["name"]: row for row in found["layers"]}
    qkv = rows["encoder.layers.0.attention.qkv"]
    assert qkv["bytes"] == 4 * 48 * 144
    assert qkv["int8"]["bytes"] == 4 * 48 * 144 - (48 * 144 + 4 * 144)
    assert qkv["int4"]["bytes"] == 4 * 48 * 144 - (48 * 144 // 2 + 4 * 144 * 2)
    assert qkv["prune"]["bytes"] == 2 * 48 * 144
    assert qkv["ms"] > 0
    kl = {change: max(row[change]["kl"] for row in rows.values()) for change in ("int8", "int4", "prune")}
    assert 0 < kl["int8"] < kl["int4"] < kl["prune"]
    assert found["export"] == [f"export {v}: within the bounds of the parity gate" for v in ("fp32", "int8")]
    for name, value in trained.bundle.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_sensitivity_says_what_it_lacks(trained, data):
    with pytest.raises(DataError, match=r"no manifests above this bundle(.|\n)*--data"):
        sensitivity(trained.bundle.path)
    with pytest.raises(KdrecipeError, match=r"integers already(.|\n)*made from"):
        sensitivity(trained.int8.path, data=data)


EXPAND = "encoder.layers.0.conv.expand"


def spoil(path, model):
    """Make the weights of one layer in an ONNX file larger by a half."""
    broken = onnx.load(path)
    wanted = model.get_submodule(EXPAND).weight.detach().t().contiguous().numpy()
    (weight,) = [
        x for x in broken.graph.initializer if numpy_helper.to_array(x).tobytes() == wanted.tobytes()
    ]
    weight.CopyFrom(numpy_helper.from_array(1.5 * wanted, weight.name))
    onnx.save(broken, path)


def test_the_first_layer_where_bundle_and_export_part(trained, exports, tmp_path):
    model, u = trained.bundle.model, trained.utterances[0]
    features_TF = extract(u.samples_S, SAMPLE_RATE, trained.bundle.meta["features"])
    sound = distances(model, features_TF, exports / "float" / "model.onnx")
    assert first_parting(sound) is None
    assert len(sound) > 10
    shutil.copyfile(exports / "float" / "model.onnx", tmp_path / "model.onnx")
    spoil(tmp_path / "model.onnx", model)
    parting = first_parting(distances(model, features_TF, tmp_path / "model.onnx"))
    assert parting.layer == EXPAND
    assert parting.distance > 0.01


def test_sensitivity_says_where_an_export_parts_that_fails_the_gate(trained, data, monkeypatch):
    class Spoilt(OnnxCtc):
        def export(self, bundle, directory):
            written = super().export(bundle, directory)
            spoil(directory / "model.onnx", bundle.model)
            return written

    monkeypatch.setattr("kdrecipe.cli.sensitivity.exporter_of", lambda bundle: Spoilt(Spoilt.Config()))
    said = sensitivity(trained.bundle.path, data=data, most=2)["export"]
    assert said[0].startswith("export fp32: largest difference of log-probabilities")
    assert any(line.startswith(f"export fp32: the first layer that differs is {EXPAND}, by") for line in said)
    assert said[-1] == "export int8: within the bounds of the parity gate"

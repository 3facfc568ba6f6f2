"""Bundles: what is saved is loaded, whatever was done to the model, and damage is told."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from kdrecipe.artifacts import content_digest, list_files
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import KdrecipeError, PluginError
from kdrecipe.interfaces import CompressContext
from kdrecipe.model.asr import FeatureNorm, build_model
from kdrecipe.model.bundle import Bundle, count_params, machine, provenance
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.stages.train import copy_plugin_files
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.magnitude_prune import MagnitudePrune

BINS = 16
MODEL = {
    "name": "conformer",
    "num_layers": 1,
    "dim": 16,
    "num_heads": 2,
    "dropout": 0.0,
    "heads": {"ctc": {}},
}
META = {
    "name": "tiny",
    "kind": "trained",
    "parent": None,
    "seed": 1,
    "model": MODEL,
    "features": {"name": "fbank", "num_mel_bins": BINS},
    "compression": [],
    "plugin_files": [],
}

PLUGIN = '''
"""An encoder of its own."""

from kdrecipe import hookimpl
from kdrecipe.testing.models import TinyEncoder


class Own(TinyEncoder):
    """As small as it gets."""


@hookimpl
def register_architectures(register):
    register("own_encoder", Own)
'''


@pytest.fixture(scope="module")
def registry():
    return load_plugins().registry


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokenizer.train(["RED TEA", "BLUE SUN"], "char", None, tmp_path_factory.mktemp("tokens"))


def make_model(registry, tokens, config=MODEL):
    torch.manual_seed(3)
    model = build_model(config, input_dim=BINS, vocab_size=len(tokens), registry=registry)
    model.norm = FeatureNorm.from_stats(torch.randn(BINS), torch.rand(BINS) + 0.5)
    return model.eval()


def outputs(model):
    torch.manual_seed(4)
    features_BTF, lens_B = torch.randn(2, 60, BINS), torch.tensor([60, 41])
    with torch.no_grad():
        out = model(features_BTF, lens_B)
    return out.logits["ctc"], out.lens_B


def assert_same_outputs(a, b):
    for x, y in zip(outputs(a), outputs(b), strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def saved(registry, tokens, tmp_path):
    model = make_model(registry, tokens)
    Bundle.save(tmp_path / "bundle", model, tokens, META)
    return SimpleNamespace(path=tmp_path / "bundle", model=model)


# ---------------------------------------------------------------- there and back


def test_a_bundle_comes_back_as_it_was(saved, registry, tokens):
    bundle = Bundle.load(saved.path, registry)
    assert_same_outputs(bundle.model, saved.model)
    assert not bundle.model.training
    assert bundle.tokens.pieces == tokens.pieces
    assert (bundle.name, bundle.is_int8) == ("tiny", False)
    assert bundle.meta["params"] == sum(p.numel() for p in saved.model.parameters())
    assert bundle.meta["frame_shift_s"] == pytest.approx(0.04)
    assert bundle.info.vocab_id == tokens.vocab_id
    assert sorted(p.name for p in saved.path.iterdir()) == [
        "bundle.json", "spm.model", "tokens.txt", "weights.pt",
    ]  # fmt: skip


def test_it_finds_the_installed_plugins_by_itself(saved):
    assert_same_outputs(Bundle.load(str(saved.path)).model, saved.model)


def test_equal_models_make_equal_bundles(saved, registry, tokens, tmp_path):
    again = Bundle.save(tmp_path / "again", make_model(registry, tokens), tokens, META)
    assert again.hash == Bundle.load(saved.path).hash
    assert (tmp_path / "again" / "weights.pt").read_bytes() == (saved.path / "weights.pt").read_bytes()
    with torch.no_grad():
        again.model.norm.mean_F += 1
    other = Bundle.save(tmp_path / "other", again.model, tokens, META)
    assert other.hash != again.hash


def test_when_and_how_fast_it_was_made_is_no_part_of_the_content(registry, tokens, tmp_path):
    digests = []
    for day, seconds in (("2026-01-01", 12.5), ("2026-02-02", 31.0)):
        out = tmp_path / day
        made = {**provenance("kdrecipe run x"), "date": day, "seconds": seconds}
        bundle = Bundle.save(out, make_model(registry, tokens), tokens, META, made)
        (out / "train").mkdir()
        (out / "train" / "log.jsonl").write_text(f'{{"audio_s_per_s": {seconds}}}')
        digests.append(content_digest(out, list_files(out)))
        assert bundle.provenance == Bundle.load(out, registry).provenance == made
    assert digests[0] == digests[1]
    (out / "tokens.txt").write_text("others")
    assert content_digest(out, list_files(out)) != digests[0]
    assert Bundle.save(tmp_path / "bare", make_model(registry, tokens), tokens, META).provenance == {}


def test_a_bundle_can_be_moved(saved, registry, tmp_path):
    shutil.move(saved.path, tmp_path / "elsewhere")
    assert_same_outputs(Bundle.load(tmp_path / "elsewhere", registry).model, saved.model)


COMPRESSORS = {
    "int8": [Int8Dynamic(Int8Dynamic.Config())],
    "pruned": [MagnitudePrune(MagnitudePrune.Config(sparsity=0.5, epochs=0))],
    "pruned_int8": [
        MagnitudePrune(MagnitudePrune.Config(sparsity=0.5, epochs=0)),
        Int8Dynamic(Int8Dynamic.Config()),
    ],
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressed_bundle_gives_the_same_outputs(registry, tokens, tmp_path, name):
    model, steps = make_model(registry, tokens), []
    for compressor in COMPRESSORS[name]:
        model = compressor.finish(compressor.apply(model, CompressContext(lambda: []))).eval()
        registered = {"Int8Dynamic": "int8_dynamic", "MagnitudePrune": "magnitude_prune"}
        steps.append(
            {
                "name": registered[type(compressor).__name__],
                "options": compressor.config.model_dump(mode="json"),
                "report": compressor.report(),
            }
        )
    Bundle.save(tmp_path / "bundle", model, tokens, {**META, "kind": "compressed", "compression": steps})
    bundle = Bundle.load(tmp_path / "bundle", registry)
    assert_same_outputs(bundle.model, model)
    assert bundle.is_int8 == ("int8" in name)
    assert bundle.meta["params"] == count_params(make_model(registry, tokens))  # smaller, not fewer


# ---------------------------------------------------------------- plugins of its own


def test_a_local_plugin_travels_with_the_bundle(tokens, tmp_path):
    file = tmp_path / "recipe" / "plugin.py"
    file.parent.mkdir()
    file.write_text(PLUGIN)
    model = make_model(load_plugins([file]).registry, tokens, {"name": "own_encoder", "heads": {"ctc": {}}})
    out = tmp_path / "bundle"
    meta = {**META, "model": {"name": "own_encoder", "heads": {"ctc": {}}}}
    meta["plugin_files"] = copy_plugin_files(SimpleNamespace(plugin_files=(file,)), out)
    Bundle.save(out, model, tokens, meta)
    shutil.rmtree(file.parent)
    shutil.move(out, tmp_path / "moved")
    assert_same_outputs(Bundle.load(tmp_path / "moved").model, model)
    (tmp_path / "moved" / "plugin.py").unlink()
    with pytest.raises(PluginError, match=r"plugin\.py: no such plugin file"):
        _ = Bundle.load(tmp_path / "moved").model


def test_a_plugin_that_is_not_installed_is_named(saved):
    change_meta(saved.path, model={**MODEL, "name": "conformist"})
    with pytest.raises(KdrecipeError, match="unknown architecture 'conformist'"):
        _ = Bundle.load(saved.path).model


# ---------------------------------------------------------------- damage


def change_meta(path, **changes):
    meta = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps({**meta, **changes}))


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


DAMAGE = {
    "numbers": lambda data: flip(data, len(data) // 2),
    "header": lambda data: flip(data, 0),
    "directory": lambda data: flip(data, len(data) - 30),
    "cut": lambda data: data[:-100],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_told(saved, registry, damage):
    path = saved.path / "weights.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(KdrecipeError, match="the weights are damaged") as error:
        _ = Bundle.load(saved.path, registry).model
    assert error.value.problems[0].where == str(path)
    assert "--force" in error.value.problems[0].remedy


def test_missing_weights_are_told(saved, registry):
    (saved.path / "weights.pt").unlink()
    with pytest.raises(KdrecipeError, match="the weights are missing"):
        _ = Bundle.load(saved.path, registry).model


def test_weights_of_another_model_are_told(saved, registry):
    change_meta(saved.path, model={**MODEL, "num_layers": 2})
    with pytest.raises(KdrecipeError, match="do not fit the model"):
        _ = Bundle.load(saved.path, registry).model


def test_a_directory_that_is_no_bundle_is_told(tmp_path):
    with pytest.raises(KdrecipeError, match=r"no bundle\.json") as error:
        Bundle.load(tmp_path / "nothing")
    assert "exp/systems" in error.value.problems[0].remedy


def test_a_format_of_the_future_is_told(saved):
    change_meta(saved.path, format=99)
    with pytest.raises(KdrecipeError, match="bundle format 99, this version reads 1"):
        Bundle.load(saved.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_damaged_description_is_told(saved, content):
    (saved.path / "bundle.json").write_text(content)
    with pytest.raises(KdrecipeError, match=r"bundle\.json|format"):
        Bundle.load(saved.path)


def test_missing_tokens_are_told(saved, registry):
    (saved.path / "spm.model").unlink()
    with pytest.raises(KdrecipeError, match="missing file"):
        _ = Bundle.load(saved.path, registry).tokens


# ---------------------------------------------------------------- provenance


def test_provenance_names_versions_and_no_machine():
    found = provenance("kdrecipe run x", recipe="x")
    assert {"command", "date", "git", "machine", "versions", "recipe"} == set(found)
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert set(machine()) <= {"cpu", "cores", "gpu"}
    import socket

    assert socket.gethostname() not in json.dumps(found["machine"])

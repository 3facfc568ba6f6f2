"""Bundles: what is saved is loaded, whatever was done to the model, and damage is told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdrecipe.artifacts import content_digest, list_files, sha256_file, write_atomic
from kdrecipe.data.byte_bpe import ByteBpe, byte_symbols
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import KdrecipeError, PluginError
from kdrecipe.interfaces import CompressContext, Options, TargetSpec
from kdrecipe.model.asr import FeatureNorm, build_model, model_info
from kdrecipe.model.bundle import Bundle, compressor_state, count_params, machine, provenance
from kdrecipe.plugin.carried import carry, verified
from kdrecipe.plugin.loader import load_plugins
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
    "plugin_files": {},
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
    assert (bundle.name, bundle.number_formats) == ("tiny", {"fp32"})
    assert bundle.meta["params"] == sum(p.numel() for p in saved.model.parameters())
    assert bundle.meta["frame_shift_s"] == pytest.approx(0.04)
    assert bundle.info.vocab_id == tokens.vocab_id
    assert sorted(p.name for p in saved.path.iterdir()) == [
        "bundle.json", "spm.model", "tokens.txt", "weights.pt",
    ]  # fmt: skip


def test_a_bundle_may_have_another_models_tokens(registry, tmp_path):
    symbols = byte_symbols()
    content = {"symbols": symbols, "origin": list(range(256)), "end_of_text": 256, "merges": []}
    tokens = Tokenizer(ByteBpe(json.dumps(content).encode()))
    bundle = Bundle.save(tmp_path / "bundle", make_model(registry, tokens), tokens, META)
    assert [path.name for path in bundle.files] == ["bundle.json", "weights.pt", "tokens.txt", "bpe.json"]
    again = Bundle.load(bundle.path, registry)
    assert again.tokens.decode(again.tokens.encode("né")) == "né"
    assert again.info.vocab_id == tokens.vocab_id


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
                "state": compressor_state("its name", compressor),
            }
        )
    Bundle.save(tmp_path / "bundle", model, tokens, {**META, "kind": "compressed", "compression": steps})
    bundle = Bundle.load(tmp_path / "bundle", registry)
    assert_same_outputs(bundle.model, model)
    assert bundle.number_formats == {"int8" if "int8" in name else "fp32"}
    assert bundle.meta["params"] == count_params(make_model(registry, tokens))  # smaller, not fewer


class KeepRows:
    """A compressor whose structure does not follow from its options: it keeps the loudest inputs."""

    num_epochs = 0

    class Config(Options):
        """No options."""

    def __init__(self, config):
        self.rows = []

    def apply(self, model, context):
        self.rows = model.heads["ctc"].proj.weight.abs().sum(0).topk(5).indices.sort().values.tolist()
        old = model.heads["ctc"].proj
        self._cut(model, old.weight.detach()[:, self.rows])
        return model

    def _cut(self, model, weight):
        class Cut(torch.nn.Module):
            def __init__(self, rows, weight, bias):
                super().__init__()
                self.rows, self.weight, self.bias = rows, torch.nn.Parameter(weight), bias

            def forward(self, x):
                return x[..., self.rows] @ self.weight.t() + self.bias

        model.heads["ctc"].proj = Cut(self.rows, weight, model.heads["ctc"].proj.bias)

    def finish(self, model):
        return model

    def rebuild(self, model):
        self._cut(model, torch.zeros(model.heads["ctc"].proj.weight.shape[0], len(self.rows)))
        return model

    def report(self):
        return {"kept": float(len(self.rows))}

    def state(self):
        return {"rows": self.rows}

    def load_state(self, state):
        self.rows = state["rows"]


def test_the_state_of_a_compressor_comes_back(tokens, tmp_path):
    registry = load_plugins().registry
    registry.add("compressors", "keep_rows", KeepRows, "test")
    compressor = KeepRows(KeepRows.Config())
    model = compressor.apply(make_model(registry, tokens), CompressContext(lambda: [])).eval()
    state = compressor_state("keep_rows", compressor)
    step = {"name": "keep_rows", "options": {}, "report": compressor.report(), "state": state}
    Bundle.save(tmp_path / "b", model, tokens, {**META, "kind": "compressed", "compression": [step]})
    bundle = Bundle.load(tmp_path / "b", registry)
    assert_same_outputs(bundle.model, model)
    assert bundle.meta["compression"][0]["state"] == {"rows": compressor.rows}
    compressor.rows = [torch.tensor(1)]
    with pytest.raises(PluginError, match=r"keep_rows.*JSON"):
        compressor_state("keep_rows", compressor)


def test_the_number_format_is_that_of_the_weights_whatever_the_step_is_called(registry, tokens, tmp_path):
    model = make_model(registry, tokens)
    named_int8 = [{"name": "int8_in_name_only", "options": {}, "report": {}, "state": {}}]
    named = Bundle.save(tmp_path / "named", model, tokens, {**META, "compression": named_int8})
    assert named.number_formats == {"fp32"}
    model = Int8Dynamic(Int8Dynamic.Config()).apply(model, CompressContext(lambda: []))
    other = [{"name": "quantise_my_way", "options": {}, "report": {}, "state": {}}]
    quantised = Bundle.save(tmp_path / "int8", model, tokens, {**META, "compression": other})
    assert quantised.number_formats == {"int8"}


def test_a_bundle_has_a_frame_shift_for_each_tap_and_head(saved, registry):
    bundle = Bundle.load(saved.path, registry)
    assert bundle.meta["frame_shifts_s"] == {
        "heads": {"ctc": 0.04},
        "taps": dict.fromkeys(["front", "encoder.0", *(f"encoder.0.{x}" for x in "qkv")], 0.04),
    }  # fmt: skip
    assert bundle.head_shift_s("ctc") == 0.04


def test_taps_and_heads_may_have_frames_of_their_own(registry, tokens):
    model = make_model(registry, tokens)
    declared = model.encoder.taps()
    model.encoder.taps = lambda: declared | {"front": declared["front"]._replace(subsampling=2)}
    model.heads["ctc"].subsampling = 2
    info = model_info(model, tokens.vocab_id)
    offered = {spec.key: spec for spec in info.provides()}
    assert offered["hidden:front"].frame_shift_s == 0.02
    assert offered["hidden:encoder.0"].frame_shift_s == 0.04
    assert offered["frame_logits:ctc"].frame_shift_s == 0.08
    plain = model_info(make_model(registry, tokens), tokens.vocab_id)
    for key in ("hidden:front", "frame_logits:ctc"):
        kind, tap = key.split(":")
        assert "frame_shift_s" in plain.pinned(TargetSpec(kind, tap)).mismatch(offered[key])
    assert info.pinned(TargetSpec("frame_logits")).mismatch(offered["frame_logits:ctc"]) is None


# ---------------------------------------------------------------- plugins of its own


OWN_MODEL = {"name": "own_encoder", "heads": {"ctc": {}}}


@pytest.fixture
def own(tokens, tmp_path):
    """A bundle whose encoder is in a plugin file of its recipe, which is gone."""
    file = tmp_path / "recipe" / "plugin.py"
    file.parent.mkdir()
    file.write_text(PLUGIN)
    model = make_model(load_plugins([file]).registry, tokens, OWN_MODEL)
    out = tmp_path / "bundle"
    Bundle.save(out, model, tokens, {**META, "model": OWN_MODEL, "plugin_files": carry([file], out)})
    shutil.rmtree(file.parent)
    shutil.move(out, tmp_path / "moved")
    return SimpleNamespace(path=tmp_path / "moved", model=model)


def test_a_local_plugin_travels_with_the_bundle(own):
    assert_same_outputs(Bundle.load(own.path, trust_plugins=True).model, own.model)
    (own.path / "plugin.py").unlink()
    with pytest.raises(PluginError, match=r"plugin\.py: no such plugin file"):
        _ = Bundle.load(own.path, trust_plugins=True).model


def test_its_code_does_not_run_unasked(own):
    with pytest.raises(PluginError, match=r"brings code of its own.*plugin\.py") as error:
        _ = Bundle.load(own.path).model
    assert "--trust-plugins" in error.value.problems[0].remedy


def evil(tmp_path):
    """Code that leaves a trace where it runs."""
    return f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('')\n"


def test_a_plugin_file_that_was_changed_never_runs(own, tmp_path):
    with open(own.path / "plugin.py", "a") as file:
        file.write(evil(tmp_path))
    with pytest.raises(PluginError, match="changed after the bundle was made"):
        _ = Bundle.load(own.path, trust_plugins=True).model
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize(
    "name", ["../evil.py", "/tmp/evil.py", "a/evil.py", "..", "evil", "evil.so", ".evil.py", "a\\evil.py", 3]
)
def test_only_files_of_its_own_can_be_listed(saved, tmp_path, name, trust):
    (tmp_path / "evil.py").write_text(evil(tmp_path))
    digest = hashlib.sha256((tmp_path / "evil.py").read_bytes()).hexdigest()
    for listed in ({name: digest}, [name], {"evil.py": None}, {"evil.py": "x"}, "evil.py"):
        change_meta(saved.path, plugin_files=listed)
        with pytest.raises(KdrecipeError, match=r"not the plain name of a \.py file"):
            _ = Bundle.load(saved.path, trust_plugins=trust).model
    assert not (tmp_path / "ran").exists()


def test_files_of_one_name_do_not_overwrite_each_other(tmp_path):
    for folder, text in (("a", "x = 1\n"), ("b", "x = 2\n"), ("c", "x = 1\n")):
        write_atomic(tmp_path / folder / "plugin.py", text)
    recorded = carry([tmp_path / f / "plugin.py" for f in "abc"], tmp_path / "out")
    assert len(recorded) == 2
    assert {(tmp_path / "out" / name).read_text() for name in recorded} == {"x = 1\n", "x = 2\n"}
    assert {path.name: digest for path, digest in verified(tmp_path / "out", recorded).items()} == recorded


def test_weights_that_would_run_code_are_refused(saved, registry, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "ran", "")

    torch.save({"x": Evil()}, saved.path / "weights.pt")
    change_meta(saved.path, weights_sha256=sha256_file(saved.path / "weights.pt"))
    with pytest.raises(KdrecipeError, match="do not fit the model"):
        _ = Bundle.load(saved.path, registry).model
    assert not (tmp_path / "ran").exists()


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


@pytest.mark.parametrize("version", [1, 99, "2", None])
def test_another_format_is_told(saved, version):
    change_meta(saved.path, format=version)
    with pytest.raises(KdrecipeError, match=f"bundle format {version}; this version reads format 2") as error:
        Bundle.load(saved.path)
    assert "make the bundle again with this version" in error.value.problems[0].remedy


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
    assert {"command", "core", "date", "git", "machine", "versions", "recipe"} == set(found)
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert set(machine()) <= {"cpu", "cores", "gpu"}
    import socket

    assert socket.gethostname() not in json.dumps(found["machine"])

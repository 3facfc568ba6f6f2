"""Exports for ExecuTorch and TensorRT: held to parity where they can run, one clear error where not."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import soundfile

from kdrecipe.cli.bench import bench
from kdrecipe.cli.main import main
from kdrecipe.cli.models import exporter_of
from kdrecipe.cli.transcribe import transcribe
from kdrecipe.errors import KdrecipeError, MissingExtra
from kdrecipe.measure.parity import check_parity
from kdrecipe_plugins.exporters import tensorrt_ctc
from kdrecipe_plugins.exporters.executorch_ctc import ExecuTorch
from kdrecipe_plugins.exporters.tensorrt_ctc import TensorRt

HAS_EXECUTORCH = importlib.util.find_spec("executorch") is not None
needs_executorch = pytest.mark.skipif(not HAS_EXECUTORCH, reason="needs executorch: tests/executorch.sh")


@pytest.fixture(scope="module")
def programs(trained, tmp_path_factory):
    """``.pte`` files of the float bundle."""
    directory = tmp_path_factory.mktemp("pte")
    exporter = ExecuTorch(ExecuTorch.Config())
    return directory, exporter.export(trained.bundle, directory)


@needs_executorch
def test_executorch_passes_the_parity_gate(programs, trained):
    directory, shipped = programs
    assert shipped == {"fp32": ["model.pte", "tokens.txt"], "int8": ["model.int8.pte", "tokens.txt"]}
    exporter = ExecuTorch(ExecuTorch.Config())
    found = check_parity(trained.bundle, exporter, directory, trained.utterances)
    assert found["fp32"]["max_log_prob_diff"] < 1e-3
    assert 0 < found["int8"]["kl"] < 0.02
    sizes = {name: (directory / name).stat().st_size for name in ("model.pte", "model.int8.pte")}
    assert sizes["model.int8.pte"] < sizes["model.pte"] / 1.8


@needs_executorch
def test_executorch_is_measured_and_transcribes(programs, trained, tmp_path):
    directory, _ = programs
    soundfile.write(tmp_path / "a.wav", trained.utterances[0].samples_S, 16000)
    rows = {row["variant"]: row for row in bench(directory, [tmp_path / "a.wav"])}
    assert set(rows) == {"fp32", "int8"}
    assert rows["fp32"]["runtime"].startswith("executorch")
    assert rows["fp32"]["rtf_median"] > 0
    (found,) = transcribe(directory / "model.pte", [tmp_path / "a.wav"])
    (expected,) = transcribe(trained.bundle.path, [tmp_path / "a.wav"])
    assert found.text == expected.text != ""
    assert found.times_s == pytest.approx(expected.times_s)


@needs_executorch
def test_a_damaged_program_is_one_error(programs, tmp_path, capsys):
    directory, _ = programs
    shutil.copytree(directory, tmp_path / "broken")
    (tmp_path / "broken" / "model.pte").write_bytes(b"no program")
    with pytest.raises(KdrecipeError, match="ExecuTorch can't load the model"):
        ExecuTorch(ExecuTorch.Config()).load(tmp_path / "broken", "fp32")


@pytest.mark.skipif(HAS_EXECUTORCH, reason="executorch is installed")
def test_without_executorch_the_error_says_how_to_get_it(trained, tmp_path, capsys):
    with pytest.raises(MissingExtra, match=r"needs the package 'executorch'(.|\n)*pip install"):
        ExecuTorch(ExecuTorch.Config()).export(trained.bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "model.pte").write_bytes(b"")
    shutil.copyfile(trained.bundle.path / "tokens.txt", tmp_path / "tokens.txt")
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    assert main(["transcribe", str(tmp_path), str(tmp_path / "a.wav")]) == 2
    said = capsys.readouterr().err
    assert "pip install" in said
    assert "Traceback" not in said


@pytest.mark.skipif(HAS_EXECUTORCH, reason="executorch is installed")
def test_a_recipe_that_needs_it_is_refused_before_any_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(
        "corpus: {name: manifests, root: '${DATA}'}\ntokens: {name: char}\n"
        "export:\n  - {name: onnx_ctc}\n  - {name: executorch}\n"
        "systems:\n  a: {train: {model: {name: conformer, heads: {ctc: {}}}}}\n"
    )
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "recipe.yaml:5: the exporter executorch needs the package" in said
    assert "pip install" in said


def test_recipes_exporters_are_measured_before_others(trained):
    assert type(exporter_of(trained.bundle)).__name__ == "OnnxCtc"


# ---------------------------------------------------------------- TensorRT


def test_without_tensorrt_the_model_and_the_command_are_there(trained, tmp_path):
    exporter = TensorRt(TensorRt.Config(longest_s=20))
    shipped = exporter.export(trained.bundle, tmp_path)
    assert shipped == {"fp32": ["model.trt.onnx", "tokens.txt", "build_engine.sh"]}
    assert (tmp_path / "build_engine.sh").read_text().splitlines()[-1] == (
        "trtexec --onnx=model.trt.onnx --saveEngine=model.engine --noTF32 --minShapes=x:1x16x80,x_lens:1 "
        "--optShapes=x:1x1000x80,x_lens:1 --maxShapes=x:1x2000x80,x_lens:1"
    )
    model = onnx.load(tmp_path / "model.trt.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 0, 80]
    ranked = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output if name} <= ranked
    found = check_parity(trained.bundle, exporter, tmp_path, trained.utterances[:4], variants=["fp32"])
    assert found["fp32"]["max_log_prob_diff"] < 1e-3
    (tmp_path / "model.engine").write_bytes(b"")
    with pytest.raises(MissingExtra, match="pip install tensorrt"):
        exporter.load(tmp_path, "engine")


class FakeTensorRt:
    """The calls of TensorRT's Python package that build an engine, noted."""

    def __init__(self, accepts=True):
        self.accepts, self.shapes = accepts, {}
        self.Logger = lambda level: level
        self.Logger.ERROR = 0
        self.BuilderFlag = type("BuilderFlag", (), {"TF32": "tf32"})
        self.Builder = lambda logger: self
        self.OnnxParser = lambda network, logger: self

    def create_network(self, flags):
        return self

    create_builder_config = create_optimization_profile = lambda self: self

    def parse(self, content):
        onnx.checker.check_model(onnx.load_from_string(content))
        return self.accepts

    def get_error(self, number):
        return "no such layer"

    def clear_flag(self, flag):
        assert flag == "tf32"

    def set_shape(self, name, *shapes):
        self.shapes[name] = shapes

    def add_optimization_profile(self, profile):
        pass

    def build_serialized_network(self, network, config):
        return memoryview(b"engine")


def test_an_engine_is_built_where_tensorrt_and_a_gpu_are(trained, tmp_path, monkeypatch):
    fake = FakeTensorRt()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt_ctc, "is_here", lambda: True)
    shipped = TensorRt(TensorRt.Config()).export(trained.bundle, tmp_path)
    assert shipped["engine"] == ["model.engine", "tokens.txt"]
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    assert fake.shapes == {"x": ((1, 16, 80), (1, 1000, 80), (1, 4100, 80)), "x_lens": ((1,), (1,), (1,))}
    assert json.loads((tmp_path / "features.json").read_text())["frame_shift_s"] == 0.04
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(accepts=False))
    with pytest.raises(KdrecipeError, match="refuses the model: no such layer"):
        TensorRt(TensorRt.Config()).export(trained.bundle, tmp_path / "refused")
    assert not (tmp_path / "refused" / "model.engine").exists()

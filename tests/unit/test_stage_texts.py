"""Stage 2 says what tokens and runtimes will make of the corpus's texts, before any training."""

from __future__ import annotations

import gzip
import io
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError
from kdrecipe.recipe.load import load_recipe
from kdrecipe.recipe.sections import Named
from kdrecipe.stages import rows, score, texts
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.lm import sentences
from kdrecipe.stages.plan import build_plan
from kdrecipe.testing.corpus import make_corpus

RECIPE = """
corpus: {name: manifests, root: corpus}
tokens: {name: char}
systems:
  kd: {train: {model: {name: conformer, num_layers: 1, dim: 16, num_heads: 2, heads: {HEADS}}}}
"""
PLAIN = {"train": ["RED SUN", "DOG'S TEA - 'EM"], "dev": ["RED TEA"], "test": ["SUN"]}


def work(tmp_path: Path, spoken: dict[str, list[str]], heads: str = "ctc: {}", *overrides: str):
    """A recipe, and its work directory with manifests and tokens of these texts."""
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(RECIPE).replace("HEADS", heads), encoding="utf-8")
    if not (tmp_path / "corpus").exists():
        make_corpus(tmp_path / "corpus", num_speakers=3, utterances_per_speaker=1)
    recipe, layout = load_recipe(tmp_path, overrides=overrides), Layout(tmp_path / "exp")
    layout.manifests.mkdir(parents=True, exist_ok=True)
    for split, listed in spoken.items():
        rows = [
            {
                "id": f"{split}{i}",
                "recording_id": "r",
                "start": 0.0,
                "duration": 1.0,
                "channel": 0,
                "text": text,
            }
            for i, text in enumerate(listed)
        ]
        file = layout.manifests / f"{split}_supervisions.jsonl.gz"
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    Tokenizer.train(spoken["train"], "char", None, layout.tokens)
    layout.texts.mkdir(exist_ok=True)
    return recipe, layout


def notes_of(tmp_path: Path, spoken: dict[str, list[str]], *more: str) -> list[str]:
    recipe, layout = work(tmp_path, spoken, *more)
    texts.run(recipe, layout, layout.texts)
    return read_json(layout.texts / "texts.json")["notes"]


def test_nothing_is_said_of_texts_that_come_out_as_they_are(tmp_path, capsys):
    assert notes_of(tmp_path, PLAIN) == []
    assert capsys.readouterr().out == ""


def test_characters_without_a_token_are_counted_by_split(tmp_path, capsys):
    spoken = {**PLAIN, "dev": ["RED Ü", "TEA", "½"], "test": ["SÜN", "SUN", "RED ß Ü ÜÜ"]}
    (note,) = notes_of(tmp_path, spoken)  # dev is not scored
    assert note == (
        "2 of 3 test transcripts are not what the tokens can spell (Ü (U+00DC) 4, ß (U+00DF) 1): "
        "'SÜN' becomes 'S<unk>N'"
    )
    assert "2 of 3 dev transcripts are not" in capsys.readouterr().out


def test_a_pretrained_tokeniser_that_rewrites_is_found_out(tmp_path):
    """SentencePiece's own default, NFKC, with the recipe's tokens."""
    spoken = {"train": ["ABC 1 No"], "dev": ["ABC"], "test": ["ＡＢＣ", "ABC", "№ 1"]}
    bundle = tmp_path / "big"
    bundle.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(spoken["train"]), model_writer=model, model_type="char", vocab_size=30,
        hard_vocab_limit=False, user_defined_symbols=["<blk>", "<sos/eos>"], unk_id=2, bos_id=-1, eos_id=-1,
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    Tokenizer(model.getvalue()).save(bundle)
    described = {"name": "conformer", "num_layers": 1, "dim": 16, "num_heads": 2, "heads": {"ctc": {}}}
    features = {"name": "fbank", "num_mel_bins": 80}
    write_json(bundle / "bundle.json", {"format": 2, "model": described, "features": features})
    own, big = notes_of(tmp_path, spoken, "ctc: {}", "systems.big={pretrained: {bundle: big}}")
    assert own.startswith("2 of 3 test transcripts are not what the tokens can spell (")
    assert big.startswith("2 of 3 test transcripts are not what the tokens of big can spell (")
    assert big.endswith("'№ 1' becomes 'No 1'") or big.endswith("'ＡＢＣ' becomes 'ABC'")


def test_a_pretrained_token_that_its_runtime_leaves_out_stops_before_training(tmp_path):
    recipe, _ = work(tmp_path, PLAIN)
    pieces = ["<blk>", "<sos/eos>", "<unk>", "▁FOS", "SIL"]
    said = {"FOSSIL": [3, 4]}

    def decode(ids):
        return "".join(pieces[i] for i in ids).replace("▁", " ").strip()

    elsewhere = SimpleNamespace(pieces=pieces, encode=said.get, decode=decode)
    note, problem = texts._rewritten(recipe, "onnx_ctc", elsewhere, {"test": ["FOSSIL"]})
    assert "('FOSSIL' (tokens ▁FOS SIL) becomes 'FOS'; it leaves out SIL)" in note
    assert "at most 0.00% allowed (parity.max_rewritten)" in problem.what


def test_what_a_runtime_rewrites_stops_before_training(tmp_path):
    spoken = {**PLAIN, "dev": ["RED 'EM", "RED TEA"], "test": ["TEA - 'EM SUN"]}
    assert notes_of(tmp_path, spoken) == []  # CTC keeps it
    recipe, layout = work(tmp_path, spoken, "ctc: {}, rnnt: {}")
    with pytest.raises(DataError) as caught:
        texts.run(recipe, layout, layout.texts)
    (problem,) = caught.value.problems
    assert problem.where == "export, onnx_transducer"
    assert 'sherpa-onnx writes 2 of 3 texts otherwise than the tokens spell ("RED \'EM"' in problem.what
    assert "(parity.max_rewritten)" in problem.what
    limit = problem.remedy.split("max_rewritten to ")[1].split(",")[0]
    (note,) = notes_of(tmp_path, spoken, "ctc: {}, rnnt: {}", f"parity.max_rewritten={limit}")
    assert note.startswith("onnx_transducer, transcripts of dev and test: sherpa-onnx writes 2 of 3 texts")


def test_the_report_waits_for_the_job_and_the_tokens_do_not(tmp_path):
    recipe, layout = work(tmp_path, PLAIN)
    jobs = build_plan(recipe, layout).jobs
    assert "texts" in jobs["report"].needs
    assert jobs["texts"].stage == jobs["tokens"].stage == 2
    other = load_recipe(tmp_path, overrides=["parity.max_rewritten=0.1"])
    again = build_plan(other, layout).jobs
    assert again["texts"].inputs != jobs["texts"].inputs
    assert again["tokens"].inputs == jobs["tokens"].inputs


def test_a_row_that_counts_rewritten_texts_says_so(tmp_path):
    recipe, layout = work(tmp_path, PLAIN, "rnnt: {}, ctc: {}")
    tokens = Tokenizer.load(layout.tokens)
    bundle = SimpleNamespace(tokens=tokens, meta={"model": {"heads": {"rnnt": {}, "ctc": {}}}})

    def line(number: int, spelled: str, written: str):
        ids = tokens.encode(spelled)
        names = [tokens.pieces[i].replace("▁", " ") for i in ids]
        return (
            {"id": str(number), "hyp": written, "tokens": names},
            {"id": str(number), "hyp": spelled, "tokens": ids},
        )

    said = [line(0, "TEA 'EM", "TEA'EM"), line(1, "RED SUN", "RED SUN"), line(2, "DOG'S", "DOG'S")]
    shipped, of_bundle = ({"test": list(rows)} for rows in zip(*said, strict=True))
    found = rows.rewritten(recipe, bundle, Named("rnnt_greedy"), shipped, of_bundle)
    assert found["test"].startswith(
        'sherpa-onnx writes 1 of 3 texts otherwise than the tokens spell ("TEA \'EM"'
    )
    assert found["test"].endswith("on test, 40.00% of words")
    write_json(layout.hyps("kd", 1) / "decode.json", {"rewritten": found})
    assert list(score._rewritten(recipe, layout)) == [
        ("test", f"kd: {found['test']}; its row counts what the runtime writes")
    ]
    write_json(layout.hyps("kd", 1) / "decode.json", {"rewritten": {}})
    assert list(score._rewritten(recipe, layout)) == []


def test_a_text_file_is_a_sentence_per_line_by_the_same_rule(tmp_path):
    (tmp_path / "lm.txt").write_bytes("\ufeffRED\u2028SUN\n\u3000\nCAFE\u0301\u0085TEA\r\n".encode())
    recipe, layout = work(tmp_path, PLAIN, "ctc: {}", "lm={text: lm.txt}")
    assert sentences(recipe, layout) == ["RED SUN", "CAFÉ TEA"]

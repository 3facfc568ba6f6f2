"""Recipes whose tokens are a Whisper's: students of its posteriors, its decoder, its hypotheses alone."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from runs import kdrecipe, write_recipe

from kdrecipe.artifacts import read_json
from kdrecipe.data.byte_bpe import Merges, words
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import RecipeError
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.targets.cache import OWN, text_key
from kdrecipe.targets.shards import Shards
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.testing.pretrained import WHISPER_WINDOW_S, save_whisper

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (it needs 3.11)"
)

MERGES = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("b", "l"), ("Ġ", "bl"), ("z", "q")]

RECIPE = """
corpus:
  name: manifests
  root: "${CORPUS_ROOT}"
  case: lower
  splits: {train: train, test: test}  # a dev would mean a baseline to judge the teacher by
  subsets: {few: {utterances: 3}, rest: {except: few}}
features: {name: fbank, num_mel_bins: 80}
tokens: {name: from_teacher, teacher: whisper}
training: {epochs: 1, precision: fp32, batch_duration_s: 10}
targets: {top_k: 4}
systems:
  whisper: {pretrained: {name: whisper, path: whisper, text: {punctuation: keep}}}
  cut:
    train:
      data: few
      model: &cut
        {name: whisper_encoder, num_layers: 1, dim: 16, num_heads: 2, ff_dim: 32, num_mels: 16,
         heads: {attention: {num_layers: 1, num_heads: 2, ff_dim: 32, activation: gelu, positions: learned,
         max_positions: 80, tied: true}, ctc: {rank: 4}}}
      init_from: {system: whisper, layers: {encoder: [1], attention: [0]}}
      losses: [{name: attention}, {name: ctc}]
  kd: # other utterances along the teacher's own words
    distill:
      data: few
      unlabelled: rest
      teachers: [whisper]
      model: *cut
      losses:
        - {name: attention}
        - {name: kl, head: attention}
        - {name: mvq, layer: encoder.1, num_codebooks: 2, align: stride} # codebooks are of the same teacher
  pseudo: # other utterances along its hypotheses, where they are kept
    distill:
      data: few
      unlabelled: {subset: rest, labels: whisper, keep: &keep {chars_per_s: [0, 17.5], max_repetition: null,
        min_avg_log_prob: null, max_compression_ratio: null, max_no_speech_prob: null, digits: false}}
      teachers: [whisper]
      model: *cut
      losses: [{name: attention}, {name: kl, head: attention}]
decode: {splits: [test], measure_max: 2, robustness: 0, decoders: {greedy: {name: attention_greedy}}}
export: [{name: onnx_attention}]
parity:
  {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100, max_token_error: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Corpus and recipe."""
    directory = tmp_path_factory.mktemp("trimmed")
    make_corpus(directory / "corpus", num_speakers=4, utterances_per_speaker=4)
    recipe = write_recipe(directory / "one", RECIPE)
    save_whisper(recipe / "whisper", merges=MERGES, config={"max_target_positions": 80})
    return directory


@pytest.fixture(scope="module")
def site(place) -> Path:
    """The recipe's work directory after a whole run."""
    done = run(place, "work")
    assert done.status == 0, done.said
    return place / "work"


def run(place: Path, work: str, *more: str):
    command = ("run", place / "one", "--work", place / work, "--jobs", "1", *more)
    return kdrecipe(*command, CORPUS_ROOT=place / "corpus")


def transcripts(work: Path, split: str = "train") -> dict[str, str]:
    content = gzip.decompress((work / "manifests" / f"{split}_supervisions.jsonl.gz").read_bytes())
    return {row["id"]: row["text"] for row in map(json.loads, content.decode().splitlines())}


def few(work: Path) -> set[str]:
    return set(read_json(work / "features" / "subsets.json")["few"])


def test_tokens_are_the_teachers_that_the_labelled_text_uses(site):
    tokens, texts = Tokenizer.load(site / "tokens"), transcripts(site)
    seen = {
        symbol
        for cut in few(site)
        for word in words(" " + texts[cut])
        for symbol in Merges(MERGES).symbols(word)
    }
    named = {s.replace("Ġ", "▁") for s in seen if len(s) > 1}
    assert set(tokens.pieces[259:]) == named
    assert named
    assert all(text == text.lower() and tokens.decode(tokens.encode(text)) == text for text in texts.values())
    report = (site / "report" / "RESULTS.md").read_text()
    assert "the tokens are those of whisper that are used in the transcripts of the subset few" in report
    assert "all transcripts in lower case" in report


def test_cached_posteriors_are_over_these_tokens_along_what_each_student_hears(site):
    tokens, cache = Tokenizer.load(site / "tokens"), Shards(site / "targets" / "whisper" / "seed1")
    key = read_json(site / "targets" / "whisper" / "seed1" / "key.json")
    assert key["parts"]["tokens"] == tokens.vocab_id
    labels = {row["id"]: row["transcript"] for row in hypotheses(site)}
    durations = {row["id"]: row["duration_s"] for row in hypotheses(site)}
    kept = read_json(site / "systems" / "pseudo" / "seed1" / "bundle.json")["labels"]
    assert 0 < kept["kept"] < len(labels)
    texts, along_label = transcripts(site), 0
    for cut, text in texts.items():
        is_few = cut in few(site)
        wanted = text_key(tokens.encode(text if is_few else labels[cut]))
        own = cache.arrays(cut, f"tokens@{OWN}/")
        assert bool(own) == (not is_few), "kd hears the rest along the teacher's own words"
        said = cache.arrays(cut, f"token_logits:attention@{wanted}/")
        along_label += bool(said) and not is_few
        if is_few:
            assert said["log_probs"].shape == (len(tokens.encode(text)) + 1, 4)
            mass = torch.tensor(said["log_probs"]).float().exp().sum(-1)
            mass += torch.tensor(said["log_tail"]).float().exp()
            torch.testing.assert_close(mass, torch.ones(len(mass)), atol=5e-3, rtol=0)
            assert int(said["indices"].max()) < len(tokens)
        elif durations[cut] < WHISPER_WINDOW_S:  # its own words as transcripts are written: its hypothesis
            assert [int(t) for t in own["tokens"]] == tokens.encode(labels[cut])[:78]
    assert along_label == kept["kept"]


def hypotheses(site: Path) -> list[dict]:
    lines = (site / "said" / "whisper" / "seed1" / "hypotheses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_student_starts_with_the_rows_of_its_tokens(site, place):
    """Before training, the rows of its tokens are those of Whisper's embedding."""
    from safetensors.torch import load_file

    from kdrecipe.stages import train
    from kdrecipe.stages.layout import Layout
    from kdrecipe.stages.session import Session

    recipe, layout = load_recipe(place / "one"), Layout(site)
    session = Session(recipe, layout, recipe.systems["cut"], 1)
    model = session.new_model()
    train._start(session, model, train.lender(recipe, layout, "whisper", 1))
    theirs = load_file(place / "one" / "whisper" / "model.safetensors")["model.decoder.embed_tokens.weight"]
    head, origin = model.heads["attention"], session.tokens.origin
    ids = [i for i in range(3, len(session.tokens))]
    assert torch.equal(head.embedding.weight[ids], theirs[[origin[i] for i in ids]])
    assert torch.equal(head.end_D, theirs[origin[1]])
    assert torch.equal(
        head.layers[0].q.weight,
        load_file(place / "one" / "whisper" / "model.safetensors")[
            "model.decoder.layers.0.encoder_attn.q_proj.weight"
        ],
    )


def test_it_learns_and_ships(site):
    rows = {row["name"]: row for row in read_json(site / "report" / "results.json")["systems"]}
    for name in ("cut", "kd", "pseudo"):
        assert rows[name]["runtime"].startswith("onnxruntime"), name
        bundle = Bundle.load(site / "systems" / name / "seed1", load_plugins().registry)
        assert bundle.tokens.vocab_id == Tokenizer.load(site / "tokens").vocab_id
    assert len(bundle.model.heads["ctc"].narrow.weight) == 4
    log = (site / "systems" / "kd" / "seed1" / "train" / "log.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, log) if row["event"] == "step"]
    assert all(row["terms"]["kl"] > 0 for row in steps)


def test_live_targets_do_too(site, place):
    done = run(place, "work", "--set", "targets.mode=live", "--stage", "5", "--stop-stage", "5")
    assert done.status == 0, done.said
    assert {"kd/seed1", "pseudo/seed1"} <= set(done.ran)


# ---------------------------------------------------------------- no transcript at all

SILENT = (
    RECIPE.partition("  cut:\n")[0]
    + """
  pseudo:
    distill:
      data: none
      unlabelled: {subset: all, labels: whisper, keep: {chars_per_s: [0, 17.5], max_repetition: null,
        min_avg_log_prob: null, max_compression_ratio: null, max_no_speech_prob: null, digits: false}}
      teachers: [whisper]
      model: {name: conformer, num_layers: 1, dim: 16, heads: {attention: {num_layers: 1}, ctc: {}}}
      losses: [{name: attention}, {name: ctc}, {name: kl, head: attention}]
lm: {name: ngram, order: 2, word_order: 2}
export: [{name: onnx_attention}]
decode: {splits: [test], measure_max: 2, robustness: 0, decoders: {greedy: {name: attention_greedy}}}
parity:
  {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100, max_token_error: 1}
"""
)


@pytest.fixture(scope="module")
def silent(place) -> Path:
    """The same corpus without a single training transcript, and a recipe that needs none, after a run."""
    text = SILENT.replace("  subsets: {few: {utterances: 3}, rest: {except: few}}\n", "")
    text = text.replace("splits: {train: train, test: test}", "splits: {train: train, dev: dev, test: test}")
    recipe = write_recipe(place / "silent", text.replace("path: whisper", "path: ../one/whisper"))
    name = "train_supervisions.jsonl.gz"
    corpus = place / "unheard"
    corpus.mkdir()
    for path in (place / "corpus").iterdir():
        if path.name != name:
            (corpus / path.name).symlink_to(path)
    rows = map(json.loads, gzip.decompress((place / "corpus" / name).read_bytes()).decode().splitlines())
    lines = [json.dumps({**row, "text": ""}) for row in rows]
    (corpus / name).write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    done = kdrecipe("run", recipe, "--work", place / "w", "--jobs", "1", CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    assert done.ran.index("hypotheses/whisper/seed1") < done.ran.index("tokens") < done.ran.index("lm")
    return place / "w"


def test_without_transcripts_all_is_learnt_from_hypotheses(silent):
    assert not any(transcripts(silent).values())
    rows = hypotheses(silent)
    facts = read_json(silent / "systems" / "pseudo" / "seed1" / "bundle.json")["labels"]
    assert 0 < facts["kept"] < len(rows)
    lm = read_json(silent / "lm" / "lm.json")
    assert lm["sentences"] == facts["kept"]
    tokens = Tokenizer.load(silent / "tokens")
    assert len(tokens) >= 259
    form = read_json(silent / "said" / "whisper" / "seed1" / "form.json")
    assert form["case"] == "lower", "as dev is written"
    report = (silent / "report" / "RESULTS.md").read_text()
    assert "the tokens are those of whisper that are used in hypotheses of whisper" in report
    assert "the language model is learnt from hypotheses of whisper" in report


# ---------------------------------------------------------------- mistakes

BUNDLE = "  old: {pretrained: {bundle: old}}\n  cut:"


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        (("teacher: whisper}", "teacher: wisper}"), "tokens.teacher: 'wisper' is no system", "'whisper'"),
        (
            ("teacher: whisper}", "teacher: cut}"),
            "'cut' is no imported teacher",
            "pretrained: {name: whisper",
        ),
        ((", teacher: whisper}", "}"), "from_teacher needs a teacher", ""),
        (("teacher: whisper}", "teacher: whisper, vocab_size: 9}"), "whatever their number", ""),
        (("teacher: whisper}", "teacher: whisper, keep: all}"), "tokens.keep: is 'all'", ""),
        (
            ("{name: from_teacher, teacher: whisper}", "{name: char, data: few, teacher: whisper}"),
            "teacher: of from_teacher only",
            "",
        ),
        (
            ("{name: from_teacher, teacher: whisper}", "{name: bpe, vocab_size: 30, data: few}"),
            "'whisper' has byte-level BPE of its own, the recipe bpe",
            "tokens: {name: from_teacher, teacher: whisper}",
        ),
        (
            ("head: attention}", "head: ctc}"),
            "'kl' needs frame_logits:ctc, the teacher 'whisper' lacks it",
            "",
        ),
        (
            ("  cut:", "  deaf: {pretrained: {name: hf_encoder, path: wav2vec2}}\n  cut:"),
            "'deaf' has no tokens that can be taken",
            "whisper with tokenizer.json",
        ),
        (
            ("teacher: whisper}", "teacher: whisper, data: few, labels: whisper}"),
            "give one of them",
            "",
        ),
    ],
)
def test_mistakes_are_found_by_check(place, tmp_path, change, what, remedy):
    text = RECIPE.replace(*change)
    assert text != RECIPE
    if "deaf" in text:
        from kdrecipe.testing.pretrained import save_wav2vec2

        save_wav2vec2(tmp_path / "one" / "wav2vec2", ctc=False)
        text = text.replace("teacher: whisper}", "teacher: deaf}")
    recipe = write_recipe(
        tmp_path / "one", text.replace("path: whisper", f"path: {place / 'one' / 'whisper'}")
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    problem = next(p for p in caught.value.problems if what in p.what)
    assert remedy in problem.remedy
    assert "recipe.yaml:" in problem.where

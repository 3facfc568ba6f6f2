"""A recipe with several searches, through the real command line: what lies where, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import ONE, kdrecipe, write_recipe

from kdrecipe.testing.corpus import make_corpus

SEARCHES = """decode:
  splits: [test]
  measure_max: 2
  decoders: {beam: {name: ctc_prefix_beam, beam: 2}, greedy: {name: ctc_greedy}}
claims: [{text: none at all, system: scratch, figure: wer, value: 0}]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Work directory of a run."""
    directory = tmp_path_factory.mktemp("searches")
    corpus = make_corpus(directory / "corpus", num_speakers=4, utterances_per_speaker=4)
    recipe = write_recipe(
        directory / "one", ONE.replace("decode: {splits: [test], measure_max: 2}\n", SEARCHES)
    )
    done = kdrecipe("run", recipe, "--work", directory / "work", "--jobs", "1", CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    assert "## Claims beside what was measured" in done.out
    first, *_, closing = done.out.split("\n\n")
    assert first.startswith("9 jobs to run (prepare 1, features 1, tokens 2, distill 1, export 1, decode 1")
    assert "how long they take is not known: training will tell" in first
    assert closing.splitlines()[0] == f"report: {directory / 'work' / 'report' / 'report.html'}"
    return directory / "work"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_search_leaves_its_hypotheses_and_its_time(work):
    hyps = work / "hyps" / "scratch" / "seed1"
    main, other = (rows(hyps / "bundle" / label / "test.jsonl") for label in ("beam", "greedy"))
    assert rows(hyps / "test.jsonl") == main, "sherpa-onnx has no such search: the row is the bundle's"
    assert [row["id"] for row in main] == [row["id"] for row in other]
    assert [row["score"] for row in main] != [row["score"] for row in other]
    facts = json.loads((hyps / "decode.json").read_text())
    assert list(facts["searches"]) == ["beam", "greedy"]
    assert facts["searches"]["beam"]["options"]["beam"] == 2
    assert all(search["rtf"] > 0 and not search["lm"] for search in facts["searches"].values())
    assert facts["search"]["label"] == "beam"
    assert facts["rtf"] is None, "the greedy search's time is not the beam's"


def test_the_report_shows_them_beside_each_other(work):
    results = json.loads((work / "report" / "results.json").read_text())
    beam, greedy = results["searches"]
    assert (beam["search"], greedy["search"]) == ("beam", "greedy")
    assert beam["splits"]["test"]["wer"] == results["systems"][0]["splits"]["test"]["wer"]
    assert [(c["a"], c["b"]) for c in greedy["comparisons"]] == [("greedy", "beam")]
    assert results["claims"][0]["measured"] is not None
    assert "## Searches on test, bundles in torch" in (work / "report" / "RESULTS.md").read_text()
    assert "Searches on test, bundles in torch</h2>" in (work / "report" / "report.html").read_text()

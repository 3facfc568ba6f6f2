"""LibriSpeech's own layout: the 5 hours are those that train-clean-5 lists, copies and all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs import ROOT, Done, kdrecipe

from kdrecipe.testing.corpus import make_corpus

ARTICLE = ROOT / "recipes" / "librispeech" / "article"
PARTS = ("train-clean-100", "dev-clean", "test-clean")
CHAPTER = Path("101") / "1001"


@pytest.fixture
def root(tmp_path) -> Path:
    """The folder into which all archives were unpacked; train-clean-5 is a chapter of train-clean-100."""
    root = tmp_path / "data" / "LibriSpeech"
    make_corpus(root, num_speakers=5, utterances_per_speaker=3, layout="librispeech", parts=PARTS)
    shutil.copytree(root / PARTS[0] / CHAPTER, root / "train-clean-5" / CHAPTER)
    return root


def run(root: Path, work: Path, *more: str) -> Done:
    return kdrecipe("run", ARTICLE, "--work", work, "--stop-stage", "1", *more, LIBRISPEECH_ROOT=root)


@pytest.mark.parametrize("folder", [".", ".."], ids=["LibriSpeech", "its folder"])
def test_five_hours_are_what_train_clean_5_lists(root, tmp_path, folder):
    work = tmp_path / "work"
    done = run(root / folder, work)
    assert done.status == 0, done.said
    assert "subset five_hours: 3 of the 3 utterances listed in" in done.out
    subsets = json.loads((work / "features" / "subsets.json").read_text())
    listed = [f"101-1001-000{number}" for number in range(3)]
    assert subsets["five_hours"] == [f"{i}{copy}" for i in listed for copy in ("", "_sp0.9", "_sp1.1")]
    assert len(subsets["others"]) == 2 * 3 * 3
    assert not set(subsets["others"]) & set(subsets["five_hours"])


def test_a_changed_list_is_noticed(root, tmp_path):
    work = tmp_path / "work"
    assert run(root, work).status == 0
    assert run(root, work).ran == []
    transcripts = root / "train-clean-5" / CHAPTER / "101-1001.trans.txt"
    transcripts.write_text("".join(transcripts.read_text().splitlines(keepends=True)[:2]))
    planned = run(root, work, "--dry-run")
    features = next(line for line in planned.out.splitlines() if line.split()[0] == "features")
    assert "changed: lists.five_hours" in features
    done = run(root, work)
    assert "subset five_hours: 2 of the 2 utterances listed in" in done.out


def test_without_the_list_nothing_is_begun(root, tmp_path):
    shutil.rmtree(root / "train-clean-5")
    checked = kdrecipe("check", ARTICLE, LIBRISPEECH_ROOT=root)
    assert checked.status == 0
    assert f"there is no {root / 'train-clean-5'} to list the subset 'five_hours'" in checked.out
    done = run(root, tmp_path / "work")
    assert done.status == 2
    assert "subset 'five_hours'" in done.err
    assert str(root / "train-clean-5") in done.err
    assert "recipe.yaml:" in done.err
    assert "Traceback" not in done.said
    assert "utterances" not in done.out, "the corpus was read"

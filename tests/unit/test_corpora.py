"""The corpora that come along: layouts, splits, determinism, and what they say when data is amiss."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from kdrecipe.corpus.acoustics import NOISES, add_noise, convolve, resample, room
from kdrecipe.corpus.manifests import finish, sample, validate_corpus
from kdrecipe.errors import DataError, MissingExtra
from kdrecipe.interfaces import Prepared
from kdrecipe.testing.corpus import WORDS, make_corpus
from kdrecipe_local import an4, librispeech, manifests, voice_commands
from kdrecipe_local.an4 import An4
from kdrecipe_local.command_grammar import sentences
from kdrecipe_local.espeak import Voice, synthesise
from kdrecipe_local.librispeech import LibriSpeech, MiniLibriSpeech
from kdrecipe_local.voice_commands import VoiceCommands

TINY: dict[str, Any] = {
    "num_utterances": {"train": 4, "dev": 1, "test": 3},
    "num_speakers": {"train": 2, "dev": 1, "test": 2},
}


def ids(prepared: Prepared) -> dict[str, list[str]]:
    return {split: [sup.id for sup in sups] for split, (_, sups) in prepared.splits.items()}


def speakers(prepared: Prepared) -> dict[str, set[str]]:
    return {split: {sup.speaker for sup in sups} for split, (_, sups) in prepared.splits.items()}


def digest(prepared: Prepared) -> dict[str, str]:
    """Of each utterance's audio file and text."""
    result = {}
    for recordings, sups in prepared.splits.values():
        audio = {recording.id: Path(recording.sources[0].source).read_bytes() for recording in recordings}
        for sup in sups:
            whole = audio[sup.recording_id] + f"{sup.text} {sup.speaker}".encode()
            result[sup.id] = hashlib.sha256(whole).hexdigest()
    return result


def assert_disjoint(prepared: Prepared) -> None:
    by_split = speakers(prepared)
    assert len(set().union(*by_split.values())) == sum(map(len, by_split.values()))


# ---------------------------------------------------------------- the corpus of tones


def test_tones_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_speakers": 3, "utterances_per_speaker": 2}
    for layout in ("manifests", "librispeech", "an4"):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            make_corpus(tmp_path / layout / name, seed=seed, layout=layout, **options)  # type: ignore[arg-type]
        files = {
            name: {
                path.relative_to(tmp_path / layout / name): path.read_bytes()
                for path in sorted((tmp_path / layout / name).rglob("*"))
                if path.is_file() and path.suffix != ".gz"  # these hold absolute paths
            }
            for name in ("a", "b", "c")
        }
        assert files["a"] == files["b"]
        assert files["a"] != files["c"]


def test_too_few_speakers_for_the_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_speakers is 2"):
        make_corpus(tmp_path, num_speakers=2)


def test_tones_are_learnt_in_seconds(tmp_path: Path) -> None:
    """A tiny convolutional CTC model reads a speaker it never heard."""
    import torch
    from jiwer import cer
    from lhotse import Fbank, RecordingSet, SupervisionSet

    root, extractor = make_corpus(tmp_path), Fbank()
    letters = sorted(set("".join(WORDS)))
    data: dict[str, list[tuple[torch.Tensor, list[int], str]]] = {}
    for split in ("train", "dev"):
        recordings = {r.id: r for r in RecordingSet.from_file(root / f"{split}_recordings.jsonl.gz")}
        data[split] = [
            (
                torch.as_tensor(extractor.extract(recordings[sup.recording_id].load_audio(), 16000)),
                [1 + letters.index(letter) for letter in sup.text],
                sup.text,
            )
            for sup in SupervisionSet.from_file(root / f"{split}_supervisions.jsonl.gz")
        ]
    torch.manual_seed(0)
    frames = torch.cat([features for features, _, _ in data["train"]])
    mean, std = frames.mean(0), frames.std(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(80, 48, 5, 2, 2),
        torch.nn.ReLU(),
        torch.nn.Conv1d(48, 48, 5, 2, 2),
        torch.nn.ReLU(),
        torch.nn.Conv1d(48, 1 + len(letters), 3, 1, 1),
    )
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)

    def log_probs(features_TF: torch.Tensor) -> torch.Tensor:
        return model(((features_TF - mean) / std).T).log_softmax(0).T  # type: ignore[no-any-return]

    for _ in range(12):
        for features, target, _ in data["train"]:
            out = log_probs(features)
            loss = torch.nn.functional.ctc_loss(out, torch.tensor(target), (len(out),), (len(target),))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    hypotheses = []
    with torch.no_grad():
        for features, _, _ in data["dev"]:
            best = log_probs(features).argmax(1).tolist()
            kept = [b for a, b in zip([0, *best], best, strict=False) if b not in (0, a)]
            hypotheses.append("".join(letters[i - 1] for i in kept))
    assert cer([text for _, _, text in data["dev"]], hypotheses) < 0.3


# ---------------------------------------------------------------- AN4


@pytest.fixture
def an4_root(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "an4", utterances_per_speaker=2, layout="an4")


def test_an4(an4_root: Path, tmp_path: Path) -> None:
    prepared = An4(An4.Config(num_dev_speakers=2)).prepare(an4_root, tmp_path)
    assert prepared.problems == validate_corpus(prepared) == []
    assert {split: len(names) for split, names in speakers(prepared).items()} == {
        "train": 3,
        "dev": 2,
        "test": 1,
    }
    assert_disjoint(prepared)
    again = An4(An4.Config(num_dev_speakers=2)).prepare(an4_root, tmp_path)
    assert digest(again) == digest(prepared)
    other = An4(An4.Config(num_dev_speakers=2, dev_seed=1)).prepare(an4_root, tmp_path)
    assert speakers(other)["dev"] != speakers(prepared)["dev"]
    texts = {sup.id: sup.text for _, sups in prepared.splits.values() for sup in sups}
    for line in (an4_root / "etc" / "an4_train.transcription").read_text().splitlines():
        text, utterance_id = line.removeprefix("<s> ").removesuffix(")").split(" </s> (")
        assert texts[utterance_id] == text
    notes = finish(prepared, tmp_path, "stop").notes
    assert any(note.startswith("dev is made of 2 speakers of train: mta") for note in notes)
    told = finish(sample(prepared, 1), tmp_path / "sample", "stop").notes
    assert sum("test sentences occur" in note for note in told) == 1, "of the sample alone"
    train_texts = {sup.text for sup in prepared.splits["train"][1]}
    shared = sum(sup.text in train_texts for sup in prepared.splits["test"][1])
    assert f"{shared} of 2 test sentences occur in train" in notes


def test_an4_reports_what_is_amiss(an4_root: Path, tmp_path: Path) -> None:
    (an4_root / "wav/an4_clstk/mtaa/an0-mtaa-b.sph").unlink()
    shutil.copy(
        an4_root / "wav/an4_clstk/mtaa/an1-mtaa-b.sph", an4_root / "wav/an4_clstk/mtaa/an9-mtaa-b.sph"
    )
    text_file = an4_root / "etc/an4_train.transcription"
    lines = text_file.read_text().splitlines()
    del lines[2]  # an0-mtab-b
    lines[2] = "<s> NO ID </s>"  # an1-mtab-b
    lines.append("<s> NOT LISTED </s> (an7-mtaz-b)")
    text_file.write_text("\n".join(lines) + "\n")
    prepared = An4(An4.Config(num_dev_speakers=1)).prepare(an4_root, tmp_path)
    missing_text = [f"{an4_root}/wav/an4_clstk/mtab/an{i}-mtab-b.sph" for i in (0, 1)]
    assert sorted((p.kind, p.where) for p in prepared.problems) == sorted(
        [
            ("missing_audio", f"{an4_root}/wav/an4_clstk/mtaa/an0-mtaa-b.sph"),
            ("malformed", f"{text_file}:3"),
            ("missing_audio", f"{text_file}:10"),
            *[("missing_text", path) for path in missing_text],
        ]
    )
    assert "1 audio files are in no list of etc/ and not used: an9-mtaa-b.sph" in prepared.notes


def test_an4_says_what_it_expected(an4_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_dev_speakers is 6, train has 5 speakers"):
        An4(An4.Config()).prepare(an4_root, tmp_path)
    for root in (None, tmp_path):
        with pytest.raises(DataError, match=r"expected the folders etc/ and wav/"):
            An4(An4.Config()).prepare(root, tmp_path)
    (an4_root / "etc/an4_test.fileids").unlink()
    with pytest.raises(DataError, match=r"an4_test.fileids: no such file"):
        An4(An4.Config(num_dev_speakers=1)).prepare(an4_root, tmp_path)


# ---------------------------------------------------------------- LibriSpeech


@pytest.mark.parametrize("nested", [False, True])
def test_mini_librispeech(tmp_path: Path, nested: bool) -> None:
    root = tmp_path / "download"
    make_corpus(root / "LibriSpeech" if nested else root, utterances_per_speaker=2, layout="librispeech")
    prepared = MiniLibriSpeech(MiniLibriSpeech.Config()).prepare(root, tmp_path)
    assert prepared.problems == validate_corpus(prepared) == []
    assert speakers(prepared) == {"train": {"100", "101", "102", "103"}, "dev": {"104"}, "test": {"105"}}
    assert ids(prepared)["dev"] == ["104-1004-0000", "104-1004-0001"]
    assert "dev-clean-2 is divided by speakers: dev has 1 of them; test has 1 of them" in prepared.notes


def test_librispeech_takes_any_subset_of_parts(tmp_path: Path) -> None:
    parts = ("train-clean-100", "dev-other", "test-clean")
    root = make_corpus(tmp_path / "a", utterances_per_speaker=1, layout="librispeech", parts=parts)
    prepared = LibriSpeech(LibriSpeech.Config()).prepare(root, tmp_path)
    assert prepared.notes[:3] == ["train: train-clean-100", "dev: dev-other", "test: test-clean"]
    assert {split: len(names) for split, names in ids(prepared).items()} == {"train": 4, "dev": 1, "test": 1}
    assert_disjoint(prepared)

    only_test = make_corpus(
        tmp_path / "b",
        utterances_per_speaker=1,
        layout="librispeech",
        parts=("train-other-500", "test-other"),
    )
    prepared = LibriSpeech(LibriSpeech.Config()).prepare(only_test, tmp_path)
    assert {split: len(names) for split, names in ids(prepared).items()} == {"train": 4, "dev": 1, "test": 1}
    assert_disjoint(prepared)


def test_librispeech_parts_can_be_chosen(tmp_path: Path) -> None:
    parts = ("train-clean-100", "dev-clean", "test-clean", "test-other")
    root = make_corpus(tmp_path / "a", utterances_per_speaker=1, layout="librispeech", parts=parts)
    chosen = {"train": ["train-clean-100", "dev-clean"], "dev": ["test-other"], "test_clean": ["test-clean"]}
    prepared = LibriSpeech(LibriSpeech.Config(parts=chosen)).prepare(root, tmp_path)
    assert {split: len(names) for split, names in ids(prepared).items()} == {
        "train": 4,
        "dev": 1,
        "test_clean": 1,
    }
    without = LibriSpeech(LibriSpeech.Config(parts=chosen | {"dev": None})).prepare(root, tmp_path)
    assert set(without.splits) == {"train", "test_clean"}
    with pytest.raises(DataError, match="no part 'dev-other'") as caught:
        LibriSpeech(LibriSpeech.Config(parts={"train": ["dev-other"]})).prepare(root, tmp_path)
    assert "dev-clean, test-clean, test-other, train-clean-100" in str(caught.value)
    with pytest.raises(DataError, match="1 speakers can't be divided between dev and test"):
        LibriSpeech(LibriSpeech.Config(parts={"dev": ["dev-clean"], "test": ["dev-clean"]})).prepare(
            root, tmp_path
        )


def test_librispeech_without_its_parts(tmp_path: Path) -> None:
    root = make_corpus(tmp_path / "mini", utterances_per_speaker=1, layout="librispeech")
    with pytest.raises(DataError, match="no part for train: none of train-clean-100"):
        LibriSpeech(LibriSpeech.Config()).prepare(root, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        MiniLibriSpeech(MiniLibriSpeech.Config()).prepare(tmp_path / "absent", tmp_path)


# ---------------------------------------------------------------- voice commands


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    pytest.importorskip("espeakng_loader")
    return VoiceCommands(VoiceCommands.Config(**TINY)).prepare(None, tmp_path_factory.mktemp("spoken"))


def test_voice_commands(spoken: Prepared, tmp_path: Path) -> None:
    assert spoken.problems == validate_corpus(spoken) == []
    summary = finish(spoken, tmp_path, "stop")
    assert {split: figures["utterances"] for split, figures in summary.splits.items()} == {
        "train": 4,
        "dev": 1,
        "test": 3,
    }
    assert_disjoint(spoken)
    assert "0 of 3 test sentences occur in train" in summary.notes
    for recordings, sups in spoken.splits.values():
        for recording, sup in zip(recordings, sups, strict=True):
            assert set(sup.text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
            assert 0.7 < recording.duration < 12
            level = np.abs(recording.load_audio()).max()
            assert 0.09 < level < 0.91


def test_voice_commands_are_bit_deterministic(spoken: Prepared, tmp_path: Path) -> None:
    again = VoiceCommands(VoiceCommands.Config(**TINY, num_workers=1)).prepare(None, tmp_path / "again")
    assert digest(again) == digest(spoken)
    more = {**TINY, "num_utterances": {"train": 6, "dev": 1, "test": 3}}
    grown = digest(VoiceCommands(VoiceCommands.Config(**more)).prepare(None, tmp_path / "more"))
    was = digest(spoken)
    assert {k: v for k, v in grown.items() if k[:4] == "test"} == {
        k: v for k, v in was.items() if k[:4] == "test"
    }
    other = VoiceCommands(VoiceCommands.Config(**TINY, seed=1)).prepare(None, tmp_path / "other")
    assert not set(digest(other).values()) & set(was.values())


def test_breathy_voices_do_not_depend_on_the_time_of_day() -> None:
    pytest.importorskip("espeakng_loader")
    voice = Voice("en-us+sandro", rate=200)
    first = synthesise(voice, ["one"])
    time.sleep(1.01)  # its generator would be seeded with the seconds
    np.testing.assert_array_equal(synthesise(voice, ["one"])[0], first[0])


def test_voice_commands_by_hours(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    options = {**TINY, "hours": {"train": 0.01}, "silence_s": (0, 0)}
    prepared = VoiceCommands(VoiceCommands.Config(**options)).prepare(None, tmp_path)
    seconds = sum(sup.duration for sup in prepared.splits["train"][1])
    assert 32 < seconds < 52
    assert len(prepared.splits["test"][1]) == 3


def test_voice_commands_begin_and_end_with_silence_in_which_noise_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")

    def durations(name: str, silence_s: tuple[float, float]) -> dict[str, float]:
        options = {**TINY, "silence_s": silence_s, "reverb": 0, "snr_db": (20, 20)}
        prepared = VoiceCommands(VoiceCommands.Config(**options)).prepare(None, tmp_path / name)
        return {sup.id: sup.duration for sup in prepared.splits["train"][1]}

    tight, wide = durations("tight", (0, 0)), durations("wide", (0.5, 0.9))
    added = [wide[i] - tight[i] for i in tight]
    assert 1.0 <= min(added) < max(added) <= 1.8
    assert len(set(added)) > 1
    samples, rate = soundfile.read(next((tmp_path / "wide").rglob("train*.flac")))
    lead, rest = samples[: rate // 2], samples[rate // 2 :]
    assert 0 < np.mean(lead**2) < 0.1 * np.mean(rest**2)


def test_the_ratio_of_speech_to_noise_leaves_silence_out() -> None:
    rng = np.random.default_rng(0)
    speech = np.concatenate([np.zeros(8000), np.sin(np.arange(8000) / 5)])
    noise = NOISES["pink"](16000, rng)
    added = add_noise(speech, noise, 10.0, num_spoken=8000) - speech
    ratio = np.mean(speech[8000:] ** 2) / np.mean(added**2)
    assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=1e-6)


def test_no_voice_in_two_splits_of_the_default_cast() -> None:
    cast = VoiceCommands(VoiceCommands.Config())._cast()
    variants = {split: {s.variant for s in cast if s.split == split} for split in ("train", "dev", "test")}
    assert len(set().union(*variants.values())) == sum(map(len, variants.values())) >= 60
    assert len({s.voice for s in cast}) == len(cast) == 110
    takes_on_one_voice = {"iven", "iven2", "iven3", "iven4"}
    assert sum(bool(takes_on_one_voice & names) for names in variants.values()) == 1


def test_voice_commands_options() -> None:
    for wrong in (
        {"num_speakers": {"train": 3}},
        {"num_utterances": {"train": 3, "dev": 0, "test": 1}},
        {"snr_db": (20, 0)},
        {"noises": ["thunder"]},
        {"utterances": 3},
    ):
        with pytest.raises(ValidationError):
            VoiceCommands.Config(**wrong)


def test_voice_commands_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingExtra, match=r"kdrecipe\[espeak\]"):
        VoiceCommands(VoiceCommands.Config(**TINY)).prepare(None, tmp_path)


def test_a_voice_that_does_not_exist() -> None:
    pytest.importorskip("espeakng_loader")
    with pytest.raises(DataError, match="no voice 'xx-nowhere'"):
        synthesise(Voice("xx-nowhere"), ["one"])


def test_the_grammar_avoids_other_splits_and_spells_codes() -> None:
    import random

    test = sentences(300, random.Random(0), set())
    train = sentences(3000, random.Random(1), {text for text, _ in test})
    assert not {text for text, _ in test} & {text for text, _ in train}
    assert len({text for text, _ in train}) == 3000
    spelled = [(text, said) for text, said in train if text.startswith(("MY CODE", "SPELL IT"))]
    assert any(" A" in text and "eigh" in said.split() for text, said in spelled)
    assert all(len(word) == 1 for text, _ in spelled if text[0] == "S" for word in text.split()[2:])
    assert test == sentences(300, random.Random(0), set())


def test_noise_and_rooms() -> None:
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(16000) / 5)
    for name, make in NOISES.items():
        noise = make(16000, rng)
        mixed = add_noise(speech, noise, 10.0)
        ratio = np.mean(speech**2) / np.mean((mixed - speech) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=1e-6), name
    response = room(rng, 0.3, 5.0)
    assert len(response) == 4800
    assert 10 * np.log10(1 / np.sum(response[1:] ** 2)) == pytest.approx(5.0)
    assert np.sum(response[1:480] ** 2) > 100 * np.sum(response[-480:] ** 2)
    np.testing.assert_allclose(convolve(speech, np.array([0.0, 1.0]))[1:], speech[:-1], atol=1e-9)


def test_resampling_keeps_a_tone_where_it_is() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(22050) / 22050)
    result = resample(tone, 320, 441)
    assert len(result) == 16000
    expected = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    np.testing.assert_allclose(result, expected, atol=1e-6)


# ---------------------------------------------------------------- registration


def test_every_corpus_is_registered() -> None:
    found: dict[str, type] = {}
    for module in (an4, librispeech, manifests, voice_commands):
        module.register_corpora(found.__setitem__)
    assert sorted(found) == ["an4", "librispeech", "manifests", "mini_librispeech", "voice_commands"]


def test_importing_the_corpora_is_quick() -> None:
    """``kdrecipe check`` imports all of them for their options: neither Lhotse nor torch may come along."""
    code = (
        "import sys, kdrecipe_local.an4, kdrecipe_local.librispeech, kdrecipe_local.manifests\n"
        "import kdrecipe_local.voice_commands\n"
        "sys.exit(bool({'torch', 'lhotse', 'espeakng_loader'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

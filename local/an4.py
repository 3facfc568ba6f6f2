"""AN4: CMU's census corpus, an hour of people spelling names, numbers and dates at 16 kHz.

Layout as distributed: ``etc/an4_{train,test}.{fileids,transcription}`` and
``wav/**/*.sph``. The audio is NIST SPHERE, which Lhotse reads only with the program
``sph2pipe``, so it is rewritten as WAV, sample by sample the same. The corpus has no development
part: some of the training speakers become it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from kdrecipe import hookimpl
from kdrecipe.corpus.gather import Utterance, gather, read_lines
from kdrecipe.corpus.problems import DataProblem
from kdrecipe.errors import DataError
from kdrecipe.interfaces import Options, Prepared

_LINE = re.compile(r"^(?P<text>.*?)\s*\((?P<id>[^()\s]+)\)$")


class An4:
    """Corpus ``an4``."""

    tiny_options: ClassVar[dict[str, int]] = {"num_dev_speakers": 1}
    contract_options: ClassVar[dict[str, int]] = {"num_dev_speakers": 2}
    split_names = ("train", "dev", "test")

    class Config(Options):
        """Options of the corpus.

        Args:
            num_dev_speakers: training speakers that become the development part.
            dev_seed: which ones.
            test_seed: draws the test speakers anew from all speakers of the corpus, as many as its own test
                part has, so that a result can be checked on speakers that nobody tuned on; null: its own.
        """

        num_dev_speakers: int = Field(default=6, ge=1)
        dev_seed: int = 0
        test_seed: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """Manifests of train, dev and test; the audio goes to ``out_dir/audio``.

        Raises:
            DataError: if a file of ``etc/`` is absent or ``num_dev_speakers`` leaves none to train on.
        """
        if corpus_dir is None or not (corpus_dir / "etc").is_dir():
            raise DataError(
                "no AN4 here: expected the folders etc/ and wav/",
                where=str(corpus_dir or "corpus.root"),
                remedy="unpack an4_sphere.tar.gz and set corpus.root to its folder an4/",
            )
        problems: list[DataProblem] = []
        train = _read_part(corpus_dir, "train", problems)
        test = _read_part(corpus_dir, "test", problems)
        if self.config.test_seed is not None:
            train, test = _redrawn(train, test, self.config.test_seed)
        speakers = sorted({utt.speaker for utt in train})
        if len(speakers) <= self.config.num_dev_speakers:
            raise DataError(
                f"num_dev_speakers is {self.config.num_dev_speakers}, train has {len(speakers)} speakers",
                where="corpus",
                remedy="choose fewer, so that some are left to train on",
            )
        dev = set(random.Random(self.config.dev_seed).sample(speakers, self.config.num_dev_speakers))
        parts = {
            "train": [utt for utt in train if utt.speaker not in dev],
            "dev": [utt for utt in train if utt.speaker in dev],
            "test": test,
        }
        splits = {}
        for split, utterances in parts.items():
            recordings, supervisions, found = gather(utterances, convert_dir=out_dir / "audio")
            splits[split] = (recordings, supervisions)
            problems += found
        number = f"{len(dev)} speaker{'s' if len(dev) > 1 else ''}"
        notes = [f"dev is made of {number} of train: {', '.join(sorted(dev))}"]
        return Prepared(splits, list(problems), notes + _unlisted(corpus_dir))


def _read_part(corpus_dir: Path, part: str, problems: list[DataProblem]) -> list[Utterance]:
    """Utterances of ``train`` or ``test``, sorted by id; what is wrong goes to ``problems``."""
    ids_file = corpus_dir / "etc" / f"an4_{part}.fileids"
    text_file = corpus_dir / "etc" / f"an4_{part}.transcription"
    id_lines, found = read_lines(ids_file)
    problems += found
    paths = {Path(line).name: line for _, line in id_lines}
    lines, found = read_lines(text_file)
    problems += found
    unread = {problem.where for problem in found}
    utterances, transcribed = [], set()
    for number, line in lines:
        where, match = f"{text_file}:{number}", _LINE.match(line)
        if match is None:
            problems.append(DataProblem(f"no (id) at the end of {line[:40]!r}", where, kind="malformed"))
            continue
        utterance_id = match["id"]
        transcribed.add(utterance_id)
        if utterance_id not in paths:
            what = f"{utterance_id} is not in {ids_file.name}"
            problems.append(DataProblem(what, where, kind="missing_audio", id=utterance_id))
            continue
        file_id = paths[utterance_id]
        text = " ".join(word for word in match["text"].split() if word not in ("<s>", "</s>"))
        audio = corpus_dir / "wav" / f"{file_id}.sph"
        utterances.append(Utterance(utterance_id, audio, text, speaker=Path(file_id).parent.name))
    if not unread:  # else a missing transcript is most likely one of the lines that can't be read
        problems += [
            DataProblem("", str(corpus_dir / "wav" / f"{paths[i]}.sph"), kind="missing_text")
            for i in sorted(paths.keys() - transcribed)
        ]
    return sorted(utterances, key=lambda utt: utt.id)


def _redrawn(
    train: list[Utterance], test: list[Utterance], seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Train and test with as many test speakers as before, drawn from those of both."""
    everything = sorted(train + test, key=lambda utt: utt.id)
    speakers = sorted({utt.speaker for utt in everything})
    drawn = set(random.Random(f"test {seed}").sample(speakers, len({utt.speaker for utt in test})))
    return (
        [utt for utt in everything if utt.speaker not in drawn],
        [utt for utt in everything if utt.speaker in drawn],
    )


def _unlisted(corpus_dir: Path) -> list[str]:
    """A note about audio that no list in ``etc/`` mentions, if there is any."""
    lists = [read_lines(corpus_dir / "etc" / f"an4_{part}.fileids")[0] for part in ("train", "test")]
    listed = {corpus_dir / "wav" / f"{line}.sph" for lines in lists for _, line in lines}
    others = sorted(path for path in (corpus_dir / "wav").rglob("*.sph") if path not in listed)
    if not others:
        return []
    shown = ", ".join(path.name for path in others[:5]) + (", ..." if len(others) > 5 else "")
    return [f"{len(others)} audio files are in no list of etc/ and not used: {shown}"]


@hookimpl
def register_corpora(register: Callable[[str, type], None]) -> None:
    """Register corpus ``an4``."""
    register("an4", An4)

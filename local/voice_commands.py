"""Voice commands for a home, synthesised on the spot: the corpus that needs no download.

Sentences come from a small grammar (devices, timers, names, numbers, spelled codes), voices from
espeak-ng, rooms and noises from random numbers; the same options give the same bytes. It is a
stand-in for real speech: good for trying recipes out and for comparing systems with one another,
not for figures to quote.

espeak-ng is licensed under the GPL-3. It is no dependency of this package but an extra
(``pip install 'kdrecipe[espeak]'`` installs ``espeakng-loader``), run in a separate process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from kdrecipe import hookimpl
from kdrecipe.corpus.gather import Utterance, gather
from kdrecipe.errors import DataError
from kdrecipe.interfaces import SAMPLE_RATE, Options, Prepared

from .command_grammar import sentences
from .espeak import Voice, synthesise

if TYPE_CHECKING:
    import numpy as np

Accent = Literal["en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-us-nyc", "en-029"]
_ACCENTS: tuple[Accent, ...] = (
    "en-us",
    "en-us",
    "en",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-us-nyc",
    "en-029",
)
# espeak-ng's voice variants, without whispers, robots, echoes and vocal tracts that nobody has (a first or
# second formant moved by more than a third, hardly a third one): a model that has not heard such a voice
# gets every other word wrong. Those joined by commas are takes on one voice and stay in one split.
_VARIANTS = """
Alex Andrea Annie Denis Diogo Gene,Gene2 Henrique Hugo Mario
Michael Mike,mike2 Nguyen Reed Storm adam anika announcer antonio aunty belinda benjamin boris croak
david ed edward,edward2 f1 f2 f3 f4 f5 grandma grandpa gustave ian iven,iven2,iven3,iven4 john
klatt2 klatt3 klatt4 klatt5 klatt6 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel
miguel norbert paul pedro quincy rob,robert sandro shelby steph,steph2,steph3 victor
"""
# 22.05 kHz to 16 kHz is 320 to 441; the others make the vocal tract up to 9% shorter or 5% longer.
# All have small prime factors, for the Fourier transform's sake.
_UP, _DOWNS = 320, (405, 420, 432, 441, 450, 462)
_MIN_DURATION_S = 0.8  # no sentence of the grammar is shorter: how many may be needed to fill some hours

NoiseName = Literal["white", "pink", "rumble", "hum", "crowd", "clatter"]
SplitName = Literal["train", "dev", "test"]
_SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class _Speaker:
    split: SplitName
    index: int
    variant: str
    voice: Voice
    down: int  # of _DOWNS


class VoiceCommands:
    """Corpus ``voice_commands``."""

    synthesised: ClassVar[bool] = True
    split_names = _SPLITS
    tiny_options: ClassVar[dict[str, Any]] = {
        "num_utterances": {"train": 40, "dev": 10, "test": 10},
        "hours": {},
        "num_speakers": {"train": 6, "dev": 2, "test": 2},
    }
    contract_options: ClassVar[dict[str, Any]] = {
        "num_utterances": {"train": 6, "dev": 2, "test": 2},
        "num_speakers": {"train": 3, "dev": 1, "test": 1},
    }

    class Config(Options):
        """Options of the corpus; each dictionary is by split (``train``, ``dev``, ``test``).

        Args:
            num_utterances: per split, of about 2.5 s of speech each.
            hours: of speech per split, silence not counted; replaces ``num_utterances`` where given.
            num_speakers: per split. No voice is in two splits.
            accents: espeak-ng's, one per speaker; those named twice are drawn twice as often.
            silence_s: shortest and longest silence before the first word and after the last, in seconds;
                noise goes on in it.
            snr_db: lowest and highest ratio of speech to noise, silence not counted.
            noises: kinds of noise, one per utterance.
            reverb: share of the utterances that are in a room, the others have no reverberation.
            rt60_s: shortest and longest reverberation time in seconds.
            seed: of everything drawn.
            num_workers: voices synthesised at the same time.
        """

        num_utterances: dict[SplitName, int] = {"train": 2000, "dev": 200, "test": 400}
        hours: dict[SplitName, float] = {}
        num_speakers: dict[SplitName, int] = {"train": 80, "dev": 10, "test": 20}
        accents: tuple[Accent, ...] = Field(default=_ACCENTS, min_length=1)
        silence_s: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.1, 0.8)
        snr_db: tuple[float, float] = (0.0, 20.0)
        noises: tuple[NoiseName, ...] = Field(
            default=("white", "pink", "rumble", "hum", "crowd", "clatter"), min_length=1
        )
        reverb: float = Field(default=0.5, ge=0, le=1)
        rt60_s: tuple[float, float] = (0.1, 0.4)
        seed: int = Field(default=0, ge=0)
        num_workers: int = Field(default=2, ge=1)

        @field_validator("num_utterances", "num_speakers")
        @classmethod
        def _complete(cls, value: dict[str, int]) -> dict[str, int]:
            if set(value) != set(_SPLITS) or min(value.values()) < 1:
                raise ValueError("needs train, dev and test, each at least 1")
            return value

        @field_validator("snr_db", "rt60_s", "silence_s")
        @classmethod
        def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
            if value[0] > value[1]:
                raise ValueError(f"the lowest, {value[0]}, is above the highest, {value[1]}")
            return value

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """Synthesise into ``out_dir/audio/<split>``; ``corpus_dir`` is not used.

        Raises:
            MissingExtra: if espeak-ng is not installed.
            DataError: if it fails.
        """
        speakers = self._cast()
        texts = self._write_texts()
        tasks = []
        for split in _SPLITS:
            cast = [speaker for speaker in speakers if speaker.split == split]
            (out_dir / "audio" / split).mkdir(parents=True, exist_ok=True)
            hours = self.config.hours.get(split)
            limit_s = None if hours is None else hours * 3600 / len(cast)
            for speaker in cast:
                own = texts[split][speaker.index :: len(cast)]
                if own:
                    tasks.append((speaker, own, limit_s, out_dir / "audio" / split))
        with ThreadPoolExecutor(self.config.num_workers) as pool:
            done = list(pool.map(lambda task: self._record(*task), tasks))
        prepared = Prepared({})
        for split in _SPLITS:
            utterances = [
                utt
                for (speaker, *_), made in zip(tasks, done, strict=True)
                if speaker.split == split
                for utt in made
            ]
            recordings, supervisions, problems = gather(utterances)
            prepared.splits[split] = (recordings, supervisions)
            prepared.problems += problems
        prepared.notes.append("the speech is synthetic: espeak-ng with artificial noise and rooms")
        return prepared

    def _cast(self) -> list[_Speaker]:
        """Speakers of all splits, voices dealt out so that no two splits share one."""
        rng = random.Random(f"cast {self.config.seed}")
        families = [family.split(",") for family in _VARIANTS.split()]
        rng.shuffle(families)
        wanted = self.config.num_speakers
        total = sum(wanted.values())
        speakers = []
        # The small splits first: each gets its share of the voices, train what is left.
        for split in reversed(_SPLITS):
            share = max(1, min(wanted[split], round(len(families) * wanted[split] / total)))
            own = (
                families
                if split == "train"
                else [families.pop() for _ in range(min(share, len(families) - 2))]
            )
            variants = [variant for family in own for variant in family]
            for index in range(wanted[split]):
                variant = variants[index % len(variants)]
                voice = Voice(
                    f"{rng.choice(self.config.accents)}+{variant}",
                    rate=rng.randint(140, 200),
                    pitch=rng.randint(30, 70),
                    range=rng.randint(30, 80),
                )
                speakers.append(_Speaker(split, index, variant, voice, rng.choice(_DOWNS)))
        return speakers

    def _write_texts(self) -> dict[str, list[tuple[str, str]]]:
        """(text, spoken) of every split. Test comes first: it stays as it is when train grows."""
        texts: dict[str, list[tuple[str, str]]] = {}
        used: set[str] = set()
        for split in reversed(_SPLITS):
            count = self.config.num_utterances[split]
            hours = self.config.hours.get(split)
            if hours is not None:
                count = int(hours * 3600 / _MIN_DURATION_S) + self.config.num_speakers[split]
            texts[split] = sentences(count, random.Random(f"{split} {self.config.seed}"), used)
            used |= {text for text, _ in texts[split]}
        return texts

    def _record(
        self, speaker: _Speaker, texts: list[tuple[str, str]], limit_s: float | None, folder: Path
    ) -> list[Utterance]:
        """Have a speaker say texts in noise and rooms; writes the files."""
        import numpy as np
        import soundfile

        name = f"{speaker.split}{speaker.index:03d}-{speaker.variant.lower()}"
        utterances = []
        for number, spoken in enumerate(synthesise(speaker.voice, [said for _, said in texts], limit_s)):
            seed = [self.config.seed, _SPLITS.index(speaker.split), speaker.index, number]
            if not np.any(spoken):
                raise DataError(f"espeak-ng said nothing for {texts[number][1]!r}", where=speaker.voice.name)
            samples = self._place(spoken, speaker, np.random.default_rng(seed))
            utterance_id = f"{name}-{number:04d}"
            path = folder / f"{utterance_id}.flac"
            soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
            utterances.append(Utterance(utterance_id, path, texts[number][0], name))
        return utterances

    def _place(self, spoken_S: np.ndarray, speaker: _Speaker, rng: np.random.Generator) -> np.ndarray:
        """Clean speech at 22.05 kHz to int16 at 16 kHz between silences, in a room, with noise, at some
        level."""
        import numpy as np

        from kdrecipe.corpus import acoustics

        config = self.config
        speech = acoustics.resample(spoken_S / 32768, _UP, speaker.down)
        num_spoken = len(speech)
        silences = [np.zeros(round(rng.uniform(*config.silence_s) * SAMPLE_RATE)) for _ in range(2)]
        speech = np.concatenate([silences[0], speech, silences[1]])
        if rng.uniform() < config.reverb:
            response = acoustics.room(rng, rng.uniform(*config.rt60_s), rng.uniform(0, 10))
            speech = acoustics.convolve(speech, response)
        noise = acoustics.NOISES[str(rng.choice(config.noises))](len(speech), rng)
        mixed = acoustics.add_noise(speech, noise, rng.uniform(*config.snr_db), num_spoken)
        mixed *= rng.uniform(0.1, 0.9) / np.max(np.abs(mixed))
        return np.asarray(np.round(mixed * 32767), np.int16)


@hookimpl
def register_corpora(register: Callable[[str, type], None]) -> None:
    """Register corpus ``voice_commands``."""
    register("voice_commands", VoiceCommands)

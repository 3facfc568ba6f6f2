#!/usr/bin/env python3
"""Recognise speech with an exported attention encoder-decoder: ``python recognise.py speech.wav``.

This file needs nothing else but Python 3.10, numpy, onnxruntime and kaldi-native-fbank. It lies beside what
it runs::

    encoder.onnx  decoder.onnx  tokens.txt          in float32
    encoder.int8.onnx  decoder.int8.onnx            with 8-bit weights

From Python::

    recogniser = Recogniser.load(".")
    recogniser.recognise(samples, 16000).text

Audio may be of any length: long audio is recognised in pieces, cut where it is quietest (``--longest``).
S samples, T frames, F feature bins, N hypotheses, P tokens so far, V vocabulary, L decoder layers, H
attention heads, d width of a head, K hypotheses kept, C candidates for the next token.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kaldi_native_fbank as knf
import numpy as np
import onnxruntime

from kdrecipe.corpus.segments import LONGEST_S, joined, segments

SAMPLE_RATE = 16000
BLOCK_S = 10  # of a file are read at once
BLANK_ID = 0
SOS_EOS_ID = 1
TOKENS = "tokens.txt"
FILES = {
    variant: {part: f"{part}{ending}.onnx" for part in ("encoder", "decoder")}
    for variant, ending in {
        "fp32": "",
        "fp16": ".fp16",
        "int4": ".int4",
        "int8_qdq": ".int8_qdq",
        "int8": ".int8",
    }.items()
}  # the last that is there is the one to run
FLOOR = -1e4  # of CTC's log-posteriors: differences of their sums must stay defined
CANDIDATES_PER_BEAM = 2  # tokens that CTC scores per hypothesis, in beams


class RecogniserError(ValueError):
    """A file is missing, damaged, or no audio."""


@dataclass
class Recognised:
    """What was recognised: words, token ids, and the search's log-score (None of a greedy one)."""

    text: str
    tokens: list[int]
    score: float | None = None


@dataclass
class Encoded:
    """The encoder's output, as the decoder and CTC read it.

    Args:
        keys: (L, N, H, T, d).
        values: (L, N, H, T, d).
        lens_N: int64, valid frames.
        ctc_NTV: log-posteriors of the CTC head; None: the model has none.
    """

    keys: np.ndarray
    values: np.ndarray
    lens_N: np.ndarray
    ctc_NTV: np.ndarray | None

    def row(self, number: int) -> Encoded:
        """One utterance, its padding included."""
        at = slice(number, number + 1)
        ctc = None if self.ctc_NTV is None else self.ctc_NTV[at]
        return Encoded(self.keys[:, at], self.values[:, at], self.lens_N[at], ctc)


@dataclass
class State:
    """Keys and values of the tokens so far, (L, N, H, P, d)."""

    keys: np.ndarray
    values: np.ndarray

    def select(self, rows_N: np.ndarray) -> State:
        """These hypotheses, in this order."""
        return State(self.keys[:, rows_N], self.values[:, rows_N])


class Recogniser:
    """An export, loaded.

    Args:
        encoder: path of its file.
        decoder: path of its file.
        tokens: path of ``tokens.txt``.
        num_threads: of onnxruntime.

    Raises:
        RecogniserError: a file is missing or damaged.
    """

    def __init__(self, encoder: Path, decoder: Path, tokens: Path, *, num_threads: int = 1) -> None:
        self.encoder, self.decoder = (_session(path, num_threads) for path in (encoder, decoder))
        self.pieces = _read_pieces(tokens)
        num_tokens = self.decoder.get_outputs()[0].shape[1]
        if num_tokens != len(self.pieces):
            raise RecogniserError(f"{tokens}: lists {len(self.pieces)} tokens, the model has {num_tokens}")
        self.num_bins = int(self.encoder.get_inputs()[0].shape[2])
        self.has_ctc = len(self.encoder.get_outputs()) == 4

    @classmethod
    def load(cls, directory: Path | str, variant: str | None = None, *, num_threads: int = 1) -> Recogniser:
        """The export in ``directory``, a variant of :data:`FILES`; None: the last that is there."""
        directory = Path(directory)
        if variant is None:
            there = [v for v, names in FILES.items() if (directory / names["encoder"]).is_file()]
            variant = there[-1] if there else "fp32"
        files = {part: directory / name for part, name in FILES[variant].items()}
        return cls(files["encoder"], files["decoder"], directory / TOKENS, num_threads=num_threads)

    def recognise(
        self,
        samples: np.ndarray | Iterable[np.ndarray],
        sample_rate: int,
        *,
        longest_s: float = LONGEST_S,
        beam: int | None = None,
        ctc_weight: float = 0.3,
        length_bonus: float = 0.0,
        max_len_ratio: float = 1.0,
    ) -> Recognised:
        """Audio of any length.

        Args:
            samples: (S,) float32 in [-1, 1], one channel; or the same in blocks.
            sample_rate: of the samples; other rates than 16 kHz are converted.
            longest_s: audio that is longer is recognised in pieces, cut where it is quietest.
            beam: hypotheses that are kept; None: greedy search, on attention alone.
            ctc_weight: share of CTC against attention in a beam search, in [0, 1).
            length_bonus: added per token in a beam search.
            max_len_ratio: tokens per frame that a beam search gives, at most.
        """
        found = []
        blocks = [samples] if isinstance(samples, np.ndarray) else samples
        for _, part_S in segments(blocks, sample_rate, longest_s):
            features_TF = fbank(resample(part_S, sample_rate), self.num_bins)
            encoded = self.encode(features_TF[None], np.array([len(features_TF)]))
            if beam is None:
                found.append(self._recognised(self.greedy(encoded)))
                continue
            weight = ctc_weight if self.has_ctc else 0.0
            search = BeamSearch(self, encoded, beam, weight, length_bonus, max_len_ratio=max_len_ratio)
            found.append(self._recognised(*search.run()))
        text, tokens, _ = joined((0.0, part.text, part.tokens, []) for part in found)
        return Recognised(text, tokens, None if beam is None else sum(part.score or 0.0 for part in found))

    def encode(self, features_NTF: np.ndarray, lens_N: np.ndarray) -> Encoded:
        """What the decoder reads of each utterance; features past their lengths do not matter."""
        inputs = {"x": features_NTF.astype(np.float32), "x_lens": lens_N.astype(np.int64)}
        keys, values, out_lens_N, *ctc = _run(self.encoder, inputs)
        return Encoded(keys, values, out_lens_N, ctc[0] if ctc else None)

    def start(self, num_rows: int) -> State:
        """No token yet."""
        layers, _, heads, _, dim = self.decoder.get_inputs()[1].shape
        empty = np.zeros((layers, num_rows, heads, 0, dim), dtype=np.float32)
        return State(empty, empty)

    def step(self, tokens_N: np.ndarray, state: State, encoded: Encoded) -> tuple[np.ndarray, State]:
        """(N, V) log-posteriors of the next token, and the state after ``tokens_N``.

        ``encoded`` has a row for each hypothesis, or one for all.
        """
        inputs = {
            "tokens": tokens_N.astype(np.int64),
            "self_keys": state.keys,
            "self_values": state.values,
            "cross_keys": encoded.keys,
            "cross_values": encoded.values,
            "cross_lens": encoded.lens_N,
        }
        log_probs_NV, keys, values = _run(self.decoder, inputs)
        return log_probs_NV, State(keys, values)

    def greedy(self, encoded: Encoded) -> list[int]:
        """Tokens of one utterance, the best one at each step, at most one per frame."""
        state, last, tokens = self.start(1), SOS_EOS_ID, []
        for _ in range(int(encoded.lens_N[0])):
            log_probs_NV, state = self.step(np.array([last]), state, encoded)
            log_probs_NV[:, BLANK_ID] = -np.inf
            last = int(log_probs_NV[0].argmax())
            if last == SOS_EOS_ID:
                break
            tokens.append(last)
        return tokens

    def log_probs_along(self, encoded: Encoded, tokens: list[int]) -> np.ndarray:
        """(P + 1, V) log-posteriors of each token of one utterance and of the end, given those before."""
        state, steps = self.start(1), []
        for token in [SOS_EOS_ID, *tokens]:
            log_probs_NV, state = self.step(np.array([token]), state, encoded)
            steps.append(log_probs_NV[0])
        return np.stack(steps)

    def _recognised(self, tokens: list[int], score: float | None = None) -> Recognised:
        return Recognised(_spelled(self.pieces[i] for i in tokens), tokens, score)


# ---------------------------------------------------------------- beam search


@dataclass
class Hypotheses:
    """K beginnings of a text.

    Args:
        texts: their tokens.
        base_K: their scores without CTC's part.
        state: of the decoder, before their last tokens.
        ctc: forward variables; None without CTC.
    """

    texts: list[list[int]]
    base_K: np.ndarray
    state: State
    ctc: Prefixes | None


class BeamSearch:
    """Joint CTC/attention search (Watanabe 2017) of one utterance; a text with U tokens scores
    ``(1 - ctc_weight) log p_attention + ctc_weight log p_ctc + length_bonus U``."""

    def __init__(
        self,
        recogniser: Recogniser,
        encoded: Encoded,
        beam: int,
        ctc_weight: float,
        length_bonus: float,
        *,
        max_len_ratio: float = 1.0,
    ) -> None:
        self.recogniser, self.encoded = recogniser, encoded
        self.beam, self.ctc_weight, self.length_bonus = beam, ctc_weight, length_bonus
        num_frames = int(encoded.lens_N[0])
        self.max_len = max(1, int(max_len_ratio * num_frames))
        self.ctc = None
        if ctc_weight > 0 and encoded.ctc_NTV is not None:
            self.ctc = PrefixScorer(encoded.ctc_NTV[0, :num_frames])

    def run(self) -> tuple[list[int], float]:
        """Tokens and score of the best text; ends when no hypothesis can still beat it."""
        ctc = self.ctc.start() if self.ctc else None
        hyps = Hypotheses([[]], np.zeros(1), self.recogniser.start(1), ctc)
        best: tuple[list[int], float] = [], -math.inf
        for length in range(self.max_len + 1):
            tokens_KC, base_KC, end_K = self._grow(hyps)
            total_KC = base_KC
            if self.ctc is not None and hyps.ctc is not None:
                end_K = end_K + self.ctc_weight * self.ctc.whole(hyps.ctc)
                total_KC = base_KC + self.ctc_weight * self.ctc.longer(hyps.ctc, tokens_KC)
            if length == self.max_len:
                total_KC = np.full_like(total_KC, -np.inf)
            rows, columns = _best(np.concatenate([total_KC, end_K[:, None]], axis=1), self.beam)
            ends = columns == total_KC.shape[1]
            for row in rows[ends]:
                if end_K[row] > best[1]:
                    best = hyps.texts[row], float(end_K[row])
            rows, columns = rows[~ends], columns[~ends]
            hope = max(self.length_bonus, 0.0) * (self.max_len - length - 1)
            alive = total_KC[rows, columns] + hope > best[1]
            rows, columns = rows[alive], columns[alive]
            if len(rows) == 0:
                break
            hyps = self._chosen(hyps, rows, tokens_KC[rows, columns], base_KC[rows, columns])
        return best

    def _grow(self, hyps: Hypotheses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidates (K, C), their scores without CTC, and scores (K,) of ending; moves the state on."""
        last_K = np.array([text[-1] if text else SOS_EOS_ID for text in hyps.texts])
        log_probs_KV, hyps.state = self.recogniser.step(last_K, hyps.state, self.encoded)
        attention = 1.0 - self.ctc_weight
        end_K = hyps.base_K + attention * log_probs_KV[:, SOS_EOS_ID].astype(np.float64)
        log_probs_KV[:, [BLANK_ID, SOS_EOS_ID]] = -np.inf
        num_candidates = min(CANDIDATES_PER_BEAM * self.beam, log_probs_KV.shape[1] - 2)
        tokens_KC = np.argsort(-log_probs_KV, axis=1, kind="stable")[:, :num_candidates]
        top_KC = np.take_along_axis(log_probs_KV, tokens_KC, axis=1).astype(np.float64)
        return tokens_KC, hyps.base_K[:, None] + attention * top_KC + self.length_bonus, end_K

    def _chosen(
        self, hyps: Hypotheses, rows_K: np.ndarray, tokens_K: np.ndarray, base_K: np.ndarray
    ) -> Hypotheses:
        texts = [[*hyps.texts[row], token] for row, token in zip(rows_K, tokens_K.tolist(), strict=True)]
        ctc = None
        if self.ctc is not None and hyps.ctc is not None:
            ctc = self.ctc.extend(hyps.ctc, rows_K, tokens_K)
        return Hypotheses(texts, base_K, hyps.state.select(rows_K), ctc)


def _best(scores_KC: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the best finite scores, best first."""
    order = np.argsort(-scores_KC, axis=None, kind="stable")[:num]
    order = order[np.isfinite(scores_KC.ravel()[order])]
    rows, columns = np.unravel_index(order, scores_KC.shape)
    return rows, columns


@dataclass
class Prefixes:
    """CTC's forward variables of K prefixes: last tokens (K,), and log-probabilities (K, T + 1) of the
    paths that end in that token and of those that end in a blank."""

    last_K: np.ndarray
    token_KT: np.ndarray
    blank_KT: np.ndarray


class PrefixScorer:
    """CTC's probability of a text's beginning, summed over its alignments (Watanabe 2017, algorithm 2)."""

    def __init__(self, log_probs_TV: np.ndarray) -> None:
        self.log_probs_VT = np.maximum(log_probs_TV.astype(np.float64), FLOOR).T.copy()
        self.blank_T = self.log_probs_VT[BLANK_ID]

    def start(self) -> Prefixes:
        """The empty prefix."""
        blank_KT = np.concatenate([[0.0], self.blank_T.cumsum()])[None]
        return Prefixes(np.array([BLANK_ID]), np.full_like(blank_KT, -np.inf), blank_KT)

    def whole(self, prefixes: Prefixes) -> np.ndarray:
        """(K,) log-probability that the text is the prefix and no more."""
        whole_K: np.ndarray = np.logaddexp(prefixes.token_KT[:, -1], prefixes.blank_KT[:, -1])
        return whole_K

    def longer(self, prefixes: Prefixes, tokens_KC: np.ndarray) -> np.ndarray:
        """(K, C) log-probability that the text begins with the prefix and then the token."""
        scores_KCT = self._before(prefixes, tokens_KC) + self.log_probs_VT[tokens_KC]
        most_KC1 = scores_KCT.max(-1, keepdims=True).clip(min=-1e30)
        with np.errstate(divide="ignore"):  # log(0) where there are too few frames
            log_sums_KC: np.ndarray = np.log(np.exp(scores_KCT - most_KC1).sum(-1)) + most_KC1[..., 0]
        return log_sums_KC

    def extend(self, prefixes: Prefixes, rows_N: np.ndarray, tokens_N: np.ndarray) -> Prefixes:
        """N new prefixes: the ``rows_N``-th ones, each with a token more."""
        picked = Prefixes(*(x[rows_N] for x in (prefixes.last_K, prefixes.token_KT, prefixes.blank_KT)))
        before_NT = self._before(picked, tokens_N[:, None])[:, 0]
        token_NT = _paths(before_NT, self.log_probs_VT[tokens_N])
        return Prefixes(tokens_N, token_NT, _paths(token_NT[:, :-1], self.blank_T))

    def _before(self, prefixes: Prefixes, tokens_KC: np.ndarray) -> np.ndarray:
        """(K, C, T) log-probability that a path is where the token may begin, before each frame."""
        blank_KT, token_KT = prefixes.blank_KT[:, None, :-1], prefixes.token_KT[:, None, :-1]
        repeated_KC1 = (tokens_KC == prefixes.last_K[:, None])[..., None]
        # the same token twice needs a blank between
        return np.where(repeated_KC1, blank_KT, np.logaddexp(blank_KT, token_KT))


def _paths(enter_NT: np.ndarray, stay_NT: np.ndarray) -> np.ndarray:
    """(N, T + 1) log-probability of being in a state after each frame:
    r[t] = (r[t - 1] + enter[t - 1]) stay[t]."""
    product_NT = stay_NT.cumsum(-1)
    sums_NT = np.logaddexp.accumulate(enter_NT - (product_NT - stay_NT), axis=-1)
    return np.pad(sums_NT + product_NT, ((0, 0), (1, 0)), constant_values=-np.inf)


# ---------------------------------------------------------------- audio


def fbank(samples_S: np.ndarray, num_bins: int) -> np.ndarray:
    """(T, F) log-mel features of 16 kHz samples in [-1, 1], those of Lhotse's ``Fbank``."""
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.frame_opts.window_type = "povey"
    options.mel_opts.num_bins = num_bins
    options.mel_opts.low_freq = 20.0
    options.mel_opts.high_freq = -400.0
    computer: Any = knf.OnlineFbank(options)  # takes arrays; its types speak of sequences only
    computer.accept_waveform(SAMPLE_RATE, np.ascontiguousarray(samples_S, dtype=np.float32))
    computer.input_finished()
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


def resample(samples_S: np.ndarray, sample_rate: int) -> np.ndarray:
    """(S,) to (S',) at 16 kHz by a windowed sinc, that of torchaudio's ``resample``."""
    if sample_rate == SAMPLE_RATE:
        return samples_S
    divisor = math.gcd(sample_rate, SAMPLE_RATE)
    old, new = sample_rate // divisor, SAMPLE_RATE // divisor
    zeros, cutoff = 6, 0.99 * min(old, new)
    width = math.ceil(zeros * old / cutoff)
    times = np.arange(-width, width + old) / old - np.arange(new)[:, None] / new
    times = (times * cutoff).clip(-zeros, zeros)
    kernels = np.sinc(times) * np.cos(times * math.pi / zeros / 2) ** 2 * cutoff / old
    padded = np.pad(samples_S.astype(np.float32), (width, width + old))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])[::old]
    resampled: np.ndarray = (windows @ kernels.T.astype(np.float32)).reshape(-1)
    return resampled[: math.ceil(new * len(samples_S) / old)]


def read_wav(path: Path | str) -> tuple[Iterator[np.ndarray], int]:
    """Samples in blocks (S,) in [-1, 1], channels averaged, and the sampling rate of a WAV file of integers.

    Raises:
        RecogniserError: no such file, or another format.
    """
    try:
        file = wave.open(str(path))  # noqa: SIM115 (closed after its last block)
    except FileNotFoundError:
        raise RecogniserError(f"{path}: there is no such file") from None
    except (wave.Error, EOFError) as error:
        remedy = f"convert it: ffmpeg -i {path} -ar {SAMPLE_RATE} -ac 1 -c:a pcm_s16le out.wav"
        raise RecogniserError(f"{path}: no WAV file of integers ({error}); {remedy}") from None
    return _blocks(file), file.getframerate()


def _blocks(file: wave.Wave_read) -> Iterator[np.ndarray]:
    width, channels = file.getsampwidth(), file.getnchannels()
    with file:
        while data := file.readframes(BLOCK_S * file.getframerate()):
            yield _samples(data, width).reshape(-1, channels).mean(axis=1)


def _samples(data: bytes, width: int) -> np.ndarray:
    """In [-1, 1], of integers of ``width`` bytes each."""
    if width == 1:
        samples = np.frombuffer(data, dtype=np.uint8).astype(np.float32) / 128 - 1
    else:
        raw = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
        wide = np.zeros((len(raw), 4), dtype=np.uint8)
        wide[:, 4 - width :] = raw  # integers of any width as the upper bytes of 32 bits
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return samples


# ---------------------------------------------------------------- files


def _session(path: Path, num_threads: int) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise RecogniserError(f"{path}: there is no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types, one for every kind of damage
        raise RecogniserError(f"{path}: onnxruntime can't load the model: {error}") from error


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(output) for output in session.run(None, inputs)]


def _spelled(pieces: Iterable[str]) -> str:
    """The text of tokens, of which some may be single bytes (``<0x41>``)."""
    parts = (
        bytes([int(piece[3:5], 16)])
        if re.fullmatch("<0x[0-9A-F]{2}>", piece)
        else piece.replace("\u2581", " ").encode()
        for piece in pieces
    )
    return b"".join(parts).decode("utf-8", "ignore").strip()


def _read_pieces(path: Path) -> list[str]:
    if not path.is_file():
        raise RecogniserError(f"{path}: there is no such file")
    by_id: dict[int, str] = {}
    try:
        # split at line feeds and nowhere else: a token may hold U+2028
        for line in path.read_bytes().decode("utf-8").removesuffix("\n").split("\n"):
            piece, _, number = line.rpartition(" ")
            by_id[int(number)] = piece
        return [by_id[i] for i in range(len(by_id))]
    except (ValueError, KeyError):
        raise RecogniserError(f"{path}: no complete list of tokens: copy that of the export stage") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description="Recognise WAV files with the model beside this file.")
    parser.add_argument("audio", nargs="+", help="WAV files of any sampling rate")
    parser.add_argument(
        "--variant", choices=FILES, help=f"default: the last that is there of {', '.join(FILES)}"
    )
    parser.add_argument("--beam", type=int, help="hypotheses kept in a beam search; default: greedy search")
    parser.add_argument("--ctc-weight", type=float, default=0.3, help="share of CTC in a beam search")
    parser.add_argument("--longest", type=float, default=LONGEST_S, help="seconds that are recognised as one")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.beam == 0 or (options.beam or 1) < 1 or not 0 <= options.ctc_weight < 1:
        parser.error("--beam must be at least 1, and --ctc-weight in [0, 1)")
    if not options.longest >= 1:
        parser.error("--longest must be at least 1")
    try:
        here = Path(__file__).resolve().parent
        recogniser = Recogniser.load(here, options.variant, num_threads=options.threads)
        for file in options.audio:
            blocks, rate = read_wav(file)
            found = recogniser.recognise(
                blocks, rate, longest_s=options.longest, beam=options.beam, ctc_weight=options.ctc_weight
            )
            print(f"{file}: {found.text}", flush=True)
    except RecogniserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

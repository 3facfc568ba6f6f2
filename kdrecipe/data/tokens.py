"""Tokens: a model that makes them of text and the list of its pieces, the same for every model of a recipe.

The model is SentencePiece's, learnt from the training text, or another model's byte-level BPE. Ids 0, 1 and 2
are ``<blk>``, ``<sos/eos>`` and ``<unk>``; pieces follow. ``tokens.txt`` holds a ``piece id`` per line, which
is what sherpa-onnx reads.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import sentencepiece as spm

from kdrecipe.artifacts import sha256_bytes, write_atomic
from kdrecipe.data.byte_bpe import ByteBpe
from kdrecipe.errors import DataError, KdrecipeError, RecipeError
from kdrecipe.interfaces import BLANK_ID, SOS_EOS_ID, UNK_ID
from kdrecipe.text import WORD_START, clean, excerpt, read_lines

TokenKind = Literal["bpe", "unigram", "char"]

SPECIALS = ("<blk>", "<sos/eos>", "<unk>")

RESERVED = frozenset({"SIL", "<s>", "</s>", "<eps>", "<blank>", *SPECIALS})
"""Names that a runtime takes for something else than text: sherpa-onnx leaves ``SIL`` and ``</s>`` out of
what CTC says. Training gives no such piece to any text."""

# SentencePiece drops longer lines (in bytes) without a word; its default is 4192.
_MAX_LINE_BYTES = 1 << 20


class TokenModel(Protocol):
    """What makes tokens of text; ids of text begin at 3."""

    file: ClassVar[str]
    """Name of its file."""
    what: ClassVar[str]
    """What it is, in a message."""
    content: bytes

    @property
    def pieces(self) -> list[str]:
        """Names of the tokens from id 3, as runtimes read them."""

    def encode(self, text: str) -> list[int]:
        """Ids of a clean text, :data:`UNK_ID` among them if it knows no better."""

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids from 3 on, with the space before its first word."""


class SentencePieceModel:
    """SentencePiece with :data:`SPECIALS` as its first pieces; RuntimeError if ``content`` is no such."""

    file: ClassVar[str] = "spm.model"
    what: ClassVar[str] = "SentencePiece model"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._processor = spm.SentencePieceProcessor(model_proto=content)
        names = [self._name(i) for i in range(len(self._processor))]
        if tuple(names[: len(SPECIALS)]) != SPECIALS:
            raise RuntimeError("its first pieces are others")
        self.pieces: list[str] = names[len(SPECIALS) :]

    def encode(self, text: str) -> list[int]:
        """See :class:`TokenModel`."""
        return [UNK_ID if i in (BLANK_ID, SOS_EOS_ID) else int(i) for i in self._processor.encode(text)]

    def spell(self, ids: Sequence[int]) -> str:
        """See :class:`TokenModel`; SentencePiece itself drops the space before the first word."""
        space = " " if ids and self.pieces[ids[0] - len(SPECIALS)].startswith(WORD_START) else ""
        return space + str(self._processor.decode(list(ids)))

    def _name(self, i: int) -> str:
        piece = str(self._processor.id_to_piece(i))
        return f"<unused:{piece}>" if piece in RESERVED and self._processor.is_unused(i) else piece


MODELS: tuple[type[SentencePieceModel | ByteBpe], ...] = (SentencePieceModel, ByteBpe)
"""Kinds of token models; a directory's is the one whose file is there."""


class Tokenizer:
    """Text to token ids and back; made by :meth:`train`, :meth:`trimmed` or :meth:`load`.

    Args:
        model: what makes the tokens, or the content of a SentencePiece model.
    """

    def __init__(self, model: TokenModel | bytes) -> None:
        self.model: TokenModel = SentencePieceModel(model) if isinstance(model, bytes) else model
        self.pieces: list[str] = [*SPECIALS, *self.model.pieces]
        self.vocab_id: str = vocab_id(self.pieces)
        """Identifies the token list: equal ids mean equal pieces in equal order."""

    @classmethod
    def train(cls, texts: Iterable[str], kind: TokenKind, vocab_size: int | None, out_dir: Path) -> Tokenizer:
        """Learn tokens from ``texts`` and write them to ``out_dir``; equal texts give equal files.

        A piece that would be called as one of :data:`RESERVED` keeps its id, unused: ``<unused:SIL>``.

        Args:
            texts: training transcripts, in any order that is always the same.
            kind: ``bpe``, ``unigram`` or ``char``.
            vocab_size: number of tokens with the three special ones; for ``char`` None takes
                every character, a number the commonest ones (others become ``<unk>``).
            out_dir: gets ``spm.model`` and ``tokens.txt``.

        Raises:
            DataError: there is no text.
            RecipeError: ``vocab_size`` does not suit this text.
        """
        lines = [line for line in map(clean, texts) if line]
        if not lines:
            raise DataError(
                "no text to learn tokens from",
                where="tokens",
                remedy="look at the train split's supervisions: every text is empty",
            )
        if vocab_size is None and kind != "char":
            raise RecipeError(f"vocab_size is missing for {kind} tokens", where="tokens.vocab_size")
        tokenizer = cls(_without_reserved(_train_sentencepiece(lines, kind, vocab_size)))
        tokenizer.save(out_dir)
        return tokenizer

    @classmethod
    def trimmed(cls, tokenizer_json: Path, texts: Iterable[str], out_dir: Path) -> Tokenizer:
        """Take the tokens that a teacher's own tokeniser makes of ``texts``, and write them to ``out_dir``.

        Args:
            tokenizer_json: of a Hugging Face model with byte-level BPE, such as Whisper.
            texts: training transcripts.
            out_dir: gets ``bpe.json`` and ``tokens.txt``.

        Raises:
            DataError: there is no text.
            RecipeError: the file is not there, or has tokens of another kind.
        """
        tokenizer = cls(ByteBpe.trimmed(tokenizer_json, texts, RESERVED))
        tokenizer.save(out_dir)
        return tokenizer

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Read what :meth:`save` wrote.

        Raises:
            KdrecipeError: a file is missing or damaged, or the two do not belong together.
        """
        directory = Path(directory)
        path = model_file(directory)
        kind = next(kind for kind in MODELS if kind.file == path.name)
        remedy = "rerun the tokens stage (or, in a bundle, the stage that wrote it) with --force"
        try:
            tokenizer = cls(kind(path.read_bytes()))
            listed = (directory / "tokens.txt").read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise KdrecipeError("missing file", where=str(error.filename), remedy=remedy) from None
        except (RuntimeError, ValueError, KeyError, TypeError):
            raise KdrecipeError(f"not a {kind.what}", where=str(path), remedy=remedy) from None
        if listed != tokenizer.tokens_txt:
            raise KdrecipeError(
                f"tokens.txt does not list {path.name}'s pieces", where=str(path), remedy=remedy
            )
        return tokenizer

    def save(self, directory: Path | str) -> None:
        """Write the model's file and ``tokens.txt``."""
        write_atomic(Path(directory) / self.model.file, self.model.content)
        write_atomic(Path(directory) / "tokens.txt", self.tokens_txt)

    @property
    def tokens_txt(self) -> str:
        """Content of ``tokens.txt``."""
        return tokens_txt(self.pieces)

    @property
    def origin(self) -> list[int | None] | None:
        """By id, the id of the teacher that the tokens were trimmed from, None of those that it lacks; None:
        they were learnt."""
        return self.model.origin if isinstance(self.model, ByteBpe) else None

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, by :func:`kdrecipe.text.clean`.

        Unknown characters become ``<unk>``, and blank never occurs.
        """
        return self.model.encode(clean(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; blanks and sentence marks are left out.

        An unknown one is ``<unk>`` within its word, as runtimes write it, whatever the model's own sign is.
        """
        parts: list[list[int]] = [[]]
        for i in map(int, ids):
            if i == UNK_ID:
                parts.append([])
            elif i not in (BLANK_ID, SOS_EOS_ID):
                parts[-1].append(i)
        return clean(SPECIALS[UNK_ID].join(map(self.model.spell, parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (type(self.model), self.model.content)


def _loaded(kind: type[SentencePieceModel | ByteBpe], content: bytes) -> Tokenizer:
    return Tokenizer(kind(content))


def model_file(directory: Path) -> Path:
    """The file of a directory's token model; that of SentencePiece where there is none."""
    paths = [directory / kind.file for kind in MODELS]
    return next((path for path in paths if path.is_file()), paths[0])


def _train_sentencepiece(lines: list[str], kind: TokenKind, vocab_size: int | None) -> bytes:
    """A serialised model with :data:`SPECIALS` first."""
    out = io.BytesIO()
    num_chars = len(set("".join(lines)))
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type=kind,
            vocab_size=num_chars + 16 if vocab_size is None else vocab_size,
            hard_vocab_limit=kind != "char",
            character_coverage=1.0,
            user_defined_symbols=[SPECIALS[BLANK_ID], SPECIALS[SOS_EOS_ID]],
            unk_id=UNK_ID,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",  # the default, NFKC, makes ABC of full-width letters
            byte_fallback=False,
            shuffle_input_sentence=False,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,  # with more, the order of equally good pieces may change from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocab_error(str(error), kind, vocab_size, lines) from error
    return out.getvalue()


def _without_reserved(model: bytes) -> bytes:
    """The model with pieces of :data:`RESERVED` unused: texts are spelled with others in their place.

    SentencePiece still builds longer pieces of them, so that ``▁TONSIL`` is found as before.
    """
    processor = spm.SentencePieceProcessor(model_proto=model)
    found = [i for i in range(len(SPECIALS), len(processor)) if processor.id_to_piece(i) in RESERVED]
    if not found:
        return model
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # made at run time, which mypy can't see
    proto = protocol.ModelProto.FromString(model)
    for i in found:
        proto.pieces[i].type = protocol.ModelProto.SentencePiece.UNUSED
    return bytes(proto.SerializeToString(deterministic=True))


def _extent(lines: list[str]) -> str:
    """How much text there is, the first thing to look at where it is too little."""
    sentences, words = set(lines), {word for line in lines for word in line.split()}
    if len(sentences) == 1:
        return f"every training transcript is {excerpt(lines[0], 40)!r}"
    counts = f"{len(sentences)} different transcripts of {len(words)} different words"
    return f"the training text has {counts} and {len(set(''.join(lines)) - {' '})} characters"


def _vocab_error(message: str, kind: str, vocab_size: int | None, lines: list[str]) -> KdrecipeError:
    """SentencePiece's complaint in the recipe's words, what the text is like before what is asked of it."""
    where = "tokens.vocab_size"
    num_chars = len(set("".join(lines)))
    if found := re.search(r"size too high.*<= (\d+)", message):
        return RecipeError(
            f"{_extent(lines)}: it yields {found[1]} {kind} tokens at most, not {vocab_size}",
            where=where,
            remedy=f"look at the transcripts, use more text, or set vocab_size to {found[1]} or less",
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return RecipeError(
            f"{vocab_size} {kind} tokens are too few: the text has {num_chars} different characters",
            where=where,
            remedy=f"set vocab_size to more than {found[1]}, or clean the text of rare characters",
        )
    return KdrecipeError(f"SentencePiece can't learn {vocab_size} {kind} tokens: {message}", where=where)


def tokens_txt(pieces: Sequence[str]) -> str:
    """Content of a ``tokens.txt``."""
    return "".join(f"{piece} {index}\n" for index, piece in enumerate(pieces))


def vocab_id(pieces: Sequence[str]) -> str:
    """Identifies a list of tokens: equal ids mean equal pieces in equal order."""
    return sha256_bytes(tokens_txt(pieces).encode())[:16]


def read_pieces(path: Path) -> list[str]:
    """The tokens of a ``tokens.txt`` by id.

    Raises:
        KdrecipeError: there is no such file, or it is no complete list.
    """
    if not path.is_file():
        raise KdrecipeError(
            "there is no such file",
            where=str(path),
            remedy="give what the export stage wrote: the model with its tokens.txt beside it",
        )
    by_id: dict[int, str] = {}
    try:
        for line in read_lines(path):
            piece, _, number = line.rpartition(" ")
            by_id[int(number)] = piece
        return [by_id[i] for i in range(max(1, len(by_id)))]
    except (ValueError, KeyError):  # a line without a number, a number left out, or no text at all
        raise KdrecipeError(
            f"no list of tokens: line {len(by_id) + 1} or what follows is damaged",
            where=str(path),
            remedy="copy the tokens.txt that the export stage wrote beside the model",
        ) from None


def ids_by_name(pieces: Sequence[str]) -> dict[str, int]:
    """Token ids by the names that runtimes give them in a result.

    These are the piece, or with a space for its word-start mark, and of a byte (``<0x41>``) its letter.
    """
    spaced = {piece: " " + piece[1:] for piece in pieces if piece.startswith(WORD_START)}
    ids = {name: i for i, piece in enumerate(pieces) for name in (piece, spaced.get(piece, piece))}
    for i, piece in enumerate(pieces):
        if re.fullmatch("<0x[2-7][0-9A-F]>", piece):
            ids.setdefault(chr(int(piece[3:5], 16)), i)
    return ids

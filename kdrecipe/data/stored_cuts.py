"""The cuts of a split, read from the disk one at a time: what the plan of batches needs is in an index.

The index (:mod:`kdrecipe.data.cut_index`) takes 60 bytes per cut in memory, where a cut as Lhotse's
object takes 2,500.

N cuts.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from kdrecipe.artifacts import write_gz_blocks
from kdrecipe.data.cut_index import COPY, FEATURES, TEXT, CutIndex, hash_of
from kdrecipe.errors import DataError

if TYPE_CHECKING:
    from lhotse.cut import Cut, MonoCut


class Cuts(Protocol):
    """What :class:`kdrecipe.data.batches.CutBatches` asks; cuts are counted from 0."""

    @property
    def durations_s(self) -> np.ndarray:
        """(N,) float64."""

    @property
    def has_text(self) -> np.ndarray:
        """(N,) bool."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Cut: ...

    def id(self, number: int) -> str:
        """Of a cut."""

    def number(self, cut_id: str) -> int:
        """The opposite; KeyError where there is no such cut."""

    def among(self, ids: Set[str]) -> np.ndarray:
        """(N,) bool: whose ids are among these."""

    def fault(self) -> DataError | None:
        """What keeps batches from being made of them: two of one id, one without features."""


class HeldCuts:
    """Cuts that are in memory."""

    def __init__(self, cuts: Iterable[Cut]) -> None:
        self._cuts = list(cuts)
        self._numbers = {cut.id: number for number, cut in enumerate(self._cuts)}
        self.durations_s = np.array([cut.duration for cut in self._cuts])
        self.has_text = np.array([any(s.text for s in cut.supervisions) for cut in self._cuts], bool)

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, number: int) -> Cut:
        return self._cuts[number]

    def id(self, number: int) -> str:
        """See :class:`Cuts`."""
        return str(self._cuts[number].id)

    def number(self, cut_id: str) -> int:
        """See :class:`Cuts`."""
        return self._numbers[cut_id]

    def among(self, ids: Set[str]) -> np.ndarray:
        """See :class:`Cuts`."""
        return np.array([cut.id in ids for cut in self._cuts], bool)

    def fault(self) -> DataError | None:
        """See :class:`Cuts`."""
        if len(self._numbers) != len(self._cuts):
            return _same_id()
        return next((_no_features(cut.id) for cut in self._cuts if not cut.has_features), None)


def _same_id() -> DataError:
    return DataError("the same cut id occurs more than once", remedy="run the prepare stage again")


def _no_features(cut_id: str) -> DataError:
    return DataError("the cut has no features", where=cut_id, remedy="run the features stage")


# ---------------------------------------------------------------- cuts by the index


class StoredCuts:
    """The cuts of a manifest, or some of them, in its order.

    Args:
        path: ``<split>.jsonl.gz``. Paths in it are relative to its folder.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = str(path.parent.absolute())
        self._texts: Mapping[str, str] = {}
        self._numbers: np.ndarray | None = None
        self._last: tuple[int, list[bytes]] = (-1, [])
        self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115  (as long as the index)
        place = path.with_name(path.name.removesuffix(".jsonl.gz") + ".index.npz")
        index = CutIndex.load(place, self._file)
        if index is None:
            try:
                index = CutIndex.of(self._file)
                if index is None:  # as Lhotse writes them: a copy in blocks, for as long as the index
                    self._file = _in_blocks(path)
                    index = CutIndex.of(self._file)
                    if index is None:
                        raise ValueError("a line is longer than a cut can be")
                else:
                    index.save(place)
            except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
                raise self._damaged(error) from error
        assert index is not None
        self._index = index
        weakref.finalize(index, self._file.close)

    def _damaged(self, error: Exception) -> DataError:
        said = f"the file is damaged: {type(error).__name__}: {error}"
        return DataError(said, where=str(self._path), remedy="rerun the features stage with --force")

    def __len__(self) -> int:
        return len(self._index.flags if self._numbers is None else self._numbers)

    def __getitem__(self, number: int) -> MonoCut:
        stored = self._stored(number)
        block = int(np.searchsorted(self._index.block_firsts, stored, side="right")) - 1
        return self._cut(stored, self._lines(block)[stored - int(self._index.block_firsts[block])])

    def __iter__(self) -> Iterator[MonoCut]:
        return (self[number] for number in range(len(self)))

    def _stored(self, number: int) -> int:
        """Of a cut of these, its number in the file."""
        return number if self._numbers is None else int(self._numbers[number])

    def _picked(self, stored: np.ndarray) -> np.ndarray:
        """Of values for each cut in the file, those of these cuts."""
        return stored if self._numbers is None else stored[self._numbers]

    def _lines(self, block: int) -> list[bytes]:
        known, lines = self._last  # read together: another thread may put another block there
        if known != block:
            start, end = self._index.block_starts[block : block + 2].tolist()
            try:
                lines = zlib.decompress(os.pread(self._file.fileno(), end - start, start), 31).splitlines()
            except (OSError, zlib.error) as error:
                raise self._damaged(error) from error
            self._last = (block, lines)
        return lines

    def _cut(self, stored: int, line: bytes) -> MonoCut:
        from lhotse.serialization import deserialize_item

        item = _placed(json.loads(line), self._folder)
        if self._texts and (text := self._texts.get(self._original_id(stored))) is not None:
            [supervision] = item["supervisions"]
            supervision["text"] = text
        cut: MonoCut = deserialize_item(item)
        return cut

    # ------------------------------------------------------------ what the index has

    @property
    def durations_s(self) -> np.ndarray:
        """(N,) float64."""
        return self._picked(self._index.durations_s)

    @property
    def has_text(self) -> np.ndarray:
        """(N,) bool."""
        found = self._picked(self._index.flags & TEXT > 0)
        if not self._texts:
            return found
        pairs = zip(self.original_ids(), found.tolist(), strict=True)
        return np.array([bool(self._texts.get(i, known)) for i, known in pairs], bool)

    @property
    def ids(self) -> Iterator[str]:
        """Of all, in their order."""
        return map(self.id, range(len(self)))

    def id(self, number: int) -> str:
        """See :class:`Cuts`."""
        return self._stored_id(self._stored(number))

    def _stored_id(self, stored: int) -> str:
        start, end = self._index.id_starts[stored : stored + 2].tolist()
        return self._index.ids[start:end].tobytes().decode()

    def original_ids(self) -> Iterator[str]:
        """Of each cut, or of that which it is a copy of."""
        return (self._original_id(self._stored(number)) for number in range(len(self)))

    def _original_id(self, stored: int) -> str:
        cut_id = self._stored_id(stored)
        return cut_id.rpartition("_sp")[0] if self._index.flags[stored] & COPY else cut_id

    def number(self, cut_id: str) -> int:
        """See :class:`Cuts`."""
        stored = self._find(cut_id)
        if stored is None:
            raise KeyError(cut_id)
        if self._numbers is None:
            return stored
        place = int(np.searchsorted(self._numbers, stored))
        if place == len(self._numbers) or self._numbers[place] != stored:
            raise KeyError(cut_id)
        return place

    def _find(self, cut_id: str) -> int | None:
        key, hashes = np.uint64(hash_of(cut_id.encode())), self._index.hashes
        place = int(np.searchsorted(hashes, key))
        while place < len(hashes) and hashes[place] == key:
            stored = int(self._index.by_hash[place])
            if self._stored_id(stored) == cut_id:
                return stored
            place += 1
        return None

    def fault(self) -> DataError | None:
        """See :class:`Cuts`."""
        hashes, by_hash = self._index.hashes, self._index.by_hash
        alike = np.flatnonzero(hashes[1:] == hashes[:-1]).tolist()
        if any(self._stored_id(int(by_hash[i])) == self._stored_id(int(by_hash[i + 1])) for i in alike):
            return _same_id()
        without = np.flatnonzero(self._picked(self._index.flags & FEATURES == 0))
        return _no_features(self.id(int(without[0]))) if len(without) else None

    # ------------------------------------------------------------ some of them

    def all(self) -> Chosen:
        """The ids of all cuts."""
        return Chosen(self, self._mask(slice(None) if self._numbers is None else self._numbers))

    def copies(self) -> Chosen:
        """The ids of cuts in the file that are others at another speed."""
        return Chosen(self, self._index.flags & COPY > 0)

    def chosen(self, ids: Iterable[str]) -> Chosen:
        """Those of ``ids`` that the file has."""
        if isinstance(ids, Chosen):
            return Chosen(self, ids.of(self))
        found = [stored for cut_id in ids if (stored := self._find(cut_id)) is not None]
        return Chosen(self, self._mask(np.array(found, np.int64)))

    def _mask(self, where: Any) -> np.ndarray:
        mask = np.zeros(len(self._index.flags), bool)
        mask[where] = True
        return mask

    def select(self, chosen: Chosen) -> StoredCuts:
        """Only these."""
        mask = chosen.of(self) & self.all().of(self)
        return self._changed(_numbers=None if mask.all() else np.flatnonzero(mask).astype(np.int32))

    def with_texts(self, texts: Mapping[str, str]) -> StoredCuts:
        """With these transcripts, by the id of the cut or of that which it is a copy of."""
        return self._changed(_texts=dict(texts))

    def _changed(self, **attributes: Any) -> StoredCuts:
        other = object.__new__(StoredCuts)
        other.__dict__.update(self.__dict__, **attributes)
        return other

    def among(self, ids: Set[str]) -> np.ndarray:
        """See :class:`Cuts`."""
        return self._picked(self.chosen(ids).of(self))

    def same_file(self, other: StoredCuts) -> bool:
        """Whether they are cuts of one manifest."""
        return self._path == other._path and len(self._index.flags) == len(other._index.flags)


def _in_blocks(path: Path) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (the caller's)
    with gzip.open(path) as lines:
        write_gz_blocks(file, (line.rstrip(b"\n") + b"\n" for line in lines))
    file.seek(0)
    return file


def _placed(item: dict[str, Any], folder: str) -> dict[str, Any]:
    """A stored cut with paths below ``folder``: done to Lhotse's objects, it took as long as all the rest."""
    if features := item.get("features"):
        # One text for all: there are few of these paths, and many cuts.
        features["storage_path"] = sys.intern(os.path.join(folder, features["storage_path"]))
    for source in item.get("recording", {}).get("sources", ()):
        if source["type"] == "file":
            source["source"] = os.path.join(folder, source["source"])
    return item


class Chosen(Set[str]):
    """Ids of some cuts of a manifest, as a set that has a byte per cut of the manifest."""

    def __init__(self, cuts: StoredCuts, mask: np.ndarray) -> None:
        self._cuts, self._mask = cuts, mask

    def of(self, cuts: StoredCuts) -> np.ndarray:
        """A truth value for each cut of the manifest that ``cuts`` are from."""
        return self._mask if cuts.same_file(self._cuts) else cuts.chosen(iter(self))._mask

    def __contains__(self, cut_id: object) -> bool:
        stored = self._cuts._find(cut_id) if isinstance(cut_id, str) else None
        return stored is not None and bool(self._mask[stored])

    def __iter__(self) -> Iterator[str]:
        return map(self._cuts._stored_id, np.flatnonzero(self._mask).tolist())

    def __len__(self) -> int:
        return int(self._mask.sum())

    @classmethod
    def _from_iterable(cls, ids: Iterable[Any]) -> Any:
        return set(ids)

    def __or__(self, other: Set[Any]) -> Any:
        if not isinstance(other, Chosen):
            return super().__or__(other)
        return Chosen(self._cuts, self._mask | other.of(self._cuts))

    def __sub__(self, other: Set[Any]) -> Any:
        return Chosen(self._cuts, self._mask & ~self._cuts.chosen(other).of(self._cuts))

"""Many small arrays in a few files, written once, each with a checksum; a killed writer resumes.

::

    index.jsonl      a line per item: {"id", "arrays": {name: [shard, offset, dtype, shape, crc32]}, ...}
    00000.bin, ...   the arrays' bytes, one after the other

An item is there when its group's last line is: what a kill left behind after that is cut off. Files hold
the same bytes whether or not the writer was interrupted.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from kdrecipe.errors import DataError

SHARD_BYTES = 64_000_000
INDEX = "index.jsonl"
_LAST = "end_of_group"

Item = Mapping[str, Any]
"""A line of the index."""


def _shard(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.bin"


class ShardWriter:
    """Writes items in groups; a context manager.

    Args:
        directory: continues after the last whole group that is there.
        shard_bytes: a file is full when it has so many, or would with the next array.

    Attributes:
        written: ids of the items that there were at the start.
    """

    def __init__(self, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self._limit = shard_bytes
        self._number, self._offset = 0, 0
        self.written: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)
        self._take_up()
        self._index: IO[bytes] = open(directory / INDEX, "ab")  # noqa: SIM115  (closed by __exit__)
        self._data: IO[bytes] = open(_shard(directory, self._number), "ab")  # noqa: SIM115

    def _take_up(self) -> None:
        """Cut off what is no whole group."""
        path, group, read, good = self.directory / INDEX, [], 0, 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            item = _parsed(line)
            if item is None:
                break
            read += len(line)
            group.append(item)
            if item.get(_LAST):
                good = read
                self._count(group)
                group = []
        if path.exists():
            os.truncate(path, good)
        for file in self.directory.glob("*.bin"):
            if file > _shard(self.directory, self._number):
                file.unlink()
        if _shard(self.directory, self._number).exists():
            os.truncate(_shard(self.directory, self._number), self._offset)

    def _count(self, group: Sequence[Item]) -> None:
        for item in group:
            self.written.add(item["id"])
            for shard, offset, dtype, shape, _ in item["arrays"].values():
                size = offset + np.dtype(dtype).itemsize * int(np.prod(shape))
                self._number, self._offset = max((self._number, self._offset), (shard, size))

    def add(self, items: Sequence[tuple[Mapping[str, Any], Mapping[str, np.ndarray]]]) -> None:
        """A group of items: what the index says of each, ``id`` among it, and its arrays."""
        lines = []
        for number, (facts, arrays) in enumerate(items, 1):
            entries = {name: self._append(np.ascontiguousarray(a)) for name, a in arrays.items()}
            last = {_LAST: True} if number == len(items) else {}
            lines.append(json.dumps({**facts, "arrays": entries, **last}, ensure_ascii=False) + "\n")
        self._data.flush()
        self._index.write("".join(lines).encode())
        self._index.flush()

    def _append(self, array: np.ndarray) -> list[Any]:
        data = array.tobytes()
        if self._offset and self._offset + len(data) > self._limit:
            self._data.close()
            self._number, self._offset = self._number + 1, 0
            self._data = open(_shard(self.directory, self._number), "wb")  # noqa: SIM115
        self._data.write(data)
        entry = [self._number, self._offset, array.dtype.str, list(array.shape), zlib.crc32(data)]
        self._offset += len(data)
        return entry

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()
        self._index.close()


class Shards:
    """What a :class:`ShardWriter` wrote, by id.

    Lines of the index are kept as bytes and parsed when asked for: of a million items, that is the memory
    of the file.

    Args:
        directory: of the shards.

    Raises:
        DataError: the index is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / INDEX
        if not path.is_file():
            raise DataError("the index of its arrays is missing", where=str(path))
        self._lines: dict[str, bytes] = {}
        for line in path.read_bytes().splitlines():
            self._lines[_id(line)] = line
        self._file = cache(self._open)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def item(self, item_id: str) -> Item:
        """What the index says of it."""
        found = _parsed(self._lines[item_id])
        assert found is not None
        return found

    def arrays(self, item_id: str, prefix: str) -> dict[str, np.ndarray]:
        """Its arrays whose names begin with ``prefix``, by the rest of their names; empty if none do.

        Raises:
            DataError: the file is missing, cut short, or its bytes are not those that were written.
        """
        entries = self.item(item_id)["arrays"]
        found = {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}
        return {name: self._load(item_id, *entry) for name, entry in found.items()}

    def _load(
        self, item_id: str, shard: int, offset: int, dtype: str, shape: list[int], crc: int
    ) -> np.ndarray:
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        data = os.pread(self._file(shard).fileno(), size, offset)
        if zlib.crc32(data) != crc:
            raise DataError(
                f"{_shard(self.directory, shard).name} is damaged: bytes {offset} to {offset + size} are not "
                "those that were written",
                where=item_id,
                remedy="compute them again: delete the directory, or run with --force",
            )
        return np.frombuffer(data, dtype).reshape(shape)

    def _open(self, shard: int) -> IO[bytes]:
        path = _shard(self.directory, shard)
        try:
            return open(path, "rb")
        except FileNotFoundError as error:
            raise DataError("the file is missing", where=str(path)) from error


def _id(line: bytes) -> str:
    found = _parsed(line)
    if found is None:
        raise DataError("a line of the index of arrays is damaged", where=line[:60].decode(errors="replace"))
    return str(found["id"])


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the index; None if it is not whole."""
    try:
        item = json.loads(line)
    except ValueError:
        return None
    return (
        item
        if isinstance(item, dict) and {"id", "arrays"} <= item.keys() and line.rstrip()[-1:] == b"}"
        else None
    )

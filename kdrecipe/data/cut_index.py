"""The index of a manifest of cuts: where each is in the file, its id, its duration.

``<split>.index.npz`` lies beside ``<split>.jsonl.gz``, which is written in blocks (see
:func:`kdrecipe.artifacts.write_gz_blocks`). It has the checksum of each block, so an index that belongs
to another file is known by it; times do not count, and equal manifests have equal indexes.

N cuts.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from kdrecipe.artifacts import replacing
from kdrecipe.errors import KdrecipeError

TEXT, FEATURES, COPY = 1, 2, 4
"""Flags: it has a transcript, it has features, it is another cut at another speed."""

_LARGEST_BLOCK = 4 << 20  # bytes, unpacked: more to unpack for one cut would be too slow
_CHUNK = 1 << 16


@dataclass(frozen=True)
class CutIndex:
    """Of a manifest, as it is stored."""

    block_starts: np.ndarray  # blocks + 1, int64: bytes into the file
    block_firsts: np.ndarray  # blocks + 1, int64: the number of the first cut
    checksums: np.ndarray  # blocks, uint32: as gzip has them
    durations_s: np.ndarray  # N, float64
    flags: np.ndarray  # N, uint8
    ids: np.ndarray  # uint8: UTF-8 of all ids, one after another
    id_starts: np.ndarray  # N + 1, int64
    hashes: np.ndarray  # N, uint64: of the ids, sorted
    by_hash: np.ndarray  # N, int32: the numbers of the cuts in that order

    @classmethod
    def of(cls, file: IO[bytes]) -> CutIndex | None:
        """Of a file of blocks; None if it is not in blocks."""
        block_starts, block_firsts, checksums = array("q", [0]), array("q"), array("I")
        durations_s, flags, ids = array("d"), bytearray(), bytearray()
        id_starts, hashes = array("q", [0]), array("Q")
        for _, end, text in _blocks(file):
            if len(text) > _LARGEST_BLOCK or (text and not text.endswith(b"\n")):
                return None
            block_firsts.append(len(durations_s))
            checksums.append(zlib.crc32(text))
            block_starts.append(end)
            for line in text.splitlines():
                cut = json.loads(line)
                cut_id = cut["id"].encode()
                ids += cut_id
                id_starts.append(len(ids))
                hashes.append(hash_of(cut_id))
                durations_s.append(cut["duration"])
                flags.append(_flags(cut))
        block_firsts.append(len(durations_s))
        unsorted = np.frombuffer(hashes, np.uint64) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(unsorted, kind="stable")
        return cls(
            np.array(block_starts, np.int64),
            np.array(block_firsts, np.int64),
            np.array(checksums, np.uint32),
            np.array(durations_s, np.float64),
            np.frombuffer(bytes(flags), np.uint8),
            np.frombuffer(bytes(ids), np.uint8),
            np.array(id_starts, np.int64),
            unsorted[order],
            order.astype(np.int32),
        )

    @classmethod
    def load(cls, path: Path, file: IO[bytes]) -> CutIndex | None:
        """What is stored in ``path``; None where that is no index of ``file``."""
        try:
            with np.load(path) as stored:
                found = cls(*(stored[field.name] for field in fields(cls)))
        except (OSError, ValueError, KeyError, zlib.error, EOFError):
            return None
        except Exception as error:  # zipfile's own, imported by NumPy alone
            if type(error).__name__ != "BadZipFile":
                raise
            return None
        size = os.fstat(file.fileno()).st_size
        if not len(found.block_starts) or size != found.block_starts[-1]:
            return None
        ends = found.block_starts[1:].tolist()
        stated = b"".join(os.pread(file.fileno(), 4, end - 8) for end in ends)
        return found if stated == found.checksums.astype("<u4").tobytes() else None

    def save(self, path: Path) -> None:
        """Write it, if that can be done; the same index gives the same bytes."""
        try:
            with replacing(path) as part, open(part, "wb") as file:
                np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        except (OSError, KdrecipeError):  # a folder of somebody else's: it is made anew each time
            return


def _flags(cut: Mapping[str, Any]) -> int:
    speeds = (t for t in cut.get("recording", {}).get("transforms") or () if t.get("name") == "Speed")
    has_text = any(supervision.get("text") for supervision in cut.get("supervisions", ()))
    return TEXT * has_text | FEATURES * ("features" in cut) | COPY * any(True for _ in speeds)


def hash_of(cut_id: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(cut_id, digest_size=8).digest(), "little")


def _blocks(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """First byte, end and unpacked content of each gzip member, one cut off where it is too large."""
    at, data = 0, b""
    while data or (data := file.read(_CHUNK)):
        start, text, unpack = at, bytearray(), zlib.decompressobj(31)
        while not unpack.eof and len(text) <= _LARGEST_BLOCK:
            data = data or file.read(_CHUNK)
            if not data:
                raise EOFError("the file is cut short")
            text += unpack.decompress(data)
            at += len(data) - len(unpack.unused_data)
            data = unpack.unused_data
        yield start, at, bytes(text)

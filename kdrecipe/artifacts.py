"""Files that are whole or absent: atomic writes, hashes, fingerprints, disk sizes."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kdrecipe.errors import KdrecipeError

PROVENANCE = "provenance.json"
"""File beside a result that says when, where and how fast it was made."""

ABOUT_THE_RUN = frozenset({PROVENANCE, "log.jsonl"})
"""Names of files that describe a run, not its result: they differ even if the results are the same."""


def sha256_bytes(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _chunked(file)
        )


def _chunked(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Hex digest of a JSON-like value; equal values have equal fingerprints on any machine."""
    return sha256_bytes(json.dumps(value, sort_keys=True, default=str).encode())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``path`` so that it holds the old content or the new, never a part.

    Raises:
        KdrecipeError: the disk is full; the old file is untouched.
    """
    with replacing(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it replaces ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_errors(path):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_IN_THE_WAY = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.ENFILE}
)
_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in the way into an error with a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # Libraries that write files on their own have exceptions of their own for a full disk.
        place = path if number in _FULL else None if number is not None else _full_disk(path)
        if place is not None:
            folder = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
            raise KdrecipeError(
                f"no space left on the disk ({shutil.disk_usage(folder).free / 1e6:.0f} MB free)",
                where=str(place),
                remedy="free some space or choose another directory with --work DIR, then repeat the command",
            ) from error
        if number is not None and number in _IN_THE_WAY:
            raise KdrecipeError(
                str(os.strerror(number)).lower(),
                where=str(getattr(error, "filename", None) or path),
                remedy="check its permissions, or choose another directory with --work DIR",
            ) from error
        raise


def _full_disk(path: Path) -> Path | None:
    """The folder, of those at ``path`` and for temporary files, that takes no more; None: neither is full."""
    above = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path.cwd())
    for folder in (above, Path(tempfile.gettempdir())):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_PROBE_BYTES))
        except OSError as error:
            if error.errno in _FULL:
                return folder
    return None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def write_jsonl_gz(path: Path, items: Iterable[Any]) -> None:
    """Write one line of JSON per item, compressed, atomically; equal items give equal bytes at any time."""
    with replacing(path) as part, part.open("wb") as raw:
        write_gz_blocks(raw, ((json.dumps(item, ensure_ascii=False) + "\n").encode() for item in items))


_BLOCK_BYTES = 1 << 15  # as far back as gzip looks for repetitions, so larger ones would not be smaller


def write_gz_blocks(file: IO[bytes], lines: Iterable[bytes]) -> None:
    """Write lines as gzip members of some 32 kB each: one gzip file to whoever reads it, and each line can be
    read without those before its block."""
    block = bytearray()

    def flush() -> None:
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as member:  # gzip.open would write the time
            member.write(block)

    flushed = False
    for line in lines:
        block += line
        if len(block) >= _BLOCK_BYTES:
            flush()
            flushed = True
            block.clear()
    if block or not flushed:
        flush()


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        KdrecipeError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise KdrecipeError("missing file", where=str(path), remedy="run the stage that writes it") from None
    except ValueError as error:  # no JSON, or not even UTF-8
        raise KdrecipeError(
            f"not valid JSON ({error})", where=str(path), remedy="delete it and rerun its stage"
        ) from None


def list_files(directory: Path) -> dict[str, int]:
    """Relative path -> size in bytes of every file below ``directory``, sorted, stamps left out."""
    return dict(sorted((name, os.stat(path).st_size) for name, path in _walk(directory)))


def _walk(directory: Path) -> Iterator[tuple[str, str]]:
    """Relative and whole path of every file below ``directory`` but stamps."""
    for folder, path, names in _folders(directory):
        for name in names:
            yield folder + name, os.path.join(path, name)


def _folders(directory: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Every folder: relative, with a slash behind it ('' for ``directory`` itself), and whole, with the names
    of its files but for stamps; linked folders are walked, each folder once."""
    seen: set[str] = set()
    for path, names_below, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link back up: without an end
            names_below.clear()
            continue
        seen.add(real)
        relative = Path(path).relative_to(directory).as_posix()
        yield ("" if relative == "." else f"{relative}/"), path, [n for n in names if n != "stamp.json"]


MANY_FILES = 10_000
"""A result of more files than this counts by its folders."""

_LARGE_FOLDER = 100  # files; smaller ones are counted file by file all the same


def list_result(directory: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """The files of a result with their sizes, and its large folders if it has more than :data:`MANY_FILES`.

    A folder counts by its time of change, which tells in one call that no file was added, removed or
    renamed; and where that is another, as in a copy, by the names and sizes in it.

    Returns:
        Relative path -> size in bytes; relative path -> ``{"time", "listing"}``, see :func:`same_folder`.
    """
    walked = list(_folders(directory))
    many = sum(len(names) for _, _, names in walked) > MANY_FILES
    files: dict[str, int] = {}
    folders: dict[str, dict[str, Any]] = {}
    for folder, path, names in walked:
        if many and folder and len(names) > _LARGE_FOLDER:
            folders[folder] = {"time": os.stat(path).st_mtime_ns, "listing": _listing(path)}
        else:
            files |= {folder + name: os.stat(os.path.join(path, name)).st_size for name in names}
    return dict(sorted(files.items())), dict(sorted(folders.items()))


def _listing(folder: str | Path) -> str:
    """Digest of the names and sizes of the files in a folder."""
    with os.scandir(folder) as entries:
        sizes = sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
    return fingerprint(sizes)


def same_folder(path: Path, stated: Mapping[str, Any]) -> bool:
    """Whether a large folder is as :func:`list_result` found it."""
    try:
        return bool(path.stat().st_mtime_ns == stated["time"] or _listing(path) == stated["listing"])
    except OSError:
        return False


# Audio, archives and arrays, by the end of their names: too big to be read at every start.
_AUDIO = ".wav .flac .mp3 .ogg .oga .opus .sph .m4a .aac .aif .aiff .au .amr .wma .raw .pcm .mp4 .mkv .webm"
_OTHER = ".tar .tgz .zip .7z .rar .bz2 .xz .zst .ark .npy .npz .h5 .hdf5 .lca .pt .bin"
_BULKY = frozenset(f"{_AUDIO} {_OTHER}".split())


def raw_digest(directory: Path) -> str:
    """Digest of a raw corpus that notices a change without reading all of it.

    Texts and manifests count by content, audio and other bulky files by name and size.
    """
    return fingerprint(dict(sorted((name, _mark(path)) for name, path in _walk(directory))))


def _mark(path: str) -> int | str | None:
    """Content or size of a file; None: a link to nothing, or a file that may not be read."""
    try:
        state = os.stat(path)
        if os.path.splitext(path)[1].lower() in _BULKY or path.lower().endswith(".tar.gz"):
            return state.st_size
        return _hash_once(path, state.st_mtime_ns, state.st_size)
    except OSError:
        return None


@functools.lru_cache(maxsize=100_000)
def _hash_once(path: str, mtime_ns: int, size: int) -> str:
    """The file's digest, read once per process and state."""
    return sha256_file(Path(path))


def state_digest(paths: Iterable[Path]) -> str:
    """Digest of the sizes and times of change of files, whether or not they are there."""
    states = {}
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            states[str(path)] = [state.st_size, state.st_mtime_ns]
    return fingerprint(states)


def content_digest(directory: Path, files: Iterable[str], folders: Iterable[str] = ()) -> str:
    """Digest of the content of ``files`` and of all files in ``folders``, both relative to ``directory``, but
    for those in :data:`ABOUT_THE_RUN`."""
    counted = [name for name in files if name.rpartition("/")[2] not in ABOUT_THE_RUN]
    digests = {name: sha256_file(directory / name) for name in counted}
    for folder in folders:
        names = sorted(path.name for path in (directory / folder).iterdir() if path.is_file())
        digests[folder] = content_digest(directory / folder, names)
    return fingerprint(digests)


class WhenAsked:
    """A text that takes long to find, and is found when a JSON-like value that holds it is written."""

    def __init__(self, find: Callable[[], str]) -> None:
        self._find = functools.cache(find)

    def __str__(self) -> str:
        return self._find()

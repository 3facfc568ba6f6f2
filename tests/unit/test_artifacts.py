"""Files are whole or absent, and digests see what changes."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from kdrecipe import artifacts
from kdrecipe.artifacts import (
    WhenAsked,
    content_digest,
    disk_errors,
    fingerprint,
    list_files,
    list_result,
    raw_digest,
    read_json,
    replacing,
    same_folder,
    sha256_file,
    state_digest,
    write_atomic,
    write_json,
    write_jsonl_gz,
)
from kdrecipe.errors import KdrecipeError


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# ---------------------------------------------------------------- writing


def test_text_bytes_and_json_arrive(tmp_path):
    write_atomic(tmp_path / "deep" / "text", "ä\n")
    write_atomic(tmp_path / "bytes", b"\x00\xff")
    write_json(tmp_path / "json", {"b": [1, 0.1], "a": None})
    assert (tmp_path / "deep" / "text").read_bytes() == "ä\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert read_json(tmp_path / "json") == {"b": [1, 0.1], "a": None}
    assert names(tmp_path) == ["bytes", "deep", "json"]


@pytest.mark.parametrize(
    ("number", "what"), [(errno.ENOSPC, "no space left on the disk"), (errno.EACCES, "permission denied")]
)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number, what):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(KdrecipeError, match=what) as error:
        write_atomic(path, "new")
    assert error.value.problems[0].where == str(path)
    assert "--work DIR" in error.value.problems[0].remedy
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_failed_sync_leaves_the_old_file(tmp_path, monkeypatch):
    # Some file systems tell only now that there was no room.
    write_atomic(tmp_path / "file", "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(KdrecipeError, match="no space left"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_of_the_writer_goes_through_unchanged(tmp_path):
    def write() -> None:
        with replacing(tmp_path / "file") as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    (tmp_path / "folder").mkdir()
    with pytest.raises(KdrecipeError, match="is a directory"):
        write_atomic(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def no_numbers(file: Path) -> None:
    """numpy's error has no number."""
    np.save(file, np.zeros(1 << 18))


def no_os_error(file: Path) -> None:
    soundfile.write(file, np.zeros(1 << 20, dtype=np.int16), 16000)


def an_archive_of_torch(file: Path) -> None:
    torch.save(torch.zeros(1 << 18), file)


@pytest.mark.parametrize("write", [no_numbers, no_os_error, an_archive_of_torch])
def test_a_full_disk_is_told_whatever_the_writer_raises(tmp_path, write):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))  # as near to a full disk as anyone may go
    try:
        with (
            pytest.raises(KdrecipeError, match="no space left") as error,
            disk_errors(tmp_path / "deep" / "x"),
        ):
            write(tmp_path / "file.wav")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.__cause__ is not None
    assert error.value.problems[0].where == str(tmp_path)
    with pytest.raises(RuntimeError, match="a bug"), disk_errors(tmp_path):
        raise RuntimeError("a bug")


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_what_is_no_json_is_told(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(KdrecipeError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(KdrecipeError, match="missing file") as error:
        read_json(tmp_path / "x.json")
    assert error.value.problems[0].where == str(tmp_path / "x.json")


# ---------------------------------------------------------------- digests


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint(Path("x")) == fingerprint(Path("x"))


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 7])
def test_files_are_hashed_alike_on_every_python(tmp_path, size):
    (tmp_path / "file").write_bytes(b"x" * size)
    expected = hashlib.sha256(b"x" * size).hexdigest()
    assert sha256_file(tmp_path / "file") == expected
    with open(tmp_path / "file", "rb") as file:
        assert artifacts._chunked(file) == expected


@pytest.fixture
def tree(tmp_path):
    for name in ("b", "a/c"):
        write_atomic(tmp_path / "tree" / name, name)
    return tmp_path / "tree"


def test_listing_leaves_stamps_out(tree):
    before = raw_digest(tree)
    assert list_files(tree) == {"a/c": 3, "b": 1}
    (tree / "stamp.json").write_text("{}")
    assert raw_digest(tree) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "new").write_text(""),
        lambda tree: (tree / "b").unlink(),
        lambda tree: (tree / "b").write_text("longer"),
        lambda tree: (tree / "b").rename(tree / "a" / "b"),
        lambda tree: (tree / "b").write_text("x"),
    ],
    ids=["added", "removed", "longer", "moved", "a letter"],
)
def test_the_digest_of_a_raw_corpus_sees(tree, change):
    before = raw_digest(tree)
    change(tree)
    assert raw_digest(tree) != before


def test_audio_counts_by_size_and_nothing_by_time(tree):
    (tree / "x.wav").write_text("abc")
    before = raw_digest(tree)
    (tree / "x.wav").write_text("xyz")
    os.utime(tree / "b", (1, 1))
    assert raw_digest(tree) == before
    (tree / "x.wav").write_text("longer")
    assert raw_digest(tree) != before


def test_linked_folders_are_walked_and_circles_end(tree, tmp_path):
    write_atomic(tmp_path / "elsewhere" / "d.wav", "1")
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tree)
    (tree / "nothing").symlink_to(tmp_path / "nothing")
    before = raw_digest(tree)
    write_atomic(tmp_path / "elsewhere" / "d.wav", "longer")
    assert raw_digest(tree) != before


def test_the_state_of_files_is_their_size_and_time(tree):
    files = [tree / "b", tree / "absent"]
    before = state_digest(files)
    os.utime(tree / "b", (1, 1))
    touched = state_digest(files)
    assert touched != before
    (tree / "b").unlink()
    assert state_digest(files) not in (before, touched)


def test_the_content_digest_sees_changes_of_equal_size(tree):
    content = content_digest(tree, list_files(tree))
    (tree / "b").write_text("x")
    assert content_digest(tree, list_files(tree)) != content


def test_compressed_lines_do_not_hold_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write_jsonl_gz(tmp_path / "a.gz", [{"id": "é"}, {"id": 2}])
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write_jsonl_gz(tmp_path / "b.gz", [{"id": "é"}, {"id": 2}])
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()).decode() == '{"id": "é"}\n{"id": 2}\n'


# ---------------------------------------------------------------- results of very many files


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "MANY_FILES", 150)
    for k in range(300):
        write_atomic(tmp_path / "out" / "storage" / f"{k // 150}" / f"{k}.npy", "123")
    write_atomic(tmp_path / "out" / "cuts", "123")
    return tmp_path / "out"


def test_a_result_of_many_files_counts_by_folders(large):
    files, folders = list_result(large)
    assert files == {"cuts": 3}
    assert list(folders) == ["storage/0/", "storage/1/"]
    assert all(same_folder(large / name, stated) for name, stated in folders.items())


def test_a_result_of_few_files_counts_by_files(tree):
    assert list_result(tree) == ({"a/c": 3, "b": 1}, {})


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "7.npy").unlink(),
        lambda folder: (folder / "new.npy").write_text("123"),
        lambda folder: (folder / "7.npy").rename(folder / "x.npy"),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=["removed", "added", "renamed", "all gone"],
)
def test_a_large_folder_has_changed(large, change):
    stated = list_result(large)[1]["storage/0/"]
    change(large / "storage" / "0")
    assert not same_folder(large / "storage" / "0", stated)


def test_a_copy_of_a_large_folder_is_the_same_and_a_file_cut_short_in_it_is_seen(large, tmp_path):
    stated = list_result(large)[1]["storage/0/"]
    shutil.copytree(large, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = tmp_path / "copy" / "storage" / "0"
    os.utime(copy, (1, 1))
    assert same_folder(copy, stated)
    (copy / "7.npy").write_text("1")
    assert not same_folder(copy, stated)


def test_the_content_of_large_folders_counts(large):
    def content():
        return content_digest(large, *list_result(large))

    before = content()
    assert before == content()
    (large / "storage" / "1" / "200.npy").write_text("321")
    assert content() != before


def test_what_takes_long_is_found_once_when_it_is_asked_for():
    found = []
    value = {"raw": WhenAsked(lambda: found.append(1) or "digest")}
    assert not found
    assert json.dumps(value, default=str) == json.dumps(value, default=str) == '{"raw": "digest"}'
    assert found == [1]

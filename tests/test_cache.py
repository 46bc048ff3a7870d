"""The user's cache folder: where it is, what survives a crash, and hashes that are read once."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from localsteer import cache
from localsteer.errors import LocalsteerError, ModelFileError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_localsteer_cache_overrides_where_the_folder_is(folder):
    assert cache.cache_folder() == folder
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="XDG is the rule of Linux")
def test_xdg_is_followed_and_a_relative_path_is_ignored(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCALSTEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "localsteer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == Path.home() / ".cache" / "localsteer"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.gguf"
    with pytest.raises(KeyboardInterrupt), cache.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with cache.atomic_path(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes of POSIX")
def test_a_pipe_or_a_device_is_written_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with cache.atomic_path(path) as temporary:
            assert temporary == path
        assert path.exists() and not path.is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_file_has_the_permissions_of_any_other(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.touch()
    # what other threads write meanwhile would have the mask that is set to read it
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask belongs to all threads"))
    with cache.atomic_path(tmp_path / "file"):
        pass
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LocalsteerError, match="LOCALSTEER_CACHE"), cache.atomic_path(tmp_path / "file" / "x"):
        pass


def test_a_folder_in_the_files_place_is_one_line_and_stays(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(LocalsteerError, match=r"can't write .*taken"), cache.atomic_path(tmp_path / "taken"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_hash_is_read_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    assert cache.file_hash(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "file_sha256", lambda path: pytest.fail("the file was read again"))
        assert cache.file_hash(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert cache.file_hash(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_memory_of_hashes_is_ignored(tmp_path, folder, damage):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    folder.mkdir()
    (folder / "hashes.json").write_text(damage)
    assert cache.file_hash(path) == hashlib.sha256(b"one").hexdigest()
    assert str(path.resolve()) in json.loads((folder / "hashes.json").read_text())


def test_hashing_works_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    monkeypatch.setenv("LOCALSTEER_CACHE", str(path / "no folder"))
    assert cache.file_hash(path) == hashlib.sha256(b"one").hexdigest()


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        cache.file_hash(tmp_path / "none.gguf")


def test_vectors_are_kept_by_model_listed_and_removed(folder):
    first, second = cache.vector_path("a" * 64, "json"), cache.vector_path("b" * 64, "Answer in rhyme.")
    for path in (first, second):
        path.parent.mkdir(parents=True)
        path.touch()
    assert cache.cached_vectors() == [first, second]
    assert cache.cached_vectors("a" * 64) == [first]
    cache.remove_vector(first)
    cache.remove_vector(first)
    assert cache.cached_vectors() == [second] and not first.parent.exists()


def test_names_are_safe_and_unique():
    assert cache.file_name("json") == "json"
    names = [cache.file_name(name) for name in ("Answer!", "answer?", "../../etc", "", "日本", "x" * 300)]
    assert len(set(names)) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") and len(name) < 80 for name in names)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for name in ("LOCALSTEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id without a name
    with pytest.raises(LocalsteerError, match="no home folder: set LOCALSTEER_CACHE"):
        cache.cache_folder()

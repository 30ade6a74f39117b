"""Files are written whole or not at all."""

import os

import pytest

from easyspec_jax.files import check_writable, write_whole


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"two"):
        check_writable(path)
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_told_before(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent/file'"):
        check_writable(tmp_path / "absent" / "file")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
